"""Bounds on log Z where it is known: how often the limits hold it, and how the width falls with the work.

    python tests/benchmarks/bounds.py truth --dimensions 10 1000 10000
    python tests/benchmarks/bounds.py width

`truth`: 40 seeds of each target of tests/helpers/known_log_z.py in each number of dimensions. `width`: of the Gaussian,
over conditional ESS and chains; work is counted in gradients of f, in both directions together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from known_log_z import TARGETS, Standard

from ebm_prior.model.bounds import Bounds
from ebm_prior.model.normalizer import AnnealingConfig, annealed


def gradients(found: Bounds) -> int:
    """Gradients of f that the chains took, without the pilot's."""
    each = 2 * (found.rungs - 1) + found.moves
    return found.repetitions * found.chains * found.leapfrogs * each


def measured(name: str, dimensions: int, config: AnnealingConfig, seeds: int) -> dict[str, Any]:
    """How often the limits hold log Z over the seeds, the mean bounds less the truth, and what they cost."""
    target, backbone, began = TARGETS[name](dimensions), Standard(dimensions), time.process_time()
    found = [annealed(backbone, target.g, config, seed=seed) for seed in range(seeds)]
    limits = [each.limits() for each in found]
    return {
        "target": name,
        "dimensions": dimensions,
        "ess": config.ess,
        "chains": config.chains,
        "seeds": seeds,
        "held": sum(low < target.log_z < high for low, high in limits),
        "closed": sum(each.closed for each in found),
        "settled": sum(each.settled for each in found),
        "lower": statistics.fmean(each.lower for each in found) - target.log_z,
        "upper": statistics.fmean(each.upper for each in found) - target.log_z,
        "sd": statistics.stdev(each.lower for each in found),
        "width": statistics.fmean(high - low for low, high in limits),
        "rungs": statistics.fmean(each.rungs for each in found),
        "gradients": statistics.fmean(map(gradients, found)),
        "seconds": (time.process_time() - began) / seeds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=["truth", "width"])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--chains", type=int, default=AnnealingConfig.chains)
    parser.add_argument("--moves", type=int, default=AnnealingConfig.moves)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    if given.what == "truth":
        jobs = [
            (name, dimensions, AnnealingConfig(chains=given.chains, moves=given.moves))
            for dimensions in given.dimensions
            for name in TARGETS
        ]
    else:
        jobs = [
            ("gaussian", dimensions, AnnealingConfig(ess=ess, chains=chains, moves=given.moves))
            for dimensions in given.dimensions
            for ess in (0.9, 0.98, 0.995)
            for chains in (2, 8, 32)
        ]
    for name, dimensions, config in jobs:
        rows.append(measured(name, dimensions, config, given.seeds))
        print(
            "{target:8} D {dimensions:6} ess {ess:5} chains {chains:3}: held {held}/{seeds}, closed {closed}, settled "
            "{settled}; lower {lower:+.3f}, upper {upper:+.3f}, sd {sd:.3f}, width of the limits {width:.3f}; "
            "{rungs:.0f} rungs, {gradients:,.0f} gradients, {seconds:.1f} CPU-s".format(**rows[-1]),
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
