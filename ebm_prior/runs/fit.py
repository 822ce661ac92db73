"""What the commands do, without click: a library user can call the same functions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.data.images import ImageSource
from ebm_prior.errors import DivergenceError, OutputError
from ebm_prior.interfaces import Callback
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.batch_norm import BATCH_SIZE, ITERATIONS, adjustable
from ebm_prior.model.prior import EBMPrior
from ebm_prior.pictures.grids import grid, save_png
from ebm_prior.runs.backbones import readjusted
from ebm_prior.runs.describe import parameters
from ebm_prior.runs.folder import Run, run_inputs
from ebm_prior.runs.kept import diverged
from ebm_prior.runs.samples import write_comparison
from ebm_prior.storage.checkpoint import bundled, save_prior
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
    checkpointing: bool = False,
    compiled: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    on_step: Callback | None = None,
    on_stage: Callable[[str], None] | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Fit a prior in a run directory: prior.safetensors, metrics, pictures, resume state.

    `bn_readjust`: first re-adjust the batch norms of `backbone`, which is then another one: it is written to
    backbone.safetensors, and this is the backbone of the prior. `checkpointing`, `compiled`: of its cells. Where
    training diverges for good, the best prior so far is written before DivergenceError goes on. The first of the
    `processes` writes, and none of the others.
    """
    settings: dict[str, Any] | None = None
    if bn_readjust:
        settings = {"iterations": ITERATIONS, "batch_size": BATCH_SIZE, "temperature": 1.0, "seed": config.seed}
    inputs = {"backbone": fingerprint(backbone), "bn_readjust": settings, **run_inputs(backbone, images)}
    path, own = directory / "prior.safetensors", directory / "backbone.safetensors"
    where = checkpoint if checkpoint in bundled() else str(Path(checkpoint).resolve())
    if settings is not None:
        adjustable(backbone)
        if where == str(own.resolve()):
            raise OutputError(f"{own} is the backbone that is to be re-adjusted: choose another --out")
    run = processes.of_first(lambda: Run(directory, asdict(config), inputs, resume=resume, overwrite=overwrite))
    if settings is not None:
        adjust = partial(readjusted, backbone, own, checkpoint, settings)
        processes.of_first(lambda: adjust(resume=resume, on_stage=on_stage) and None)
        backbone = adjust(resume=True)  # the others read what the first has written
        where = own.name  # beside the prior: wherever the run is, equal runs give equal bytes
    if checkpointing:
        backbone = backbone.checkpointing()
    if compiled:
        backbone = backbone.compiled()

    def keep(prior: EBMPrior) -> None:
        prior.record["data"]["fingerprint"] = inputs["images"]  # by which `eval` knows them again
        if settings is not None:
            prior.record["bn_readjust"] = settings
        if processes.first:
            save_prior(prior, path, checkpoint=where)

    def show(shown: Mapping[str, Any]) -> None:
        if shown["iteration"] % (5 * config.evaluate_every) == 0:
            try:
                drawn = shown["prior"].sample(32, seed=config.seed)
            except DivergenceError as error:  # of a picture's chains: training watches its own
                return on_stage(f"no picture of iteration {shown['iteration']}: {error}") if on_stage else None
            save_png(grid(drawn.images, columns=8), directory / f"samples-{shown['iteration']:06d}.png")

    began = time.process_time()
    try:
        if processes.first:
            prior = fit(backbone, images, config, run=run, on_step=on_step, on_evaluate=show, processes=processes)
        else:
            prior = fit(backbone, images, config, processes=processes)
    except DivergenceError as error:
        if isinstance(error.kept, EBMPrior):
            raise diverged(error, partial(keep, error.kept), path) from error
        raise
    seconds = time.process_time() - began
    keep(prior)
    before_after = directory / "before-after.png"
    if processes.first:
        write_comparison(prior, before_after, seed=config.seed)
    return {
        "prior": str(path),
        "picture": str(before_after),
        "parameters": parameters(backbone, config.energy),
        "tau": prior.tau,
        "ceiling": None if prior.ceiling == math.inf else prior.ceiling,
        "regime": prior.regime,
        "sampler": asdict(prior.sampler),
        "cpu_seconds": seconds,
        **{
            key: prior.record[key]
            for key in ("config", "iterations", "best_iteration", "rollbacks", "held_out", "saturated", "stages")
        },
    }
