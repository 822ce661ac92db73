"""The first stage in a run directory: what `ebm-prior pretrain` does, without click."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ebm_prior.data.images import ImageSource
from ebm_prior.errors import DivergenceError
from ebm_prior.interfaces import Callback
from ebm_prior.model.backbone import Backbone
from ebm_prior.pictures.grids import save_png, titled_grids
from ebm_prior.runs.backbones import source_record
from ebm_prior.runs.folder import Run, run_inputs
from ebm_prior.runs.kept import diverged
from ebm_prior.storage.checkpoint import save_backbone
from ebm_prior.storage.weights import count_parameters, fingerprint
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
    on_step: Callback | None = None,
) -> dict[str, Any]:
    """Train a backbone in a run directory: backbone.safetensors, metrics, pictures, resume state.

    `checkpoint`: where its weights come from, for the record; None: from the seed. The test ELBO is None where `test`
    holds the training images, from a source without splits.
    """
    architecture = json.loads(json.dumps(dict(backbone.architecture)))
    inputs = {"architecture": architecture, "start": fingerprint(backbone), **run_inputs(backbone, train)}
    held_out = None if test.fingerprint() == inputs["images"] else test
    run = Run(directory, asdict(config), inputs, resume=resume, overwrite=overwrite)

    elbo: Elbo | None = None

    def show(shown: Mapping[str, Any]) -> None:
        nonlocal elbo
        elbo = shown["elbo"]
        write_progress(shown["backbone"], test, directory / f"samples-{shown['iteration']:06d}.png", config.seed)

    path, began = directory / "backbone.safetensors", time.process_time()
    start = {} if checkpoint is None else {"start": source_record(checkpoint, backbone)}
    try:
        trained = pretrain(backbone, train, config, run=run, validation=held_out, on_step=on_step, on_checkpoint=show)
    except DivergenceError as error:
        if isinstance(error.kept, Backbone):
            record = {**training_record(config, train, elbo), **start, "diverged": str(error)}
            raise diverged(error, partial(save_backbone, error.kept, path, record=record), path) from error
        raise
    seconds = time.process_time() - began
    if elbo is None and held_out is not None:  # a finished run, resumed
        elbo = evaluate_elbo(trained, held_out, seed=config.seed)
    save_backbone(trained, path, record={**training_record(config, train, elbo), **start})
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
