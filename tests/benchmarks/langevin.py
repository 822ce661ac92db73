"""One Langevin step through an NVAE, as published against ours, in bf16 too. Interleaved.

"Plain" is the published path with torch's fused swish.

python tests/benchmarks/langevin.py --size small published --pairs 15 --json out.json
python tests/benchmarks/langevin.py --size published --batch 8 64 --device cuda

On a GPU "ours" replays CUDA graphs ("no graphs": it does not), and the floor is the time that the step's products would
take at the rate of a large matrix product, or moving what is saved for the backward pass twice at the rate of a copy.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from measure import BATCH, Chain, Plain, arguments, interleaved, network, paper_heads, peak_bytes, report, saved_bytes
from torch.utils.flop_counter import FlopCounterMode

from ebm_prior.model.samplers import start


def main() -> None:
    options = arguments(__doc__, size=["small", "published"], batch=[0], pairs=15)
    cuda, rows = options.device != "cpu", []
    for size in options.size:
        backbone = network(size, options.device)
        energy = paper_heads(backbone)
        half = backbone.for_inference(cells=torch.bfloat16)
        compiled, compiled_half = (backbone.for_inference(cells=c).compiled() for c in (None, torch.bfloat16))
        for batch in (given or BATCH[size] for given in options.batch):
            paths = {
                "published": partial(Chain, backbone, energy, batch, plain=Plain(backbone, energy, fused=False)),
                "plain": partial(Chain, backbone, energy, batch, plain=Plain(backbone, energy, fused=True)),
                "ours": partial(Chain, backbone, energy, batch),
                "ours, bf16": partial(Chain, half, energy, batch),
            }
            if cuda:
                paths["ours, no graphs"] = partial(Chain, backbone, energy, batch, graphs=False)
                paths["ours, compiled"] = partial(Chain, compiled, energy, batch)
                paths["ours, bf16, compiled"] = partial(Chain, compiled_half, energy, batch)
            found: dict[str, dict[str, float]] = {}
            for name, made in paths.items():
                try:
                    found[name] = of_one(name, made(), batch, options.device)
                except torch.OutOfMemoryError:
                    print(f"{size}, batch {batch}, {name}: does not fit", flush=True)
                free()
            seconds, together = timed({name: paths[name] for name in found}, options.pairs, options.device)
            for name, row in found.items():
                row |= {"interleaved": together, "s": seconds[name]}
                published = found.get("published", {})
                row["faster"] = seconds.get("published", math.nan) / seconds[name]
                row["less saved"] = published.get("saved MiB/sample", math.nan) / row["saved MiB/sample"]
                row["less peak"] = published.get("peak GiB", math.nan) / row["peak GiB"]
                if cuda:
                    row["floor / s"] = max(row["products s"], row["moved s"]) / seconds[name]
                rows.append({"size": size, "batch": batch, "path": name, **row})
    report(f"One Langevin step, medians of {options.pairs} rounds", rows, options.json)


def of_one(name: str, chain: Chain, batch: int, device: str) -> dict[str, float]:
    """What a step keeps and its peak, and on a GPU the two floors of its time."""
    cuda, saved = device != "cpu", saved_bytes(chain) / 2**20
    few = partial(steps_of, chain, 3 if cuda else 1)  # a graph is recorded at the second
    row = {"saved MiB/sample": saved / batch, "peak GiB": peak_bytes(few, device) / 2**30}
    if cuda:
        row["products s"], row["moved s"] = floors(chain, saved, torch.bfloat16 if "bf16" in name else None)
    return row


def timed(paths: Mapping[str, Callable[[], Chain]], pairs: int, device: str) -> tuple[dict[str, float], bool]:
    """Median seconds of a step of each, and whether interleaved: not where a GPU does not hold all at once."""
    warm_up = 3 if device != "cpu" else 1
    chains = []
    try:
        chains = [made() for made in paths.values()]
        steps = {name: chain.step for name, chain in zip(paths, chains, strict=True)}
        return interleaved(steps, pairs, device=device, warm_up=warm_up), True
    except torch.OutOfMemoryError:
        print("together the paths do not fit: one after another", flush=True)
    steps, seconds = {}, {}
    for name, made in paths.items():
        chains.clear()
        free()
        chains.append(made())
        seconds |= interleaved({name: chains[0].step}, pairs, device=device, warm_up=warm_up)
    return seconds, False


def free() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
