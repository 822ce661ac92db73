"""Joint training in a run directory: what `ebm-prior train` does, without click."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ebm_prior.data.images import ImageSource
from ebm_prior.interfaces import SILENT, Progress
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.prior import EBMPrior
from ebm_prior.pictures.grids import save_png, titled_grids
from ebm_prior.runs.data import remember, with_kept_name
from ebm_prior.runs.describe import parameters
from ebm_prior.runs.folder import Run
from ebm_prior.runs.training import network_inputs, pictures, start_record, timed
from ebm_prior.runs.watch import UNWATCHED, Watch
from ebm_prior.storage.checkpoint import save_backbone, save_prior
from ebm_prior.training.joint import train_jointly, validate
from ebm_prior.training.joint_config import JointConfig


def train_into(
    directory: Path,
    backbone: Backbone,
    train: ImageSource,
    test: ImageSource,
    config: JointConfig,
    *,
    checkpoint: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
    watch: Watch = UNWATCHED,
) -> dict[str, Any]:
    """Train a whole model: backbone.safetensors and prior.safetensors, metrics, pictures, resume state.

    `checkpoint`: the origin of the backbone's weights, for the record; None means from the seed. Where training
    diverges a second time, the model of the last state is written before DivergenceError is raised.
    """
    watch.require()
    inputs, start = network_inputs(backbone, train), start_record(checkpoint, backbone)
    run = Run(directory, asdict(config), inputs, resume=resume, overwrite=overwrite)
    board = watch.board(run)
    remember(directory, train, inputs["images"])
    train = with_kept_name(directory, train, inputs["images"])
    own, path = directory / "backbone.safetensors", directory / "prior.safetensors"

    def draw(shown: Mapping[str, Any], picture: Path) -> None:
        write_pictures(shown["prior"], test, picture, config.seed)

    def keep(prior: EBMPrior, _: str | None) -> None:
        prior.record["data"]["fingerprint"] = inputs["images"]  # by which `eval` knows them again
        save_backbone(prior.backbone, own, record={**prior.record, **start})
        save_prior(prior, path, checkpoint=own.name)  # beside it: wherever the run is, equal runs give equal bytes

    prior, seconds = timed(
        lambda: train_jointly(
            backbone,
            train,
            config,
            validation=test,
            run=board or run,
            progress=progress,
            on_evaluate=pictures(directory, draw, progress, board=board),
        ),
        keep,
        path,
    )
    count = parameters(prior.backbone, config.energy)
    return {
        "backbone": str(own),
        "prior": str(path),
        "parameters": count if config.prior == "ebm" else count | {"heads": 0, "ratio": 0.0},
        "validation": validate(prior, test, seed=config.seed),
        "iterations": prior.record["iterations"],
        "rollbacks": prior.record["rollbacks"],
        "cpu_seconds": seconds,
    }


@torch.no_grad()
def write_pictures(prior: EBMPrior, images: ImageSource, path: Path, seed: int) -> None:
    """A picture of a model in training: images, their reconstructions, samples of p_β and of p_α."""
    backbone = prior.backbone
    like = next(backbone.parameters())
    generator = torch.Generator(device=like.device).manual_seed(seed)
    real = images.batch(range(min(32, len(images)))).to(like.device, like.dtype)
    posterior = backbone.infer(backbone.observe(real, generator=generator), generator=generator)
    panels = [
        ("images", real),
        ("reconstructions", backbone.likelihood(posterior.features).mean),
        ("Gaussian prior", backbone.decode(backbone.sample(len(real), generator=generator)).mean),
        ("EBM prior", prior.sample(len(real), seed=seed).images),
    ]
    save_png(titled_grids([(title, p.cpu()) for title, p in panels], columns=8), path)
