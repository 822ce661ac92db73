"""Pretraining in a run directory: what `ebm-prior pretrain` does, without click."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.data.images import ImageSource
from ebm_prior.interfaces import SILENT, Progress
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.passes import PLAIN, Passes
from ebm_prior.pictures.grids import save_png, titled_grids
from ebm_prior.runs.data import remember, with_kept_name
from ebm_prior.runs.folder import Run
from ebm_prior.runs.training import network_inputs, pictures, start_record, timed
from ebm_prior.runs.watch import UNWATCHED, Watch
from ebm_prior.storage.checkpoint import save_backbone
from ebm_prior.storage.weights import count_parameters
from ebm_prior.training.pretrain import Elbo, evaluate_elbo, pretrain, training_record
from ebm_prior.training.pretrain_config import PretrainConfig


def pretrain_into(
    directory: Path,
    backbone: Backbone,
    train: ImageSource,
    test: ImageSource,
    config: PretrainConfig,
    *,
    checkpoint: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    passes: Passes = PLAIN,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
    watch: Watch = UNWATCHED,
) -> dict[str, Any]:
    """Train a backbone in a run directory: backbone.safetensors, metrics, pictures, resume state.

    `checkpoint`: the origin of its weights, for the record; None means from the seed. The test ELBO is None where
    `test` holds the training images, from a source without splits. Where training diverges a second time, the last good
    backbone is written before DivergenceError is raised. `passes`: how cells are computed in the steps. Only the first
    of the `processes` writes files and reports to `progress`.
    """
    watch.require()
    inputs, start = network_inputs(backbone, train), start_record(checkpoint, backbone)
    inputs |= {"precision": passes.precision(backbone)}
    run = processes.of_first(lambda: Run(directory, asdict(config), inputs, resume=resume, overwrite=overwrite))
    processes.of_first(lambda: remember(directory, train, inputs["images"]))
    train = with_kept_name(directory, train, inputs["images"])
    held_out = None if test.fingerprint() == inputs["images"] else test
    path = directory / "backbone.safetensors"
    elbo: Elbo | None = None

    def draw(shown: Mapping[str, Any], picture: Path) -> None:
        nonlocal elbo
        elbo = shown["elbo"]
        write_progress(shown["backbone"], test, picture, config.seed)

    def keep(trained: Backbone, diverged: str | None) -> None:
        nonlocal elbo
        if not processes.first:
            return
        if elbo is None and held_out is not None and diverged is None:  # a finished run, resumed
            elbo = evaluate_elbo(trained, held_out, seed=config.seed)
        record = {**training_record(config, train, elbo), **start, "precision": inputs["precision"]}
        save_backbone(trained, path, record=record | ({"diverged": diverged} if diverged else {}))

    told: dict[str, Any] = {"validation": held_out, "passes": passes, "processes": processes}
    if processes.first:
        board = watch.board(run)
        show = pictures(directory, draw, progress, board=board)
        told |= {"run": board or run, "progress": progress, "on_evaluate": show}
    trained, seconds = timed(lambda: pretrain(backbone, train, config, **told), keep, path)
    return {
        "backbone": str(path),
        "parameters": count_parameters(trained),
        "test_elbo": elbo._asdict() if elbo is not None else None,
        "bits_per_dimension": elbo.bits_per_dimension(trained.image_shape) if elbo and trained.discretised else None,
        "cpu_seconds": seconds,
        "iterations": config.iterations,
    }


@torch.no_grad()
def write_progress(backbone: Backbone, images: ImageSource, path: Path, seed: int) -> None:
    """A picture of a backbone in training: images, their reconstructions, samples of the prior."""
    like = next(backbone.parameters())
    generator = torch.Generator(device=like.device).manual_seed(seed)
    real = images.batch(range(min(32, len(images)))).to(like.device, like.dtype)
    posterior = backbone.infer(backbone.observe(real, generator=generator), generator=generator)
    reconstructed = backbone.likelihood(posterior.features).mean
    sampled = backbone.decode(backbone.sample(len(real), generator=generator)).mean
    panels = [("images", real), ("reconstructions", reconstructed), ("samples", sampled)]
    save_png(titled_grids([(title, p.cpu()) for title, p in panels], columns=8), path)
