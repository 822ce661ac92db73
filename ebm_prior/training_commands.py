"""The commands that train: fit, pretrain, train and what is built of it, classifier."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from ebm_prior import (
    ablations,
    anomaly_table,
    commands,
    joint_run,
    latents_2d,
    memory,
    pretrain_run,
    report,
    sources,
)
from ebm_prior.checkpoint import load_backbone
from ebm_prior.classifier import ClassifierConfig, save_classifier, train_classifier
from ebm_prior.command_line import (
    BACKBONE,
    DATA,
    DATA_ROOT,
    DEVICE,
    DTYPES,
    JSON,
    OWN_DATA,
    PASSES,
    PATH,
    RUN,
    RUN_SEED,
    SEED,
    TRAINING_DEVICE,
    launched_processes,
    new_or_resumed,
    preflight,
    refuse_unused,
    run_directory,
    show_result,
    torch_device,
)
from ebm_prior.data import open_images
from ebm_prior.errors import ConfigurationError
from ebm_prior.figures import save_png
from ebm_prior.files import without_nan, write_atomically
from ebm_prior.joint_config import JOINT_PRESETS, JointConfig
from ebm_prior.options import config_options, resolve
from ebm_prior.pretrain import PretrainConfig
from ebm_prior.progress import Bar
from ebm_prior.recipes import PRESETS, FitConfig

COLOUR = ClassifierConfig.suited((3, 32, 32))
SUITED = {
    entry.name: f"{{help}}  [default: {{default}}; for colour images {getattr(COLOUR, entry.name)}]"
    for entry in fields(ClassifierConfig)
    if getattr(COLOUR, entry.name) != getattr(ClassifierConfig(), entry.name)
}


@click.command()
@BACKBONE
@OWN_DATA
@RUN
@click.option(
    "--bn-readjust",
    is_flag=True,
    help="first re-adjust the backbone's batch norms to its own samples (NVAE, §5.2); it is kept beside the prior",
)
@click.option("--preset", type=click.Choice(list(PRESETS)), default="default", show_default=True, help="base settings")
@config_options(
    FitConfig,
    wording={"chain_": "mle: {help}  [default: {default}]", "sampler_": "{help}  [default: as the preset has it]"},
    also={"iterations": ["--max-steps"]},
)
@RUN_SEED
@PASSES
@DEVICE
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
    seed: int | None,
    device: str,
    checkpointing: bool,
    compiled: bool,
    dtype: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Train an energy-based prior on a frozen backbone (second stage)."""
    new_or_resumed(resume, overwrite)
    config, processes = resolve(PRESETS[preset](), given | {"seed": seed}, config_file), launched_processes()
    if given["parts"] is None and config.parts == 1:
        config = replace(config, parts=processes.count)
    mle, density = config.objective == "mle", config.regime == "calibrated"
    refuse_unused(given, ("chain", "refresh", "penalty"), mle, "only mle has chains and a penalty (--objective mle)")
    refuse_unused(given, ("patience", "ess_floor"), density, "a refiner is no density: it has no gain to wait for")
    refuse_unused(given, ("ratios",), config.objective == "nce", "ratios are of --objective nce")
    staged = config.ratios == "staged" or config.may_stage
    refuse_unused(given, ("stage_",), staged, "only --ratios staged and auto have stages")
    if bn_readjust and dtype == "bf16":
        raise click.UsageError("batch norms are re-adjusted in float32 or float64: leave out --precision bf16")
    backbone = load_backbone(adapter_name, checkpoint, device=torch_device(device), dtype=DTYPES[dtype])
    if data is None:
        data = sources.own_data(checkpoint, backbone)
        click.echo(f"images: {data}, which {checkpoint} was trained on (--data takes others)", err=True)
    images = open_images(data, data_root=data_root, download=download, image_shape=backbone.image_shape)
    preflight(memory.for_fit(backbone.checkpointing() if checkpointing else backbone, config), device)
    directory = processes.of_first(lambda: run_directory(out, "fit", resume))
    with Bar("fit", config.iterations) as bar:
        result = commands.fit_into(
            directory,
            backbone,
            images,
            config,
            checkpoint=checkpoint,
            bn_readjust=bn_readjust,
            checkpointing=checkpointing,
            compiled=compiled,
            resume=resume,
            overwrite=overwrite,
            on_step=bar.step,
            on_stage=bar.remark,
            processes=processes,
        )
    show_result(result, as_json, report.fit_summary)


