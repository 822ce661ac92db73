"""The commands that train networks: pretrain, train, classifier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ebm_prior.cli import dry_run as dry
from ebm_prior.cli.help import Command
from ebm_prior.cli.options import SUITED, config_options
from ebm_prior.cli.preflight import for_pretrain
from ebm_prior.cli.progress import Bar
from ebm_prior.cli.shared import (
    CONFIG,
    DATA,
    JSON,
    NO_RATIOS,
    PLACES,
    PRESET_HELP,
    PRETRAIN_PLACE,
    RUN,
    RUN_SEED,
    TRAINING_PLACE,
    launched_processes,
    new_or_resumed,
    open_images,
    preflight,
    refuse_unused,
    run_directory,
    show_result,
    watch_options,
)
from ebm_prior.cli.types import PATH
from ebm_prior.errors import ConfigurationError
from ebm_prior.evaluation.classifier import ClassifierConfig, save_classifier, train_classifier
from ebm_prior.model.passes import Passes
from ebm_prior.reports import summaries
from ebm_prior.runs.backbones import new_backbone, new_network
from ebm_prior.runs.pretrain import pretrain_into
from ebm_prior.runs.train import train_into
from ebm_prior.runs.watch import Watch
from ebm_prior.settings import resolve
from ebm_prior.storage import places
from ebm_prior.storage.checkpoint import load_backbone
from ebm_prior.training.joint_config import JOINT_PRESETS, JointConfig
from ebm_prior.training.pretrain_config import PretrainConfig

START = click.option(
    "--ckpt",
    "checkpoint",
    help="Weights to start from: an official file or folder, a converted .safetensors file, or a bundled name",
)


@click.command(
    cls=Command,
    first=(
        "adapter_name",
        "architecture",
        "checkpoint",
        *PLACES,
        "iterations",
        "batch_size",
        "learning_rate",
        "seed",
        "device",
        "as_json",
    ),
)
@click.option("--backbone", "adapter_name", help="Name of the adapter to train; required without --ckpt")
@click.option(
    "--architecture", help="Bundled backbone, or JSON file of the adapter's arguments  [default: its own, if any]"
)
@START
@DATA
@RUN
@config_options(PretrainConfig)
@RUN_SEED
@PRETRAIN_PLACE
@watch_options()
@dry.DRY_RUN
@JSON
def pretrain(
    adapter_name: str | None,
    architecture: str | None,
    checkpoint: str | None,
    data: str,
    data_root: Path | None,
    download: bool,
    out: Path | None,
    overwrite: bool,
    resume: bool,
    config_file: Path | None,
    seed: int | None,
    passes: Passes,
    watch: Watch,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Train a hierarchical VAE by its ELBO, from scratch or from the weights of --ckpt."""
    new_or_resumed(resume, overwrite)
    config, processes = resolve(PretrainConfig(), given | {"seed": seed}, config_file), launched_processes()
    if given["parts"] is None and config.parts == 1:
        config = replace(config, parts=processes.count)
    if checkpoint is not None:
        if architecture is not None:
            raise click.UsageError("--ckpt brings its own architecture: leave out --architecture")
        backbone = load_backbone(adapter_name, checkpoint, device=passes.device, dtype=passes.dtype)
    elif adapter_name is not None:
        backbone = passes.place(new_backbone(adapter_name, architecture, config.seed))
    else:
        raise click.UsageError(
            "no network is named: pass --backbone to train a new one, or --ckpt to continue from trained weights"
        )
    train, test = (
        open_images(data, split=split, data_root=data_root, download=download, image_shape=backbone.image_shape)
        for split in ("train", "test")
    )
    need = for_pretrain(backbone, train, test, config, passes)
    if dry_run:
        return dry.pretrain(backbone, train, need, config, passes, out, as_json)
    preflight(need, passes.device)
    directory = processes.of_first(lambda: run_directory(out, "pretrain", resume))
    with Bar("pretrain", config.iterations) as bar:
        result = pretrain_into(
            directory,
            backbone,
            train,
            test,
            config,
            checkpoint=checkpoint,
            passes=passes,
            resume=resume,
            overwrite=overwrite,
            progress=bar,
            processes=processes,
            watch=watch,
        )
    show_result(result, as_json, summaries.pretrain_summary)


