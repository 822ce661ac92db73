"""The commands that look at runs, priors and backbones: report, doctor, info, convert, export, demo, backbones."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from ebm_prior.cli.help import Command
from ebm_prior.cli.images import Opener
from ebm_prior.cli.options import config_options
from ebm_prior.cli.progress import Bar
from ebm_prior.cli.shared import BACKBONE, CONFIG, JSON, PLACE, RUN_SEED, SEED, data_or, show_result
from ebm_prior.cli.types import PATH, PRIOR_FILE
from ebm_prior.errors import ConfigurationError, few
from ebm_prior.evaluation.doctor import DoctorConfig, examine, parts
from ebm_prior.model.passes import Passes
from ebm_prior.reports import findings, summaries
from ebm_prior.reports.run_page import run_page
from ebm_prior.runs import describe
from ebm_prior.runs.backbones import load_with_options, own_data, own_record, parsed_options, source_record
from ebm_prior.runs.data import of_backbone
from ebm_prior.runs.demo import demo_config, require_demo_folder, run_demo
from ebm_prior.runs.export import export_prior
from ebm_prior.settings import resolve
from ebm_prior.storage import places
from ebm_prior.storage.atomic import write_atomically
from ebm_prior.storage.checkpoint import load_backbone, prior_record, save_backbone


@click.command()
@click.argument("run", type=PATH)
@click.option("--eval", "evaluation", type=PATH, help="JSON file with the results of eval  [default: eval.json in RUN]")
@click.option(
    "--ood",
    "outlying",
    type=PATH,
    help="JSON file with the results of ood  [default: ood.json, else the last ood-*/ in RUN]",
)
@click.option(
    "--doctor", "diagnosis", type=PATH, help="JSON file with the results of doctor  [default: doctor.json in RUN]"
)
@click.option("--out", type=PATH, help="HTML file to write  [default: report.html in RUN]")
@click.option("--overwrite", is_flag=True, help="Replace what exists at --out")
def report(
    run: Path,
    evaluation: Path | None,
    outlying: Path | None,
    diagnosis: Path | None,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Make one HTML page of a fit, for any browser and without a network: pictures, curves, tables, commands.

    RUN is the folder of a fit. Where results of eval, ood or doctor are missing, the page shows how to make them.
    """
    out = out or run / "report.html"
    given = {"eval": evaluation, "ood": outlying, "doctor": diagnosis}
    page = run_page(run, given)
    places.require_free(out, overwrite)
    write_atomically(out, page.encode())
    click.echo(f"wrote {out}")


@click.command(
    cls=Command, first=("adapter_name", "checkpoint", "data", "data_root", "samples", "seed", "device", "as_json")
)
@BACKBONE
@data_or("held-out images of the data that the backbone was trained on")
@CONFIG
@config_options(DoctorConfig, skip=("seed", "energy"))
@RUN_SEED
@PLACE
@JSON
def doctor(
    adapter_name: str | None,
    checkpoint: str,
    data: str | None,
    data_root: Path | None,
    download: bool,
    config_file: Path | None,
    seed: int | None,
    passes: Passes,
    as_json: bool,
    **given: Any,
) -> None:
    """Say whether a VAE has a prior hole that an energy can fill, and in which groups."""
    config = resolve(DoctorConfig(), given | {"seed": seed}, config_file)
    config = replace(config, gauge=replace(config.gauge, seed=config.seed))
    backbone = load_backbone(adapter_name, checkpoint, device=passes.device, dtype=passes.dtype)
    shape, opener = backbone.image_shape, Opener(data_root, download, of_backbone(checkpoint, backbone))
    if data is not None:
        images = opener.typed(data, split="test", image_shape=shape)
    else:
        (images,) = opener.own("test", otherwise=partial(own_data, checkpoint, backbone), shape=shape)
    with Bar("doctor", parts(len(backbone.groups), config)) as bar:
        result = examine(backbone, images, config, progress=bar)
    show_result(result, as_json, findings.doctor_card)


