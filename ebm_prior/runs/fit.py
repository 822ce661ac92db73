"""Fitting a prior in a run directory: what `ebm-prior fit` does, without click."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.compute.randomness import Purpose, seeded
from ebm_prior.data.images import ImageSource
from ebm_prior.errors import OutputError
from ebm_prior.interfaces import SILENT, Progress
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.batch_norm import BATCH_SIZE, ITERATIONS, adjustable
from ebm_prior.model.passes import PLAIN, Passes
from ebm_prior.model.prior import EBMPrior
from ebm_prior.pictures.grids import grid, save_png
from ebm_prior.runs.backbones import readjusted
from ebm_prior.runs.data import remember, with_kept_name
from ebm_prior.runs.describe import parameters
from ebm_prior.runs.folder import Run, run_inputs
from ebm_prior.runs.samples import write_comparison
from ebm_prior.runs.training import pictures, timed
from ebm_prior.runs.watch import UNWATCHED, Watch
from ebm_prior.storage.checkpoint import bundled, save_prior
from ebm_prior.storage.registry import energy_named
from ebm_prior.storage.weights import fingerprint
from ebm_prior.training.fit import fit
from ebm_prior.training.fit_config import FitConfig


def fit_into(
    directory: Path,
    backbone: Backbone,
    images: ImageSource,
    config: FitConfig,
    *,
    checkpoint: str,
    bn_readjust: bool = False,
    energy: str | None = None,
    passes: Passes = PLAIN,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
    watch: Watch = UNWATCHED,
) -> dict[str, Any]:
    """Fit a prior in a run directory: prior.safetensors, metrics, pictures, resume state.

    `bn_readjust`: first re-adjust the batch norms of `backbone`; the changed one is written to backbone.safetensors
    and becomes the backbone of the prior. `energy`: the registered name of an energy to fit in place of the heads.
    `passes`: how cells are computed. Where training diverges twice, the best prior so far is written before
    DivergenceError is raised. Only the first of the `processes` writes files and reports to `progress`.
    """
    watch.require()
    settings = _bn_settings(config.seed) if bn_readjust else None
    inputs = {"backbone": fingerprint(backbone), "bn_readjust": settings, **run_inputs(backbone, images)}
    inputs |= {"energy": energy} if energy else {}
    module = None if energy is None else named_energy(energy, backbone, config.seed)
    path, own = directory / "prior.safetensors", directory / "backbone.safetensors"
    where = checkpoint if checkpoint in bundled() else str(Path(checkpoint).resolve())
    if settings is not None:
        adjustable(backbone)
        if where == str(own.resolve()):
            raise OutputError(f"{own} is the backbone that is to be re-adjusted: choose another --out")
    run = processes.of_first(lambda: Run(directory, asdict(config), inputs, resume=resume, overwrite=overwrite))
    processes.of_first(lambda: remember(directory, images, inputs["images"]))
    images = with_kept_name(directory, images, inputs["images"])
    if settings is not None:
        shared: dict[str, Any] = {"progress": progress, "processes": processes}
        backbone = readjusted(backbone, own, checkpoint, settings, resume=resume, **shared)
        where = own.name  # beside the prior: wherever the run is, equal runs give equal bytes
    backbone = passes.apply(backbone)

    def keep(prior: EBMPrior, _: str | None) -> None:
        prior.record["data"]["fingerprint"] = inputs["images"]  # by which `eval` knows them again
        if settings is not None:
            prior.record["bn_readjust"] = settings
        if processes.first:
            save_prior(prior, path, checkpoint=where)

    told = {"processes": processes, **(_told(run, config, progress, watch) if processes.first else {})}
    prior, seconds = timed(partial(fit, backbone, images, config, energy=module, **told), keep, path)
    before_after = directory / "before-after.png"
    if processes.first:
        write_comparison(prior, before_after, seed=config.seed, progress=progress)
    files = {"prior": str(path), "picture": str(before_after)}
    counted = {"parameters": parameters(backbone, config.heads, module), "cpu_seconds": seconds}
    return files | counted | _summary(prior)


def _told(run: Run, config: FitConfig, progress: Progress, watch: Watch) -> dict[str, Any]:
    """The arguments of `fit` that only the first process gets: what to write and what to show."""
    board = watch.board(run)
    every = (1 if watch.preview else 5) * config.evaluate_every
    show = pictures(run.directory, partial(_draw, config.seed), progress, every=every, board=board)
    return {"run": board or run, "progress": progress, "on_evaluate": show}


def named_energy(name: str, backbone: Backbone, seed: int) -> nn.Module:
    """The energy that is registered as `name`, for this backbone; its weights depend on the seed alone."""
    with seeded(torch.device("cpu"), seed, Purpose.HEADS):
        return energy_named(name, backbone.groups, {})


def _draw(seed: int, shown: Mapping[str, Any], picture: Path) -> None:
    save_png(grid(shown["prior"].sample(32, seed=seed).images, columns=8), picture)


def _bn_settings(seed: int) -> dict[str, Any]:
    """How batch norms are re-adjusted: the keyword arguments of `readjust_batch_norm`."""
    return {"iterations": ITERATIONS, "batch_size": BATCH_SIZE, "temperature": 1.0, "seed": seed}


def _summary(prior: EBMPrior) -> dict[str, Any]:
    """The prior in plain values, and the parts of its record that the command shows."""
    keys = ("config", "iterations", "best_iteration", "rollbacks", "held_out", "saturated", "stages")
    return {
        "tau": prior.tau,
        "ceiling": None if prior.ceiling == math.inf else prior.ceiling,
        "regime": prior.regime,
        "sampler": asdict(prior.sampler),
        **{key: prior.record[key] for key in (*keys, *(["groups"] if "groups" in prior.record else []))},
    }
