"""Seconds per iteration of a fit: on the unfolded backbone ("plain"), on the folded one ("ours"), and as published.

python tests/benchmarks/fit.py --size bundled --iterations 8 --json out.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import nan
from typing import Any

import torch
from measure import Plain, arguments, interleaved, network, paper_heads, report, unfolded

from ebm_prior.compute.randomness import derived_generator
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


def published_seconds(backbone: Backbone, config: FitConfig, rounds: int) -> float:
    """The median of an iteration's CPU seconds as published: posterior pass, chains, update of the heads."""
    heads = paper_heads(backbone).train().requires_grad_(True)
    optimizer = torch.optim.Adam(
        heads.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    images, generator = torch.rand(config.batch_size, *backbone.image_shape), derived_generator(0)
    path = Plain(backbone, heads, fused=False)
    run = partial(path.iteration, images, config.chain.steps, optimizer, generator)
    return interleaved({"": run}, rounds)[""]


def main() -> None:
    options = arguments(__doc__, size=["bundled"], iterations=8, batch=32)
    rows = []
    for size in options.size:
        for name, preset in PRESETS.items():
            n = options.iterations + 2
            config = replace(preset, iterations=n, batch_size=options.batch, evaluate_every=n, held_out=10)
            plain, ours = (seconds(backbone, config, 200) for backbone in (unfolded(network(size)), network(size)))
            row = {"size": size, "objective": name, "batch": options.batch}
            published = (
                published_seconds(network(size), config, options.iterations) if preset.objective == "mle" else nan
            )
            times = {"published s": published, "plain s": plain, "ours s": ours}
            rows.append({**row, **times, "published / ours": published / ours, "plain / ours": plain / ours})
    report("One iteration of a fit", rows, options.json)


if __name__ == "__main__":
    main()