@click.command()
@click.option("--backbone", "adapter_name", help="adapter to train (needed without --ckpt)")
@click.option(
    "--architecture", help="bundled backbone, or JSON file of the adapter's arguments  [default: its own, if any]"
)
@click.option("--ckpt", "checkpoint", help="start from these weights: official file or folder, own form, bundled name")
@DATA
@RUN
@config_options(PretrainConfig)
@RUN_SEED
@TRAINING_DEVICE
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
    device: str,
    dtype: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Train a hierarchical VAE by its ELBO (first stage), from scratch or from the weights of --ckpt."""
    new_or_resumed(resume, overwrite)
    config = resolve(PretrainConfig(), given | {"seed": seed}, config_file)
    if checkpoint is not None:
        if architecture is not None:
            raise click.UsageError("--ckpt has its own architecture: leave --architecture out")
        backbone = load_backbone(adapter_name, checkpoint, device=torch_device(device), dtype=DTYPES[dtype])
    elif adapter_name is not None:
        backbone = sources.new_backbone(adapter_name, architecture, config.seed).to(torch_device(device), DTYPES[dtype])
    else:
        raise click.UsageError("say what to train: --backbone, or --ckpt to go on from trained weights")
    train, test = (
        open_images(data, split=split, data_root=data_root, download=download, image_shape=backbone.image_shape)
        for split in ("train", "test")
    )
    directory = run_directory(out, "pretrain", resume)
    with Bar("pretrain", config.iterations) as bar:
        result = pretrain_run.pretrain_into(
            directory,
            backbone,
            train,
            test,
            config,
            checkpoint=checkpoint,
            resume=resume,
            overwrite=overwrite,
            on_step=bar.step,
        )
    show_result(result, as_json, report.pretrain_summary)


@click.command()
@click.option("--backbone", "adapter_name", default="shallow", show_default=True, help="adapter to train")
@click.option("--architecture", help="bundled backbone, or JSON file of the adapter's arguments")
@click.option(
    "--set",
    "changes",
    metavar="KEY=VALUE",
    multiple=True,
    help="an argument of the adapter, VALUE in JSON: width=16, latents=[16,8] (image_shape is the data's)",
)
@click.option("--ckpt", "checkpoint", help="start from these weights: official file or folder, own form, bundled name")
@DATA
@RUN
@click.option(
    "--preset", type=click.Choice(list(JOINT_PRESETS)), default="default", show_default=True, help="base settings"
)
@config_options(JointConfig, skip=("seed", "standardize"))
@RUN_SEED
@TRAINING_DEVICE
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
    device: str,
    dtype: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Train a whole model, generator and energy-based prior together (maximum likelihood or variational)."""
    new_or_resumed(resume, overwrite)
    if bool(architecture) + bool(changes) + bool(checkpoint) > 1:
        raise click.UsageError("--architecture, --set and --ckpt each say what network it is: give one")
    config = resolve(JOINT_PRESETS[preset](), given | {"seed": seed}, config_file)
    images, test = (open_images(data, split=s, data_root=data_root, download=download) for s in ("train", "test"))
    if checkpoint is not None:
        chosen = click.get_current_context().get_parameter_source("adapter_name")
        named = adapter_name if chosen is ParameterSource.COMMANDLINE else None
        backbone = load_backbone(named, checkpoint, device=torch_device(device), dtype=DTYPES[dtype])
    else:
        backbone = joint_run.new_network(adapter_name, architecture, changes, images.shape, config.seed)
        backbone = backbone.to(torch_device(device), DTYPES[dtype])
    if images.shape != backbone.image_shape:
        raise ConfigurationError(f"the network is of images {backbone.image_shape}, found {data} with {images.shape}")
    directory = run_directory(out, "train", resume)
    with Bar("train", config.iterations) as bar:
        result = joint_run.train_into(
            directory,
            backbone,
            images,
            test,
            config,
            checkpoint=checkpoint,
            resume=resume,
            overwrite=overwrite,
            on_step=bar.step,
        )
    show_result(result, as_json, report.train_summary)