@click.command()
@click.argument("prior", type=PRIOR_FILE, required=False)
@click.option("--backbone", "adapter_name", help="Name of the adapter that reads --ckpt")
@click.option(
    "--ckpt",
    "checkpoint",
    help="Backbone to describe instead of a prior: an official file or folder, a converted .safetensors file, or a "
    "bundled name",
)
@JSON
def info(prior: Path | None, adapter_name: str | None, checkpoint: str | None, as_json: bool) -> None:
    """Describe a prior file or a backbone: groups, parameters, how it was trained."""
    if (prior is None) == (checkpoint is None):
        raise click.UsageError("say what to describe: give either a prior file or --ckpt, not both")
    if prior is not None:
        show_result(prior_record(prior) | {"heads": describe.head_parameters(prior)}, as_json, summaries.prior_card)
        return
    backbone = load_backbone(adapter_name, str(checkpoint))
    described = describe.describe_backbone(backbone, own_record(str(checkpoint), backbone))
    show_result(described, as_json, summaries.backbone_card)


@click.command()
@BACKBONE
@click.option("--out", type=PATH, required=True, help="Safetensors file to write, with the suffix .safetensors")
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Precision of the weights in the written file",
)
@click.option(
    "--set",
    "changes",
    metavar="KEY=VALUE",
    multiple=True,
    help="Adapter option with VALUE in JSON: something that an official file leaves open (weights=ema, "
    "image_shape=[3,64,64], likelihood=bernoulli), or a setting without weights (log_std_floor=-2 for VAEBM)",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file at --out")
def convert(
    adapter_name: str | None, checkpoint: str, out: Path, precision: str, changes: tuple[str, ...], overwrite: bool
) -> None:
    """Write a backbone in ebm-prior's own form, one safetensors file that every command takes as --ckpt."""
    options = parsed_options(changes)
    if out.suffix != ".safetensors":
        raise ConfigurationError(f"--out must end in .safetensors, which names its form to all commands; found {out}")
    places.require_free(out, overwrite)
    backbone = load_with_options(adapter_name, checkpoint, options)
    record = {**source_record(checkpoint, backbone), "stage": "convert"}
    if options:
        earlier = record.get("set")
        record["set"] = {**(earlier if isinstance(earlier, dict) else {}), **options}
    save_backbone(backbone, out, dtype=getattr(torch, precision), record=record)
    click.echo(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB)")


@click.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder to create, or .zip file to write with the same content")
@click.option("--with-backbone", is_flag=True, help="Add the backbone, so that the export works without any other file")
@click.option("--ckpt", "checkpoint", help="Path of the backbone that --with-backbone adds, if it has moved")
@click.option(
    "--licence", "--license", "licence", help="Licence of the exported files, written on the card: mit, cc-by-4.0, …"
)
@click.option("--overwrite", is_flag=True, help="Replace what exists at --out")
def export(
    run: Path, out: Path, with_backbone: bool, checkpoint: str | None, licence: str | None, overwrite: bool
) -> None:
    """Write a prior with a model card, to share or to publish, and on request with its backbone.

    RUN is the folder of a fit, or a prior file. The folder can be moved, and pushed to a model hub as it is.
    """
    if checkpoint is not None and not with_backbone:
        raise click.UsageError(
            "--ckpt is the path of the backbone that --with-backbone adds: give both, or leave out --ckpt"
        )
    written = export_prior(
        run, out, with_backbone=with_backbone, checkpoint=checkpoint, licence=licence, overwrite=overwrite
    )
    click.echo(f"wrote {out}: {few(written)}")


@click.command()
@click.option("--out", type=PATH, default=Path("ebm-prior-demo"), show_default=True, help="Folder for the results")
@click.option("--overwrite", is_flag=True, help="Write into --out even if it holds files that no demo has written")
@SEED
@JSON
def demo(out: Path, overwrite: bool, seed: int, as_json: bool) -> None:
    """Fit a prior to the bundled BIVA and show samples before and after. Offline, a few minutes on two cores."""
    require_demo_folder(out, overwrite)
    with Bar("demo", demo_config().iterations) as bar:
        result = run_demo(out, seed=seed, overwrite=overwrite, progress=bar)
    show_result(result, as_json, findings.demo_summary)


@click.command()
@JSON
def backbones(as_json: bool) -> None:
    """List adapters, bundled backbones and bundled priors."""
    show_result(describe.list_backbones(), as_json, summaries.backbone_list)
