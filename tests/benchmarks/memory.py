"""Memory of a Langevin step against the batch: what is kept for the backward pass, and the peak of the process (Linux).

python tests/benchmarks/memory.py --size small --batch 2 4 8 16 --json out.json
"""

from __future__ import annotations

from measure import Chain, arguments, network, paper_heads, peak_bytes, report, saved_bytes


def main() -> None:
    options = arguments(__doc__, size=["small"], batch=[2, 4, 8, 16])
    rows = []
    for size in options.size:
        backbone = network(size)
        energy = paper_heads(backbone)
        for batch in options.batch:
            row = {"size": size, "batch": batch}
            ours, plain = (Chain(backbone, energy, batch, plain=plain) for plain in (False, True))
            chains = {"plain": plain, "ours": ours}
            for name, chain in chains.items():
                row[f"{name} saved MiB"] = saved_bytes(chain) / 2**20
            for name, chain in chains.items():
                chain.step()
                row[f"{name} peak MiB"] = peak_bytes(chain.step) / 2**20
            row["less saved"] = row["plain saved MiB"] / row["ours saved MiB"]
            row["less peak"] = row["plain peak MiB"] / row["ours peak MiB"]
            rows.append(row)
    report("Memory of one Langevin step beyond the weights", rows, options.json)


if __name__ == "__main__":
    main()
