"""One Langevin step through an NVAE: the plain path, as published, against ours, in bf16 too. CPU seconds, interleaved.

python tests/benchmarks/langevin.py --size small published --pairs 15 --json out.json
"""

from __future__ import annotations

import torch
from measure import BATCH, Chain, arguments, interleaved, network, paper_heads, report, saved_bytes


def main() -> None:
    options = arguments(__doc__, size=["small", "published"], pairs=15)
    rows = []
    for size in options.size:
        backbone, batch = network(size), BATCH[size]
        energy = paper_heads(backbone)
        half = backbone.for_inference(cells=torch.bfloat16)
        chains = {
            "plain": Chain(backbone, energy, batch, plain=True),
            "ours": Chain(backbone, energy, batch, plain=False),
            "ours, bf16": Chain(half, energy, batch, plain=False),
        }
        seconds = interleaved({name: chain.step for name, chain in chains.items()}, options.pairs)
        saved = {name: saved_bytes(chain) / 2**20 / batch for name, chain in chains.items()}
        for name in chains:
            row = {"size": size, "batch": batch, "path": name, "s": seconds[name], "saved MiB/sample": saved[name]}
            rows.append({**row, "faster": seconds["plain"] / seconds[name], "less saved": saved["plain"] / saved[name]})
    report(f"One Langevin step, medians of {options.pairs} rounds", rows, options.json)


if __name__ == "__main__":
    main()