@click.command("anomaly-table")
@click.option("--data", default="mnist", show_default=True, help="labelled data set: both splits are the pool")
@DATA_ROOT
@click.option(
    "--digit",
    "digits",
    type=int,
    multiple=True,
    help=f"held-out label, several times for several  [default: {' '.join(map(str, anomaly_table.DIGITS))}]",
)
@click.option(
    "--model",
    "models",
    type=click.Choice(list(anomaly_table.MODELS)),
    multiple=True,
    help="several times for several  [default: all]",
)
@click.option("--latents", type=(int, int), default=(16, 8), show_default=True, help="dimensions of z_1 and z_2")
@click.option("--width", type=click.IntRange(1), default=32, show_default=True, help="of the generator")
@click.option("--sigma", type=float, default=0.3, show_default=True, help="standard deviation of a pixel on [-1, 1]")
@click.option("--epochs", type=click.IntRange(1), default=16, show_default=True, help="of each training")
@click.option("--draws", type=click.IntRange(1), default=8, show_default=True, help="posterior draws of a score")
@click.option("--out", type=PATH, required=True, help="the .json file of rows to write")
@click.option("--overwrite", is_flag=True, help="replace --out")
@SEED
def anomalies(
    data: str,
    data_root: Path | None,
    download: bool,
    digits: tuple[int, ...],
    models: tuple[str, ...],
    out: Path,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Remake the paper's Table 4: train with one digit held out, and find it again by the un-normalised posterior."""
    commands.require_free(out, overwrite)
    pool = anomaly_table.pooled(
        [open_images(data, split=s, data_root=data_root, download=download) for s in ("train", "test")]
    )
    digits, models = digits or anomaly_table.DIGITS, models or tuple(anomaly_table.MODELS)
    rows: list[dict[str, Any]] = []
    with Bar("anomaly-table", len(digits) * len(models)) as bar:
        for digit in digits:
            rows += anomaly_table.run_digit(pool, digit, models=models, on_stage=bar.stage, **settings)
            write_atomically(out, json.dumps(without_nan(rows), indent=2).encode())
    click.echo(anomaly_table.as_table(rows))


@click.command()
@click.argument("name", type=click.Choice(list(ablations.ABLATIONS)))
@DATA
@click.option("--iterations", type=click.IntRange(1), default=2_000, show_default=True, help="of each training")
@click.option("--latents", type=(int, int), default=(32, 16), show_default=True, help="dimensions of z_1 and z_2")
@click.option("--width", type=click.IntRange(1), default=12, show_default=True, help="of the generator")
@click.option("--samples", type=click.IntRange(2), default=2_000, show_default=True, help="N of every distance")
@click.option("--classifier", type=PATH, help="feature classifier of FD  [default: the bundled one for such images]")
@click.option("--out", type=PATH, required=True, help="the .json file of rows to write")
@click.option("--overwrite", is_flag=True, help="replace --out")
@SEED
def ablation(
    name: str,
    data: str,
    data_root: Path | None,
    download: bool,
    classifier: Path | None,
    out: Path,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Remake an ablation of the paper by joint training: FD(classifier), seconds and parameters beside its numbers."""
    commands.require_free(out, overwrite)
    images, test = (open_images(data, split=s, data_root=data_root, download=download) for s in ("train", "test"))
    extractor = commands.feature_classifier(test, classifier, torch.device("cpu"))
    variants = ablations.ABLATIONS[name]
    with Bar(name, len(variants)) as bar:
        rows = ablations.ablate(variants, images, test, extractor, on_stage=bar.stage, **settings)
    write_atomically(out, json.dumps(without_nan(rows), indent=2).encode())
    click.echo(ablations.as_table(rows, extractor, images.name))


@click.command("latents-2d")
@click.option("--data", default="mnist", show_default=True, help="labelled data set")
@DATA_ROOT
@click.option(
    "--digit", "digits", type=int, multiple=True, default=(0, 1), show_default=True, help="labels, several times"
)
@click.option("--iterations", type=click.IntRange(1), default=2_000, show_default=True, help="gradient steps")
@click.option("--out", type=PATH, required=True, help="the .png to write")
@click.option("--overwrite", is_flag=True, help="replace --out")
@SEED
def two_dimensions(
    data: str,
    data_root: Path | None,
    download: bool,
    digits: tuple[int, ...],
    iterations: int,
    out: Path,
    overwrite: bool,
    seed: int,
) -> None:
    """Remake the paper's Fig. 2: two latents in each of two layers, posterior codes and the prior's chain."""
    commands.require_free(out, overwrite)
    images = latents_2d.with_labels(open_images(data, data_root=data_root, download=download), digits)
    config = latents_2d.config_2d(iterations=iterations, seed=seed)
    with Bar("latents-2d", iterations) as bar:
        prior = latents_2d.train_2d(images, config, on_step=bar.step)
    save_png(latents_2d.picture_2d(latents_2d.transition(prior, images, config.prior_chain, seed=seed)), out)
    click.echo(f"wrote {out}")


@click.command()
@DATA
@click.option("--out", type=PATH, required=True, help="the .safetensors file to write")
@click.option("--overwrite", is_flag=True, help="replace --out")
@config_options(ClassifierConfig, skip=("seed", "data"), wording=SUITED)
@SEED
def classifier(
    data: str, data_root: Path | None, download: bool, out: Path, overwrite: bool, seed: int, **given: Any
) -> None:
    """Train the classifier whose features FD compares, on a labelled data set (for `eval --classifier`)."""
    commands.require_free(out, overwrite)
    train, test = (open_images(data, split=s, data_root=data_root, download=download) for s in ("train", "test"))
    config = replace(resolve(ClassifierConfig.suited(train.shape, Path(data).stem), given), seed=seed)
    with Bar("classifier", 0) as bar:
        trained, accuracy = train_classifier(train, test, config, on_step=bar.step)
    save_classifier(trained, out)
    click.echo(f"wrote {out}: test accuracy {accuracy:.4f}")
