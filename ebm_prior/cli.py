"""The command line: `ebm-prior COMMAND`. The commands that train, that read a prior,
and that remake experiments have a module each.

Results go to stdout (`--json` for machines), progress and remarks to stderr.
Exit codes: 0 done, 1 a stated error, 2 usage, 3 diverged.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

import ebm_prior
from ebm_prior import (
    commands,
    experiment_commands,
    findings,
    reading_commands,
    report,
    run_report,
    sources,
    training_commands,
)
from ebm_prior.allocator import keep_freed_memory
from ebm_prior.checkpoint import load_backbone, prior_record, save_backbone
from ebm_prior.command_line import (
    BACKBONE,
    DEVICE,
    DTYPES,
    JSON,
    OWN_DATA,
    PATH,
    SEED,
    SHARED,
    Group,
    show_result,
    silence,
    torch_device,
)
from ebm_prior.data import open_images
from ebm_prior.demo import demo_config, require_demo_folder, run_demo
from ebm_prior.doctor import DoctorConfig, examine
from ebm_prior.errors import ConfigurationError
from ebm_prior.files import write_atomically
from ebm_prior.options import config_options, resolve
from ebm_prior.parallel import launched
from ebm_prior.progress import Bar


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(ebm_prior.__version__)
def main() -> None:
    """Better samples and scores from a pretrained hierarchical VAE, by an energy-based prior trained on top of it.

    Start with `ebm-prior demo`. With a backbone of your own: `fit`, then `sample` and `eval`, which several processes
    share: torchrun --nproc-per-node 2 -m ebm_prior fit …
    """
    keep_freed_memory()
    context = click.get_current_context()
    processes = context.obj = context.with_resource(launched())
    if processes.count > 1 and context.invoked_subcommand not in SHARED:
        raise ConfigurationError(
            f"several processes share {', '.join(SHARED)}; {context.invoked_subcommand} runs in one: leave out torchrun"
        )
    if not processes.first:
        context.with_resource(silence())


@main.command("report")
@click.argument("run", type=PATH)
@click.option("--eval", "evaluation", type=PATH, help="JSON of eval  [default: eval.json in RUN]")
@click.option("--ood", "outlying", type=PATH, help="JSON of ood  [default: ood.json, else the last ood-*/ in RUN]")
@click.option("--doctor", "diagnosis", type=PATH, help="JSON of doctor  [default: doctor.json in RUN]")
@click.option("--out", type=PATH, help="the .html  [default: report.html in RUN]")
@click.option("--overwrite", is_flag=True, help="replace what is at --out")
def run_page(
    run: Path,
    evaluation: Path | None,
    outlying: Path | None,
    diagnosis: Path | None,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Make one HTML page of a fit, for any browser and without a network: pictures, curves, tables, commands.

    RUN is the folder of a fit. What is missing in it (eval, ood, doctor) the page says how to make.
    """
    out = out or run / "report.html"
    given = {"eval": evaluation, "ood": outlying, "doctor": diagnosis}
    page = run_report.run_page(run, given)
    commands.require_free(out, overwrite)
    write_atomically(out, page.encode())
    click.echo(f"wrote {out}")


@main.command()
@BACKBONE
@OWN_DATA
@config_options(DoctorConfig, skip=("seed", "energy"))
@SEED
@DEVICE
@JSON
def doctor(
    adapter_name: str | None,
    checkpoint: str,
    data: str | None,
    data_root: Path | None,
    download: bool,
    seed: int,
    device: str,
    dtype: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Say whether a VAE has a prior hole that an energy can fill, and in which groups."""
    config = resolve(DoctorConfig(), given)
    config = replace(config, seed=seed, gauge=replace(config.gauge, seed=seed))
    backbone = load_backbone(adapter_name, checkpoint, device=torch_device(device), dtype=DTYPES[dtype])
    data = data or sources.own_data(checkpoint, backbone)
    images = open_images(data, split="test", data_root=data_root, download=download, image_shape=backbone.image_shape)
    with Bar("doctor", 3) as bar:
        result = examine(backbone, images, config, on_stage=bar.stage)
    show_result(result, as_json, findings.doctor_card)


@main.command()
@click.argument("prior", type=PATH, required=False)
@click.option("--backbone", "adapter_name", help="adapter that reads --ckpt")
@click.option("--ckpt", "checkpoint", help="a backbone instead of a prior: official, own form, or bundled name")
@JSON
def info(prior: Path | None, adapter_name: str | None, checkpoint: str | None, as_json: bool) -> None:
    """Say what a prior file or a backbone is: groups, parameters, how it was trained."""
    if (prior is None) == (checkpoint is None):
        raise click.UsageError("give either a prior file or --ckpt")
    if prior is not None:
        show_result(prior_record(prior) | {"heads": commands.head_parameters(prior)}, as_json, report.prior_card)
        return
    backbone = load_backbone(adapter_name, str(checkpoint))
    described = commands.describe_backbone(backbone, sources.own_record(str(checkpoint), backbone))
    show_result(described, as_json, report.backbone_card)


@main.command()
@BACKBONE
@click.option("--out", type=PATH, required=True, help="the .safetensors file to write")
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="of the weights in the file",
)
@click.option(
    "--set",
    "changes",
    metavar="KEY=VALUE",
    multiple=True,
    help="change an option of the architecture that holds no weights, VALUE in JSON; VAEBM's Gaussian decoders: "
    "log_std_floor=-2",
)
@click.option("--overwrite", is_flag=True, help="replace --out")
def convert(
    adapter_name: str | None, checkpoint: str, out: Path, precision: str, changes: tuple[str, ...], overwrite: bool
) -> None:
    """Write a backbone in ebm-prior's own form, one safetensors file that every command takes as --ckpt."""
    options = sources.parsed_options(changes)
    if out.suffix != ".safetensors":
        raise ConfigurationError(f"--out must end in .safetensors, by which its form is known; found {out}")
    commands.require_free(out, overwrite)
    backbone = load_backbone(adapter_name, checkpoint)
    record = {**sources.source_record(checkpoint, backbone), "stage": "convert"}
    if options:
        backbone = sources.with_options(backbone, options)
        record["set"] = record.get("set", {}) | options
    save_backbone(backbone, out, dtype=getattr(torch, precision), record=record)
    click.echo(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB)")


@main.command()
@click.option("--out", type=PATH, default=Path("ebm-prior-demo"), show_default=True, help="where results are written")
@click.option("--overwrite", is_flag=True, help="write into --out though it holds something else than a demo")
@SEED
@JSON
def demo(out: Path, overwrite: bool, seed: int, as_json: bool) -> None:
    """Fit a prior to the bundled HVAE and show samples before and after. Offline, a few minutes on two cores."""
    require_demo_folder(out, overwrite)
    with Bar("demo", demo_config().iterations) as bar:
        result = run_demo(out, seed=seed, overwrite=overwrite, on_step=bar.step, on_stage=bar.remark)
    show_result(result, as_json, findings.demo_summary)


@main.command()
@JSON
def backbones(as_json: bool) -> None:
    """List the adapters that are installed, and the trained backbones that come with the package."""
    show_result(commands.list_backbones(), as_json, report.backbone_list)


for command in (
    training_commands.fit,
    reading_commands.sample,
    reading_commands.evaluate,
    reading_commands.ood,
    reading_commands.anomaly,
    reading_commands.show,
    training_commands.pretrain,
    training_commands.train,
    experiment_commands.anomalies,
    experiment_commands.ablation,
    experiment_commands.two_dimensions,
    training_commands.classifier,
):
    main.add_command(command)
