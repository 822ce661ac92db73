"""The option --dry-run: report what a training would do, with time and memory measured on a few steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import torch

from ebm_prior.cli.preflight import Need, for_fit, for_step, require_memory
from ebm_prior.cli.shared import launched_processes, show_result
from ebm_prior.data.source import ImageSource
from ebm_prior.errors import ConfigurationError, few
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.passes import Passes
from ebm_prior.storage import places
from ebm_prior.storage.weights import count_parameters
from ebm_prior.training.fit import Fitting
from ebm_prior.training.fit_config import FitConfig, may_follow
from ebm_prior.training.joint import JointTraining
from ebm_prior.training.joint_config import JointConfig
from ebm_prior.training.loop import Training
from ebm_prior.training.pretrain import Pretraining
from ebm_prior.training.pretrain_config import PretrainConfig

STEPS = 3  # timed steps, after a first step that is not timed
IN_RUN = ("config.json", "metrics.jsonl", "progress.jsonl", "state.pt", "samples-ITERATION.png")
DRY_RUN = click.option(
    "--dry-run",
    is_flag=True,
    help="Report what would be done, with memory and time measured on a few steps; write nothing",
)


def fit(
    backbone: Backbone, images: ImageSource, config: FitConfig, passes: Passes, out: Path | None, as_json: bool
) -> None:
    """Say what `ebm-prior fit` would do."""
    need = for_fit(backbone, config, len(images), passes)
    memory = require_memory(need, passes.device)
    # No step depends on the held-out latents, so a few are enough. With groupwise 0 a staged fit is measured in its
    # stages: the ratios of single groups, which come before them, take less time.
    measured = replace(config, held_out=16, stage=replace(config.stage, groupwise=0.0))
    training = Fitting(passes.apply(backbone), _few(images, config.batch_size), measured)
    remarks = ["patience or saturation may end it sooner"] if config.regime == "calibrated" else []
    if config.may_stage:
        remarks.append("should one ratio saturate, a third of the steps follow in stages, which take longer")
        if config.refine is None:
            remarks.append("then also a refiner, which takes about as long again (--refine 0: no refiner)")
    if config.refine and (second := may_follow(config)):
        refiner = Fitting(training.backbone, _few(images, second.batch_size), replace(second, held_out=16))
        seconds = _seconds(refiner)
        remarks.append(f"a refiner follows: {config.refine:,} steps of {seconds:.3g} s")
    files = [*IN_RUN, "prior.safetensors", "before-after.png"]
    _show(training, images, need, memory, _folder(out, "fit"), files, as_json, remarks)


def pretrain(
    backbone: Backbone,
    images: ImageSource,
    need: Need,
    config: PretrainConfig,
    passes: Passes,
    out: Path | None,
    as_json: bool,
) -> None:
    """Say what `ebm-prior pretrain` would do; `need`: the memory that it takes."""
    memory = require_memory(need, passes.device)
    training = Pretraining(backbone, _few(images, config.batch_size), config, passes=passes)
    _show(training, images, need, memory, _folder(out, "pretrain"), [*IN_RUN, "backbone.safetensors"], as_json)


def train(backbone: Backbone, images: ImageSource, config: JointConfig, out: Path | None, as_json: bool) -> None:
    """Say what `ebm-prior train` would do."""
    folder = _folder(out, "train")
    some = _few(images, config.batch_size)
    training = JointTraining(backbone, some, config, some)
    training.iteration = max(0, config.iterations - STEPS - 2)  # when the energy has joined
    files = [*IN_RUN, "backbone.safetensors", "prior.safetensors"]
    need = for_step(training.step, "a step and its optimizer", "--batch-size")
    _show(training, images, need, require_memory(need, training.device), folder, files, as_json)


def _show(
    training: Training,
    images: ImageSource,
    need: Need,
    memory: str,
    folder: Path,
    files: Sequence[str],
    as_json: bool,
    remarks: Sequence[str] = (),
) -> None:
    seconds = _seconds(training)
    plan = {
        "folder": str(folder),
        "files": list(files),
        "images": {"name": images.name, "count": len(images)},
        "parameters": count_parameters(training.network),
        "iterations": training.iterations,
        "evaluate_every": training.every,
        "seconds_per_iteration": seconds,
        "seconds": seconds * training.iterations,
        "memory_bytes": need.bytes,
        "threads": torch.get_num_threads(),
        "remarks": list(remarks),
    }
    hours = seconds * training.iterations / 3600
    in_all = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
    lines = [
        "dry run: nothing is written",
        f"images: {images.name}, {len(images):,}",
        f"learns: {plan['parameters']:,} parameters",
        f"steps: {training.iterations:,}, evaluated every {training.every:,}",
        f"time: {seconds:.3g} s per step (median of {STEPS}), {in_all} in all without evaluations and pictures",
        memory,
        f"folder: {folder}",
        f"files: {few(files)}",
        *remarks,
    ]
    show_result(plan, as_json, lambda _: "\n".join(lines))


def _seconds(training: Training) -> float:
    """Median wall-clock seconds of a step. A first step, which allocates memory and records graphs, is not counted."""
    device, found = next(training.network.parameters()).device, []
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        training.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def _folder(out: Path | None, command: str) -> Path:
    """The folder that the run would have. Raises ConfigurationError if torchrun has started several processes."""
    if launched_processes().count > 1:
        raise ConfigurationError("--dry-run measures one process: leave out torchrun")
    return places.run_directory(out, command, resume=False)


def _few(images: ImageSource, batch_size: int) -> ImageSource:
    """A subset of the images that is large enough for a few batches and some held-out images."""
    return images.subset(range(min(len(images), 2 * batch_size + 20)))
