"""The command that bounds likelihoods: likelihood."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ebm_prior.cli.help import Command
from ebm_prior.cli.images import Opener
from ebm_prior.cli.options import config_options
from ebm_prior.cli.progress import Bar
from ebm_prior.cli.shared import CONFIG, JSON, PLACE, PRIOR, RUN_SEED, data_or, show_result
from ebm_prior.evaluation.likelihood import LikelihoodConfig, measure_likelihood
from ebm_prior.model.passes import Passes
from ebm_prior.reports.likelihood import likelihood_text
from ebm_prior.runs import backbones
from ebm_prior.runs.data import of_prior
from ebm_prior.settings import resolve
from ebm_prior.storage.checkpoint import load_prior, prior_record


@click.command(
    cls=Command,
    first=("data", "data_root", "samples", "draws", "annealing_chains", "annealing_ess", "seed", "device", "as_json"),
)
@PRIOR
@data_or("held-out images of the data that the prior was trained on")
@CONFIG
@config_options(LikelihoodConfig)
@RUN_SEED
@PLACE
@JSON
def likelihood(
    prior: Path,
    checkpoint: str | None,
    force: bool,
    data: str | None,
    data_root: Path | None,
    download: bool,
    config_file: Path | None,
    seed: int | None,
    passes: Passes,
    as_json: bool,
    **given: Any,
) -> None:
    """Bound log Z from both sides, and log p(x) from below, with f and without.

    The images are held-out ones. Where the bounds on log Z differ by more than half a nat, or their chains have not
    settled, the result says so.
    """
    config = resolve(LikelihoodConfig(), given | {"seed": seed}, config_file)
    loaded = load_prior(prior, checkpoint=checkpoint, force=force, device=passes.device, dtype=passes.dtype)
    shape, opener = loaded.backbone.image_shape, Opener(data_root, download, of_prior(prior))
    if data is not None:
        images = opener.typed(data, split="test", image_shape=shape)
    else:
        named = partial(backbones.named_data, prior_record(prior)["record"], str(prior))
        images = opener.held_out(otherwise=named, shape=shape)[0]
    loaded.backbone = passes.apply(loaded.backbone)
    with Bar("likelihood", 0) as bar:
        result = measure_likelihood(loaded, images, config, progress=bar)
    show_result(result | {"prior": str(prior)}, as_json, likelihood_text)
