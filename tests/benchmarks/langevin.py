"""One Langevin step through an NVAE: the plain path, as published, against ours, in bf16 too. Interleaved.

python tests/benchmarks/langevin.py --size small published --pairs 15 --json out.json
python tests/benchmarks/langevin.py --size published --batch 8 64 --device cuda

On a GPU "ours" replays CUDA graphs ("no graphs": it does not), and the floor is the time that the step's products would
take at the rate of a large matrix product, or moving what is saved for the backward pass twice at the rate of a copy.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import BATCH, Chain, arguments, interleaved, network, paper_heads, peak_bytes, report, saved_bytes
from torch.utils.flop_counter import FlopCounterMode

from ebm_prior.samplers import start


def main() -> None:
    options = arguments(__doc__, size=["small", "published"], batch=[0], pairs=15)
    cuda, rows = options.device != "cpu", []
    for size in options.size:
        backbone = network(size, options.device)
        energy = paper_heads(backbone)
        half = backbone.for_inference(cells=torch.bfloat16)
        for batch in (given or BATCH[size] for given in options.batch):
            chains = {
                "plain": Chain(backbone, energy, batch, plain=True),
                "ours": Chain(backbone, energy, batch, plain=False),
                "ours, bf16": Chain(half, energy, batch, plain=False),
            }
            if cuda:
                chains["ours, no graphs"] = Chain(backbone, energy, batch, plain=False, graphs=False)
            saved, peaks = {}, {}
            for name, chain in list(chains.items()):
                try:
                    saved[name] = saved_bytes(chain) / 2**20 / batch
                    few = partial(steps_of, chain, 3 if cuda else 1)  # a graph is recorded at the second
                    peaks[name] = peak_bytes(few, options.device) / 2**30
                except torch.OutOfMemoryError:
                    print(f"{size}, batch {batch}, {name}: does not fit", flush=True)
                    del chains[name]
                    gc.collect()
                    torch.cuda.empty_cache()
            steps = {name: chain.step for name, chain in chains.items()}
            seconds = interleaved(steps, options.pairs, device=options.device, warm_up=3 if cuda else 1)
            for name, chain in chains.items():
                row: dict[str, Any] = {"size": size, "batch": batch, "path": name, "s": seconds[name]}
                row |= {"saved MiB/sample": saved[name], "peak GiB": peaks[name]}
                row["faster"] = seconds.get("plain", math.nan) / seconds[name]
                row["less saved"] = saved.get("plain", math.nan) / saved[name]
                if cuda:
                    products, moved = floors(chain, saved[name] * batch, torch.bfloat16 if "bf16" in name else None)
                    row |= {"products s": products, "moved s": moved, "floor / s": max(products, moved) / seconds[name]}
                rows.append(row)
            del chains, chain, steps
    report(f"One Langevin step, medians of {options.pairs} rounds", rows, options.json)


def steps_of(chain: Chain, count: int) -> None:
    """Run a chain for a while."""
    for _ in range(count):
        chain.step()


def floors(chain: Chain, saved: float, dtype: torch.dtype | None) -> tuple[float, float]:
    """Seconds that this GPU needs at least for the products of a step, and to write and read `saved` MiB."""
    with FlopCounterMode(display=False) as counter:
        start(chain.prior.potential, chain.eps)
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    x = torch.randn(2**28, device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions may by default
    product, copy = _median(lambda: a @ a), _median(x.clone)
    torch.backends.cuda.matmul.allow_tf32 = False
    return counter.get_total_flops() * product / (2 * 8192**3), saved * 2**20 / x.nbytes * copy


def _median(run: Callable[[], object]) -> float:
    return interleaved({"": run}, 7, device="cuda", warm_up=3)[""]


if __name__ == "__main__":
    main()
