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
from ebm_prior.evaluation.roles import add_refiner, with_steps
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

REFINER = "refiner"  # the folder, in that of a run, where its refiner is fitted
FILES = "prior.safetensors", "backbone.safetensors", "before-after.png"


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
    `passes`: how cells are computed. A refiner that follows is fitted as a run of its own in the folder `REFINER`.
    Where training diverges twice, the best prior so far is written before DivergenceError is raised. Only the first of
    the `processes` writes files and reports to `progress`.
    """
    how: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "progress": progress, "processes": processes}
    how |= {"checkpoint": checkpoint, "bn_readjust": bn_readjust, "energy": energy, "passes": passes, "watch": watch}
    return _fitted(directory, backbone, images, config, **how)[1]


def _fitted(
    directory: Path,
    backbone: Backbone,
    images: ImageSource,
    config: FitConfig,
    *,
    checkpoint: str,
    bn_readjust: bool = False,
    energy: str | None,
    passes: Passes = PLAIN,
    resume: bool,
    overwrite: bool,
    progress: Progress,
    processes: Processes,
    watch: Watch = UNWATCHED,
) -> tuple[EBMPrior, dict[str, Any]]:
    """The prior, which all processes have, beside the result of `fit_into`."""
    watch.require()
    settings = _bn_settings(config.seed) if bn_readjust else None
    inputs = {"backbone": fingerprint(backbone), "bn_readjust": settings, **run_inputs(backbone, images)}
    inputs |= {"energy": energy} if energy else {}
    module = None if energy is None else named_energy(energy, backbone, config.seed)
    path, own, picture = (directory / name for name in FILES)
    where = checkpoint if checkpoint in bundled() else str(Path(checkpoint).resolve())
    if settings is not None:
        _require_adjustable(backbone, where, own)
    run = processes.of_first(lambda: Run(directory, _asked(config), inputs, resume=resume, overwrite=overwrite))
    processes.of_first(lambda: remember(directory, images, inputs["images"]))
    images = with_kept_name(directory, images, inputs["images"])
    if settings is not None:
        shared: dict[str, Any] = {"progress": progress, "processes": processes}
        backbone = readjusted(backbone, own, checkpoint, settings, resume=resume, **shared)
        where = own.name  # beside the prior: wherever the run is, equal runs give equal bytes
    backbone = passes.apply(backbone)

    def keep(prior: EBMPrior, _: str | None) -> None:
        prior.record["data"]["fingerprint"] = inputs["images"]  # by which `eval` knows them again
        prior.record |= {"bn_readjust": settings} if settings else {}
        if processes.first:
            save_prior(prior, path, checkpoint=where)

    told = {"processes": processes, **(_told(run, config, progress, watch) if processes.first else {})}
    train = partial(fit, backbone, images, config, energy=module, **told)
    prior, seconds = timed(lambda: with_steps(train(), images, config, processes, progress), keep, path)
    counted = {"parameters": parameters(backbone, config.heads, module), "cpu_seconds": seconds}
    how: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "progress": progress, "processes": processes}
    how |= {"checkpoint": checkpoint if settings is None else str(own.resolve()), "energy": energy}
    if second := _refined(prior, directory / REFINER, images, config, how):
        keep(prior, None)
    if processes.first:
        write_comparison(prior, picture, seed=config.seed, progress=progress)
    return prior, {"prior": str(path), "picture": str(picture), **counted, **second, **_summary(prior)}


def _refined(
    prior: EBMPrior, directory: Path, images: ImageSource, config: FitConfig, how: Mapping[str, Any]
) -> dict[str, Any]:
    """Fit the refiner that follows a fit as a run in `directory`, and choose the role that draws the samples.

    how: the other arguments of `_fitted`. Returns {"refiner": its result}, or nothing where no refiner is fitted.
    """
    results: dict[str, Any] = {}

    def train(second: FitConfig) -> EBMPrior:
        refiner, results["refiner"] = _fitted(directory, prior.backbone, images, second, **how)
        return refiner

    add_refiner(prior, images, config, train, how["processes"], how["progress"])
    return results


def _require_adjustable(backbone: Backbone, where: str, out: Path) -> None:
    """Refuse to re-adjust batch norms that there are none of, or those of the very file `out` that is to be written."""
    adjustable(backbone)
    if where == str(out.resolve()):
        raise OutputError(f"{out} is the backbone that is to be re-adjusted: choose another --out")


def _asked(config: FitConfig) -> dict[str, Any]:
    """The settings by which a run is known. One that leaves the refiner open can be given one later."""
    return {key: value for key, value in asdict(config).items() if (key, value) != ("refine", None)}


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
    roles = {"roles": prior.record["roles"]} if "roles" in prior.record else {}
    return {
        **roles,
        "sampled_by": prior.sampling.regime,
        "tau": prior.tau,
        "ceiling": None if prior.ceiling == math.inf else prior.ceiling,
        "regime": prior.regime,
        "sampler": asdict(prior.sampling.sampler),
        **{key: prior.record[key] for key in (*keys, *(["groups"] if "groups" in prior.record else []))},
    }
