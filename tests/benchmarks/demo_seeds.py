"""What `ebm-prior demo` gains, over seeds and numbers of threads: shares of the gap closed in FD and FDrec, and time.

python tests/benchmarks/demo_seeds.py --seeds 0 1 2 3 4 --threads 1 2 --json out.json

Each row is one whole demo. Rows are written as they come: what has been measured is kept if this is stopped. The demo
takes at least its CPU seconds over the number of threads; by the clock, other work on the machine counts, too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from ebm_prior.cli.allocator import keep_freed_memory
from ebm_prior.reports.text import table
from ebm_prior.runs.demo import run_demo

KEPT = ("fd_backbone", "fd_prior", "fd_reconstruction", "fdrec_backbone", "fdrec_prior", "fdrec_reconstruction")
PROMISED = {"gap_closed": 0.60, "gap_closed_rec": 0.80}  # of every seed


def row(seed: int, threads: int) -> dict[str, Any]:
    """The result of the demo with this seed on so many threads."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        result = run_demo(Path(folder) / "demo", seed=seed)
    shown = (*PROMISED, "gain_nats", "auc_before", "auc_after", "seconds", "cpu_seconds", *KEPT)
    return {"seed": seed, "threads": threads, **{key: result[key] for key in shown}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    options = parser.parse_args()
    keep_freed_memory()  # as the command line does
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        for threads in options.threads:
            rows.append(row(seed, threads))
            print(json.dumps(rows[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    head = ["seed", "threads", "gap closed, FD", "FDrec", "CPU seconds", "seconds", "as promised"]
    cells = [
        [
            str(r["seed"]),
            str(r["threads"]),
            f"{r['gap_closed']:.3f}",
            f"{r['gap_closed_rec']:.3f}",
            f"{r['cpu_seconds']:.0f}",
            f"{r['seconds']:.0f}",
            "yes" if all(r[key] >= least for key, least in PROMISED.items()) else "NO",
        ]
        for r in rows
    ]
    print(table(head, cells))


if __name__ == "__main__":
    main()
