"""The command that trains a prior on a frozen network: fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from ebm_prior.cli import dry_run as dry
from ebm_prior.cli.help import Command
from ebm_prior.cli.images import Opener
from ebm_prior.cli.options import config_options
from ebm_prior.cli.preflight import for_fit
from ebm_prior.cli.progress import Bar
from ebm_prior.cli.shared import (
    BACKBONE,
    JSON,
    PASSES,
    PLACES,
    PRESET_HELP,
    RUN,
    RUN_SEED,
    data_or,
    launched_processes,
    new_or_resumed,
    preflight,
    refuse_unused,
    run_directory,
    show_result,
    watch_options,
)
from ebm_prior.model.passes import Passes
from ebm_prior.reports import summaries
from ebm_prior.runs.backbones import own_data
from ebm_prior.runs.data import of_backbone, remembered
from ebm_prior.runs.fit import fit_into, named_energy
from ebm_prior.runs.watch import Watch
from ebm_prior.settings import resolve
from ebm_prior.storage.checkpoint import load_backbone
from ebm_prior.testing.contract import check_foreign
from ebm_prior.training.fit_config import PRESETS, FitConfig

HEADS = tuple(f"energy_{name}" for name in ("channels", "hidden", "vector_layers", "joint", "activation", "dropout"))
UNGROUPED = ("energy_conditional", "energy_dropout")


@click.command(
    cls=Command,
    first=(
        "adapter_name",
        "checkpoint",
        *PLACES,
        "preset",
        "iterations",
        "refine",
        "objective",
        "seed",
        "device",
        "as_json",
    ),
)
@BACKBONE
@data_or("what the backbone was trained on")
@RUN
@click.option(
    "--bn-readjust",
    is_flag=True,
    help="Recompute NVAE's batch-norm statistics from its own samples before fitting (§5.2); the changed backbone is "
    "saved in the run folder",
)
@click.option("--preset", type=click.Choice(list(PRESETS)), default="default", show_default=True, help=PRESET_HELP)
@click.option(
    "--energy", help="Energy of your own in place of the heads: its name among the entry points ebm_prior.energies"
)
@config_options(
    FitConfig,
    skip=("seed", "by_group"),
    wording={
        "chain_": "{help} (only with --objective mle)  [default: {default}]",
        "sampler_": "{help}  [default: as the preset has it]",
        "refine": "{help}  [default: where one ratio saturates, as long as the stages]",
    },
    also={"iterations": ["--max-steps"]},
)
@RUN_SEED
@PASSES
@watch_options(preview=True)
@dry.DRY_RUN
@JSON
def fit(
    adapter_name: str | None,
    checkpoint: str,
    data: str | None,
    data_root: Path | None,
    download: bool,
    out: Path | None,
    overwrite: bool,
    resume: bool,
    config_file: Path | None,
    bn_readjust: bool,
    preset: str,
    energy: str | None,
    seed: int | None,
    passes: Passes,
    watch: Watch,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Train an energy-based prior on a frozen, pretrained VAE."""
    new_or_resumed(resume, overwrite)
    config, processes = resolve(PRESETS[preset](), given | {"seed": seed}, config_file), launched_processes()
    if given["parts"] is None and config.parts == 1:
        config = replace(config, parts=processes.count)
    _refuse_unused_settings(config, given, energy)
    if bn_readjust and passes.dtype == torch.bfloat16:
        raise click.UsageError("--bn-readjust computes in float32 or float64: leave out --precision bf16")
    backbone = load_backbone(adapter_name, checkpoint, device=passes.device, dtype=passes.dtype)
    memory = processes.of_first(
        lambda: (remembered(out) if resume and out is not None else None) or of_backbone(checkpoint, backbone)
    )
    images = Opener(data_root, download, memory).training(
        data, otherwise=partial(own_data, checkpoint, backbone), shape=backbone.image_shape
    )
    check_foreign(backbone, images)
    if dry_run:
        return dry.fit(backbone, images, config, passes, out, as_json)
    own = None if energy is None else named_energy(energy, backbone, config.seed)
    preflight(for_fit(backbone, config, len(images), passes, own), passes.device)
    directory = processes.of_first(lambda: run_directory(out, "fit", resume))
    with Bar("fit", config.iterations) as bar:
        result = fit_into(
            directory,
            backbone,
            images,
            config,
            checkpoint=checkpoint,
            bn_readjust=bn_readjust,
            energy=energy,
            passes=passes,
            resume=resume,
            overwrite=overwrite,
            progress=bar,
            processes=processes,
            watch=watch,
        )
    show_result(result, as_json, summaries.fit_summary)


def _refuse_unused_settings(config: FitConfig, given: Mapping[str, Any], energy: str | None) -> None:
    """Refuse options of `fit` that have no effect under these settings."""
    mle, density = config.objective == "mle", config.regime == "calibrated"
    refuse_unused(given, ("chain", "refresh", "penalty"), mle, "only mle has chains and a penalty (--objective mle)")
    refiner = "only a refiner refuses chains or chooses steps"
    refuse_unused(given, ("refuse", "choose_steps"), mle and not density, refiner)
    refuse_unused(
        given, ("patience", "ess_floor"), density, "only a calibrated prior has a held-out gain, and a refiner is none"
    )
    refuse_unused(given, ("ratios", "noise_weight"), not mle, "only --objective nce learns density ratios")
    stages = {key: value for key, value in given.items() if key != "stage_bound" or config.ratios != "groupwise"}
    refuse_unused(
        stages, ("stage_",), "groupwise" != config.ratios != "one", "only --ratios staged and auto have stages"
    )
    refuse_unused(given, UNGROUPED, config.ratios != "groupwise", "--ratios groupwise has heads of its own kind")
    refuse_unused(given, HEADS, energy is None, "--energy replaces the heads by an energy without heads")
