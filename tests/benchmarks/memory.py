"""Memory of a Langevin step against the batch: what is kept for the backward pass, and the peak of the process (Linux).

python tests/benchmarks/memory.py --size small --batch 2 4 8 16 --json out.json
"""

from __future__ import annotations

from measure import Chain, Plain, arguments, network, paper_heads, peak_bytes, report, saved_bytes


def main() -> None:
    options = arguments(__doc__, size=["small"], batch=[2, 4, 8, 16])
    rows = []
    for size in options.size:
        backbone = network(size)
        energy = paper_heads(backbone)
        for batch in options.batch:
            row = {"size": size, "batch": batch}
            published = Plain(backbone, energy, fused=False)
            chains = {
                "published": Chain(backbone, energy, batch, plain=published),
                "ours": Chain(backbone, energy, batch),
            }
            for name, chain in chains.items():
                row[f"{name} saved MiB"] = saved_bytes(chain) / 2**20
            for name, chain in chains.items():
                chain.step()
                row[f"{name} peak MiB"] = peak_bytes(chain.step) / 2**20
            row["less saved"] = row["published saved MiB"] / row["ours saved MiB"]
            row["less peak"] = row["published peak MiB"] / row["ours peak MiB"]
            rows.append(row)
    report("Memory of one Langevin step beyond the weights", rows, options.json)


if __name__ == "__main__":
    main()
