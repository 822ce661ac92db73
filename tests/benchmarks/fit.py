"""Seconds per iteration of a fit, on the unfolded backbone and on the folded one that `fit` takes itself.

python tests/benchmarks/fit.py --size bundled --iterations 8 --json out.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from measure import arguments, network, report, unfolded

from ebm_prior.data.images import from_array
from ebm_prior.interfaces import Silent
from ebm_prior.model.backbone import Backbone
from ebm_prior.training.fit import fit
from ebm_prior.training.fit_config import FitConfig, paper_preset

PRESETS = {"nce": FitConfig(ratios="one"), "mle, paper": paper_preset()}


def seconds(backbone: Backbone, config: FitConfig, images: int) -> float:
    """The median of an iteration's CPU seconds, the first one not counted."""
    pixels = torch.randint(0, 256, (images, *backbone.image_shape), dtype=torch.uint8).permute(0, 2, 3, 1).numpy()
    ends: list[float] = []

    class Clock(Silent):
        def step(self, shown: Mapping[str, Any]) -> None:
            ends.append(time.process_time())

    fit(backbone, from_array(pixels), config, progress=Clock())
    return statistics.median(b - a for a, b in pairwise(ends[:-1]))  # the last one evaluates, too


def main() -> None:
    options = arguments(__doc__, size=["bundled"], iterations=8, batch=32)
    rows = []
    for size in options.size:
        for name, preset in PRESETS.items():
            n = options.iterations + 2
            config = replace(preset, iterations=n, batch_size=options.batch, evaluate_every=n, held_out=10)
            plain, ours = (seconds(backbone, config, 200) for backbone in (unfolded(network(size)), network(size)))
            row = {"size": size, "objective": name, "batch": options.batch}
            rows.append({**row, "plain s": plain, "ours s": ours, "faster": plain / ours})
    report("One iteration of a fit", rows, options.json)


if __name__ == "__main__":
    main()