@click.command(
    cls=Command,
    first=(
        "adapter_name",
        "changes",
        "checkpoint",
        *PLACES,
        "posterior",
        "prior",
        "iterations",
        "seed",
        "device",
        "as_json",
    ),
)
@click.option("--backbone", "adapter_name", default="shallow", show_default=True, help="Name of the adapter to train")
@click.option("--architecture", help="Bundled backbone, or JSON file of the adapter's arguments")
@click.option(
    "--set",
    "changes",
    metavar="KEY=VALUE",
    multiple=True,
    help="Argument of the adapter with VALUE in JSON: width=16, latents=[16,8]; image_shape comes from the data",
)
@START
@DATA
@RUN
@click.option(
    "--preset", type=click.Choice(list(JOINT_PRESETS)), default="default", show_default=True, help=PRESET_HELP
)
@config_options(JointConfig, skip=("seed", "standardize", "by_group", "norm_limit"))
@NO_RATIOS
@RUN_SEED
@TRAINING_PLACE
@watch_options()
@dry.DRY_RUN
@JSON
def train(
    adapter_name: str,
    architecture: str | None,
    changes: tuple[str, ...],
    checkpoint: str | None,
    data: str,
    data_root: Path | None,
    download: bool,
    out: Path | None,
    overwrite: bool,
    resume: bool,
    config_file: Path | None,
    preset: str,
    seed: int | None,
    passes: Passes,
    watch: Watch,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Train a generator and its energy-based prior together, by maximum likelihood or variationally."""
    new_or_resumed(resume, overwrite)
    if bool(architecture) + bool(changes) + bool(checkpoint) > 1:
        raise click.UsageError("--architecture, --set and --ckpt each name the network: give one")
    config = resolve(JOINT_PRESETS[preset](), given | {"seed": seed}, config_file)
    ebm, langevin = config.prior == "ebm", config.posterior == "langevin"
    refuse_unused(
        given, ("energy_", "prior_chain", "chains", "refresh", "penalty"), ebm, "a Gaussian prior has no energy"
    )
    refuse_unused(given, ("posterior_chain", "bfloat16"), langevin, "only --posterior langevin has posterior chains")
    refuse_unused(given, ("space",), ebm or langevin, "these settings have no chains")
    refuse_unused(given, ("refresh",), config.chains == "persistent", "only --chains persistent has chains to refresh")
    refuse_unused(given, ("energy_dropout",), config.energy.joint > 0, "only the joint head has dropout")
    images, test = (open_images(data, split=s, data_root=data_root, download=download) for s in ("train", "test"))
    if checkpoint is not None:
        chosen = click.get_current_context().get_parameter_source("adapter_name")
        named = adapter_name if chosen is ParameterSource.COMMANDLINE else None
        backbone = load_backbone(named, checkpoint, device=passes.device, dtype=passes.dtype)
    else:
        backbone = passes.place(new_network(adapter_name, architecture, changes, images.shape, config.seed))
    if images.shape != backbone.image_shape:
        raise ConfigurationError(f"the network takes images {backbone.image_shape}, found {data} with {images.shape}")
    if dry_run:
        return dry.train(backbone, images, config, out, as_json)
    directory = run_directory(out, "train", resume)
    with Bar("train", config.iterations) as bar:
        result = train_into(
            directory,
            backbone,
            images,
            test,
            config,
            checkpoint=checkpoint,
            resume=resume,
            overwrite=overwrite,
            progress=bar,
            watch=watch,
        )
    show_result(result, as_json, summaries.train_summary)


@click.command()
@DATA
@click.option("--out", type=PATH, required=True, help="Safetensors file to write, with the suffix .safetensors")
@click.option("--overwrite", is_flag=True, help="Replace an existing file at --out")
@CONFIG
@config_options(ClassifierConfig, skip=("seed", "data"), wording=SUITED)
@RUN_SEED
def classifier(
    data: str,
    data_root: Path | None,
    download: bool,
    out: Path,
    overwrite: bool,
    config_file: Path | None,
    seed: int | None,
    **given: Any,
) -> None:
    """Train the classifier that gives the features of FD, on a labelled data set (for `eval --classifier`)."""
    places.require_free(out, overwrite)
    train, test = (open_images(data, split=s, data_root=data_root, download=download) for s in ("train", "test"))
    config = resolve(ClassifierConfig.suited(train.shape, Path(data).stem), given | {"seed": seed}, config_file)
    with Bar("classifier", 0) as bar:
        trained, accuracy = train_classifier(train, test, config, progress=bar)
    save_classifier(trained, out)
    click.echo(f"wrote {out}: test accuracy {accuracy:.4f}")
