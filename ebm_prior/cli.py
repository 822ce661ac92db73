"""The command line: `ebm-prior COMMAND`. The only place with click and exit codes.

Results go to stdout (`--json` for machines), progress and remarks to stderr.
Exit codes: 0 done, 1 a stated error, 2 usage, 3 diverged.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from click.core import ParameterSource

import ebm_prior
from ebm_prior import (
    ablations,
    anomaly_table,
    commands,
    joint_run,
    latents_2d,
    memory,
    outliers,
    report,
    run_report,
    sources,
)
from ebm_prior.allocator import keep_freed_memory
from ebm_prior.checkpoint import load_backbone, load_prior, prior_record, save_backbone
from ebm_prior.classifier import ClassifierConfig, save_classifier, train_classifier
from ebm_prior.data import open_images
from ebm_prior.demo import demo_config, require_demo_folder, run_demo
from ebm_prior.doctor import DoctorConfig, examine
from ebm_prior.errors import ConfigurationError, DivergenceError, EbmPriorError
from ebm_prior.evaluate import EvalConfig
from ebm_prior.fid import amount, published
from ebm_prior.figures import save_png
from ebm_prior.files import without_nan, write_atomically
from ebm_prior.inception import MODES, load_inception
from ebm_prior.inception import Mode as InceptionMode
from ebm_prior.joint_config import JOINT_PRESETS, JointConfig
from ebm_prior.options import config_options, resolve
from ebm_prior.parallel import ALONE, Processes, launched, own_device
from ebm_prior.pretrain import PretrainConfig
from ebm_prior.progress import Bar
from ebm_prior.recipes import PRESETS, FitConfig
from ebm_prior.samplers import SamplerConfig
from ebm_prior.scores import Lower, Mode
from ebm_prior.show import LONG_RUN, PICTURES, WITH_CHAINS, WITH_IMAGES, draw_picture

Command = TypeVar("Command", bound=Callable[..., Any])
PATH = click.Path(exists=False, path_type=Path)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.bfloat16}
COLOUR = ClassifierConfig.suited((3, 32, 32))
SUITED = {
    entry.name: f"{{help}}  [default: {{default}}; for colour images {getattr(COLOUR, entry.name)}]"
    for entry in fields(ClassifierConfig)
    if getattr(COLOUR, entry.name) != getattr(ClassifierConfig(), entry.name)
}
WORDS = "ebm_prior.words"  # of the command, in click's context
SHARED = ("fit", "sample", "eval")  # what several processes of torchrun can do together
RECORDED = "{help}  [default: as recorded]"


def together(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options under one name, so that they mean the same everywhere."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _device_options(*dtypes: str) -> Callable[[Command], Command]:
    half = "; bf16: in the cells of an NVAE, all else in float32" if "bf16" in dtypes else ""
    return together(
        click.option("--device", default="cpu", show_default=True, help="torch device, e.g. cuda"),
        click.option(
            "--precision",
            "dtype",
            type=click.Choice(dtypes),
            default="float32",
            show_default=True,
            help=f"of computation{half}",
        ),
    )


DEVICE = _device_options(*DTYPES)
TRAINING_DEVICE = _device_options("float32", "float64")
CHECKPOINTING = click.option(
    "--checkpointing",
    is_flag=True,
    help="in the cells of an NVAE, keep less for the backward pass and compute it again: less memory, the same results",
)
SEED = click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="seed of everything random")
RUN_SEED = click.option("--seed", type=click.IntRange(0), help="seed of everything random  [default: 0, or --config's]")
JSON = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
BACKBONE = together(
    click.option(
        "--backbone", "adapter_name", help="adapter that reads the checkpoint (ebm-prior backbones lists them)"
    ),
    click.option(
        "--ckpt", "checkpoint", required=True, help="backbone: official file or folder, own form, or bundled name"
    ),
)
DATA_ROOT = together(
    click.option(
        "--data-root", type=PATH, help="where named data sets lie  [default: $EBM_PRIOR_DATA, else user cache]"
    ),
    click.option("--download", is_flag=True, help="fetch a named data set if it is not there"),
)
DATA_FORMS = "folder of images, .npz, .npy, idx file or data set name"
DATA = together(click.option("--data", required=True, help=DATA_FORMS), DATA_ROOT)
OWN_DATA = together(
    click.option("--data", help=f"{DATA_FORMS}  [default: what the backbone or prior was trained on]"),
    DATA_ROOT,
)
RUN = together(
    click.option("--out", type=PATH, help="run directory  [default: the next free one under ./runs]"),
    click.option("--overwrite", is_flag=True, help="start anew where an earlier run lies"),
    click.option("--resume", is_flag=True, help="go on from the last state of the run in --out, if there is one"),
    click.option("--config", "config_file", type=PATH, help="JSON file of settings; options given here win"),
)


PRIOR = together(
    click.argument("prior", type=PATH),
    click.option("--ckpt", "checkpoint", help="where the backbone is, if it has moved"),
    click.option("--force", is_flag=True, help="use a backbone with other weights than the prior was trained on"),
)
RESULTS = together(
    click.option("--to", type=PATH, help="folder of the results  [default: the next free one beside PRIOR]"),
    click.option("--overwrite", is_flag=True, help="replace the results that lie in --to"),
)


class _Group(click.Group):
    """Turns errors into one line on stderr and their exit code, and remembers the command for its result."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        words = list(args)
        context = super().make_context(info_name, args, parent, **extra)
        context.meta[WORDS] = words
        return context

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DivergenceError as error:
            _complain(f"diverged: {error}")
            ctx.exit(3)
        except EbmPriorError as error:
            _complain(f"error: {error}")
            ctx.exit(1)
        except OSError as error:  # a disk or path of which no command has more to say
            if error.errno == errno.EPIPE:  # whoever read stdout has had enough, of which click says nothing
                raise
            _complain(f"error: {error}")
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
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
        context.with_resource(_silence())


@main.command()
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
@CHECKPOINTING
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
    dtype: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Train an energy-based prior on a frozen backbone (second stage)."""
    _new_or_resumed(resume, overwrite)
    sampler = {key.removeprefix("sampler_"): given.pop(key) for key in list(given) if key.startswith("sampler_")}
    config, processes = resolve(PRESETS[preset](), given | {"seed": seed}, config_file), _processes()
    if given["parts"] is None and config.parts == 1:
        config = replace(config, parts=processes.count)
    chains = config.objective == "mle" or config.ratios == "auto"  # which turns to them where one ratio saturates
    _unused(given, ("chain", "refresh", "penalty"), chains, "only mle has chains and a penalty (--objective mle)")
    _unused(given, ("ratios",), config.objective == "nce", "ratios are of --objective nce")
    _unused(given, ("stage_",), config.ratios == "staged", "only --ratios staged has stages")
    if any(value is not None for value in sampler.values()):
        config = replace(config, sampler=resolve(config.recorded_sampler, sampler))
    if bn_readjust and dtype == "bf16":
        raise click.UsageError("batch norms are re-adjusted in float32 or float64: leave out --precision bf16")
    backbone = load_backbone(adapter_name, checkpoint, device=_device(device), dtype=DTYPES[dtype])
    if data is None:
        data = sources.own_data(checkpoint, backbone)
        click.echo(f"images: {data}, which {checkpoint} was trained on (--data takes others)", err=True)
    images = open_images(data, data_root=data_root, download=download, image_shape=backbone.image_shape)
    _preflight(memory.for_fit(backbone.checkpointing() if checkpointing else backbone, config), device)
    directory = processes.of_first(lambda: commands.run_directory(out, "fit", resume=resume))
    with Bar("fit", config.iterations) as bar:
        result = commands.fit_into(
            directory,
            backbone,
            images,
            config,
            checkpoint=checkpoint,
            bn_readjust=bn_readjust,
            checkpointing=checkpointing,
            resume=resume,
            overwrite=overwrite,
            on_step=bar.step,
            on_stage=bar.remark,
            processes=processes,
        )
    _show(result, as_json, report.fit_summary)


@main.command()
@click.argument("prior", type=PATH, required=False)
@click.option("-n", "--number", type=click.IntRange(1), default=64, show_default=True, help="how many samples")
@click.option(
    "--out",
    type=PATH,
    help=".png: a grid; .npz: arrays; without suffix: a folder of PNG files  [default: the next free drawn-001.png, "
    "drawn-002.png, … beside PRIOR]",
)
@click.option("--compare", is_flag=True, help="in the grid, show the backbone's own samples beside them")
@click.option("--overwrite", is_flag=True, help="replace what is at --out")
@click.option("--ckpt", "checkpoint", help="where the backbone is, if it has moved")
@click.option("--force", is_flag=True, help="use a backbone with other weights than the prior was trained on")
@click.option(
    "--chunk",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="samples at a time, rounded to blocks of 64; changes no result",
)
@config_options(SamplerConfig, wording={"": RECORDED})
@SEED
@CHECKPOINTING
@DEVICE
@JSON
def sample(
    prior: Path | None,
    number: int,
    out: Path | None,
    compare: bool,
    overwrite: bool,
    checkpoint: str | None,
    force: bool,
    chunk: int,
    seed: int,
    device: str,
    checkpointing: bool,
    dtype: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Draw images from a prior file, by the sampler recorded in it unless options say otherwise.

    Without PRIOR it is the newest one under ./runs.
    """
    processes = _processes()
    if prior is None:
        prior = commands.newest_prior()
        click.echo(f"prior: {prior}, the newest under ./runs", err=True)
    out = out or commands.next_drawing(prior)
    if out.suffix not in (".png", ".npz", ""):
        raise click.UsageError(f"--out is a .png, an .npz or a folder (without suffix), found {out}")
    if compare and out.suffix != ".png":
        raise click.UsageError(f"--compare shows samples in a grid: it needs --out with .png, found {out}")
    commands.require_free(out, overwrite, folder=not out.suffix)
    loaded = load_prior(prior, checkpoint=checkpoint, force=force, device=_device(device), dtype=DTYPES[dtype])
    if checkpointing:
        loaded.backbone = loaded.backbone.checkpointing()
    sampler = resolve(loaded.sampler, given)
    _preflight(memory.for_samples(loaded, number, chunk, sampler), device)
    with Bar("sample", number) as bar:
        drawn = loaded.sample(number, seed=seed, sampler=sampler, chunk=chunk, on_chunk=bar.to, processes=processes)
    if not processes.first:
        return
    files = commands.write_samples(loaded, drawn, out, seed=seed, compare=compare)
    result = commands.describe_samples(drawn, sampler, seed, files)
    _show(result, as_json, report.sample_summary)


@main.command("eval")
@click.argument("priors", type=PATH, nargs=-1, required=True)
@OWN_DATA
@click.option("--ckpt", "checkpoint", help="where the backbone is, if it has moved")
@click.option("--force", is_flag=True, help="use a backbone with other weights than the prior was trained on")
@click.option("--classifier", type=PATH, help="feature classifier of FD  [default: the bundled one for such images]")
@click.option(
    "--inception", type=PATH, help="Inception weights, a file or a folder of both: take their features, and add FID"
)
@click.option("--fid", is_flag=True, help="the same with the weights in the cache (--download fetches them)")
@click.option(
    "--fid-mode",
    "modes",
    type=click.Choice(MODES),
    multiple=True,
    help="clean-fid's preprocessing, several times for several; legacy_pytorch is comparable with the paper  "
    "[default: clean]",
)
@config_options(EvalConfig, skip=("seed", "energy"))
@config_options(SamplerConfig, wording={"": RECORDED})
@SEED
@CHECKPOINTING
@DEVICE
@JSON
def evaluate(
    priors: tuple[Path, ...],
    data: str | None,
    data_root: Path | None,
    download: bool,
    checkpoint: str | None,
    force: bool,
    classifier: Path | None,
    inception: Path | None,
    fid: bool,
    modes: tuple[InceptionMode, ...],
    seed: int,
    device: str,
    checkpointing: bool,
    dtype: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure priors of one backbone against held-out images: FD, KID, gap closed, held-out gain, AUC.

    With several PRIORS (training seeds, say) the mean and standard deviation are printed as well. On Inception's
    features the figures that are published are added: FID, KID and Inception Score of --fid-samples draws against all
    images of --fid-split, each with its card.
    """
    if sum(map(bool, (classifier, inception, fid))) > 1:
        raise click.UsageError("--classifier, --inception and --fid each name the network of features: give one")
    lacking = [key for key in ("fid_samples", "fid_split") if given[key] is not None] + ["fid_mode"] * bool(modes)
    if lacking and not (inception or fid):
        names = ", ".join(f"--{key.replace('_', '-')}" for key in lacking)
        raise click.UsageError(f"{names}: of Inception's features; pass --fid or --inception with it")
    config = resolve(EvalConfig(), given)
    config = replace(config, seed=seed, gauge=replace(config.gauge, seed=seed))
    loaded = [load_prior(priors[0], checkpoint=checkpoint, force=force, device=_device(device), dtype=DTYPES[dtype])]
    if checkpointing:
        loaded[0].backbone = loaded[0].backbone.checkpointing()
    loaded += [load_prior(path, loaded[0].backbone, force=force) for path in priors[1:]]
    for prior in loaded:
        prior.sampler = resolve(prior.sampler, given)
    _preflight(memory.for_samples(loaded[0], config.samples, config.chunk, loaded[0].sampler), device)
    spec = data or sources.named_data(prior_record(priors[0])["record"], str(priors[0]))
    test, train = (
        open_images(
            spec, split=split, data_root=data_root, download=download, image_shape=loaded[0].backbone.image_shape
        )
        for split in ("test", "train")
    )
    networks = [
        load_inception(inception, mode=mode, download=download, device=_device(device))
        for mode in (dict.fromkeys(modes or ("clean",)) if inception or fid else ())
    ]
    extractor = networks[0] if networks else commands.feature_classifier(test, classifier, _device(device))
    processes = _processes()
    with Bar("eval", 4 * len(loaded) + 1) as bar:
        results = commands.evaluate_all(
            loaded, [str(p) for p in priors], test, train, extractor, config, bar.stage, processes
        )
    if networks:
        compared = train if config.fid.split == "train" else test
        with Bar("FID", amount(len(loaded), len(networks), len(compared), config.fid)) as bar:
            cards = published(
                loaded,
                networks,
                compared,
                config.fid,
                seed=seed,
                chunk=config.chunk,
                on_images=bar.advance,
                processes=processes,
            )
        results = [result | {"published": card} for result, card in zip(results, cards, strict=True)]
    _show(results, as_json, report.evaluation_tables)


@main.command()
@PRIOR
@click.option(
    "--in", "inside", help=f"images of the known kind, {DATA_FORMS}  [default: what the prior was trained on]"
)
@click.option(
    "--out",
    "outside",
    multiple=True,
    required=True,
    help=f"outliers, {DATA_FORMS}, or noise, constant; several times for several",
)
@DATA_ROOT
@click.option("--k", "ks", default="all", show_default=True, help="groups not inferred, from the bottom: e.g. 0,1,2")
@click.option(
    "--mode",
    "modes",
    type=click.Choice(outliers.MODES),
    multiple=True,
    help="eq20: the paper's, literally; elbo: as the backbone's own bound; iw: that with L^{>0} importance-weighted  "
    "[default: each]",
)
@click.option(
    "--lower",
    "lowers",
    type=click.Choice(outliers.LOWERS),
    multiple=True,
    help="groups not inferred: drawn from the prior given the others, or means of the backbone's  [default: each]",
)
@RESULTS
@config_options(outliers.OutlierConfig)
@config_options(SamplerConfig, wording={"": RECORDED})
@SEED
@DEVICE
@JSON
def ood(
    prior: Path,
    checkpoint: str | None,
    force: bool,
    inside: str | None,
    outside: tuple[str, ...],
    data_root: Path | None,
    download: bool,
    ks: str,
    modes: tuple[Mode, ...],
    lowers: tuple[Lower, ...],
    to: Path | None,
    overwrite: bool,
    seed: int,
    device: str,
    dtype: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Tell outliers from images of the known kind by L^{>k} and LLR^{>k} (Eqs. 20, 21), with f and without."""
    config = replace(resolve(outliers.OutlierConfig(), given), seed=seed)
    loaded = load_prior(prior, checkpoint=checkpoint, force=force, device=_device(device), dtype=DTYPES[dtype])
    to = to or commands.next_free(prior.parent, "ood")
    outliers.require_folder(to, overwrite)
    loaded.sampler = resolve(loaded.sampler, given)
    known = inside or sources.named_data(prior_record(prior)["record"], str(prior), option="--in")
    shape = loaded.backbone.image_shape
    sets = [
        outliers.open_set(spec, shape, config.samples, seed=seed, data_root=data_root, download=download)
        for spec in (known, *outside)
    ]
    numbers = outliers.parsed_k(ks, len(loaded.backbone.groups))
    forms = outliers.every_form(numbers, modes or outliers.MODES, lowers or outliers.LOWERS)
    with Bar("ood", len(sets) * outliers.set_size(sets[0], sets[1:], config)) as bar:
        result, columns, scored = outliers.find_outliers(
            loaded, sets[0], sets[1:], forms, config, on_images=bar.advance
        )
    title = f"{scored[0].name} (in) and {', '.join(each.name for each in scored[1:])} (out)"
    result |= {"prior": str(prior), "command": _command()}
    result["files"] = outliers.write_results(to, result, columns, scored, title)
    _show(result, as_json, report.outlier_tables)


@main.command()
@PRIOR
@click.option("--normal", required=True, help=f"normal images, {DATA_FORMS}; those with --labels are left out")
@click.option("--test", "anomalies", required=True, help=f"anomalies, {DATA_FORMS}: the images with --labels, or all")
@click.option("--labels", type=int, multiple=True, help="label of an anomaly; several times for several")
@DATA_ROOT
@RESULTS
@config_options(outliers.OutlierConfig, skip=("seed", "samples"))
@SEED
@DEVICE
@JSON
def anomaly(
    prior: Path,
    checkpoint: str | None,
    force: bool,
    normal: str,
    anomalies: str,
    labels: tuple[int, ...],
    data_root: Path | None,
    download: bool,
    to: Path | None,
    overwrite: bool,
    seed: int,
    device: str,
    dtype: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Tell anomalies from normal images by L^{>0}, the unnormalised log-posterior (§5.4, Table 4)."""
    config = replace(resolve(outliers.OutlierConfig(), given), seed=seed)
    loaded = load_prior(prior, checkpoint=checkpoint, force=force, device=_device(device), dtype=DTYPES[dtype])
    to = to or commands.next_free(prior.parent, "anomaly")
    outliers.require_folder(to, overwrite)
    shape = loaded.backbone.image_shape
    known, strange = (
        open_images(spec, split="test", data_root=data_root, download=download, image_shape=shape)
        for spec in (normal, anomalies)
    )
    known, strange = outliers.labelled(known, labels, among=False), outliers.labelled(strange, labels, among=True)
    with Bar("anomaly", len(known) + len(strange)) as bar:
        result, columns, scored = outliers.find_anomalies(loaded, known, strange, config, on_images=bar.advance)
    result |= {"prior": str(prior), "command": _command()}
    result["files"] = outliers.write_results(
        to, result, columns, scored, f"Anomalies of {scored[1].name} among {scored[0].name}"
    )
    _show(result, as_json, report.outlier_tables)


@main.command()
@PRIOR
@click.argument("what", type=click.Choice(list(PICTURES)))
@click.option("--data", help=f"images to start from, {DATA_FORMS}  [default: what the prior was trained on]")
@DATA_ROOT
@click.option("-n", "--number", type=click.IntRange(1), help="rows, chains or codes  [default: depends on the picture]")
@click.option(
    "--out", type=PATH, help="the .png; its arrays lie beside it as .npz  [default: the next free beside PRIOR]"
)
@click.option("--overwrite", is_flag=True, help="replace what is at --out")
@config_options(SamplerConfig, wording={"": RECORDED})
@SEED
@DEVICE
@JSON
def show(
    prior: Path,
    what: str,
    checkpoint: str | None,
    force: bool,
    data: str | None,
    data_root: Path | None,
    download: bool,
    number: int | None,
    out: Path | None,
    overwrite: bool,
    seed: int,
    device: str,
    dtype: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Draw what a prior does, as a PNG with the arrays behind it: WHAT is

    \b
    transitions     chains from the backbone's prior to the energy-based one (Figs. 5, 14)
    energy          energy per group along 100 and --steps (2,500) steps (Fig. 8)
    hierarchy       samples with their lower groups redrawn (Figs. 7, 11)
    reconstruction  images with their lower groups redrawn (Fig. 12)
    interpolate     from one image to another in ε-space
    latents         posterior codes and chains, two dimensions per group (Fig. 2)
    """
    loaded = load_prior(prior, checkpoint=checkpoint, force=force, device=_device(device), dtype=DTYPES[dtype])
    if what == "energy":
        given["steps"] = given["steps"] or LONG_RUN
    loaded.sampler = resolve(loaded.sampler, given)
    out = out or commands.next_free(prior.parent, what, ".png")
    if out.suffix != ".png":
        raise click.UsageError(f"--out is a .png, found {out}")
    for path in (out, out.with_suffix(".npz")):
        commands.require_free(path, overwrite)
    images = None
    if what in WITH_IMAGES:
        data = data or sources.named_data(prior_record(prior)["record"], str(prior))
        shape = loaded.backbone.image_shape
        images = open_images(data, split="test", data_root=data_root, download=download, image_shape=shape)
    elif data is not None:
        raise click.UsageError(f"{what} starts from no images: leave --data out")
    with Bar("show", loaded.sampler.steps if what in WITH_CHAINS else 1) as bar:
        shown = draw_picture(loaded, what, images, number, seed=seed, on_step=bar.to)
    _show(commands.write_page(shown.image, shown.arrays, out), as_json, report.files_written)


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
    backbone = load_backbone(adapter_name, checkpoint, device=_device(device), dtype=DTYPES[dtype])
    data = data or sources.own_data(checkpoint, backbone)
    images = open_images(data, split="test", data_root=data_root, download=download, image_shape=backbone.image_shape)
    with Bar("doctor", 3) as bar:
        result = examine(backbone, images, config, on_stage=bar.stage)
    _show(result, as_json, report.doctor_card)


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
        _show(prior_record(prior) | {"heads": commands.head_parameters(prior)}, as_json, report.prior_card)
        return
    backbone = load_backbone(adapter_name, str(checkpoint))
    _show(commands.describe_backbone(backbone), as_json, report.backbone_card)


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
    _new_or_resumed(resume, overwrite)
    config = resolve(PretrainConfig(), given | {"seed": seed}, config_file)
    if checkpoint is not None:
        if architecture is not None:
            raise click.UsageError("--ckpt has its own architecture: leave --architecture out")
        backbone = load_backbone(adapter_name, checkpoint, device=_device(device), dtype=DTYPES[dtype])
    elif adapter_name is not None:
        backbone = sources.new_backbone(adapter_name, architecture, config.seed).to(_device(device), DTYPES[dtype])
    else:
        raise click.UsageError("say what to train: --backbone, or --ckpt to go on from trained weights")
    train, test = (
        open_images(data, split=split, data_root=data_root, download=download, image_shape=backbone.image_shape)
        for split in ("train", "test")
    )
    directory = commands.run_directory(out, "pretrain", resume=resume)
    with Bar("pretrain", config.iterations) as bar:
        result = commands.pretrain_into(
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
    _show(result, as_json, report.pretrain_summary)


@main.command()
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
    _new_or_resumed(resume, overwrite)
    if bool(architecture) + bool(changes) + bool(checkpoint) > 1:
        raise click.UsageError("--architecture, --set and --ckpt each say what network it is: give one")
    config = resolve(JOINT_PRESETS[preset](), given | {"seed": seed}, config_file)
    images, test = (open_images(data, split=s, data_root=data_root, download=download) for s in ("train", "test"))
    if checkpoint is not None:
        chosen = click.get_current_context().get_parameter_source("adapter_name")
        named = adapter_name if chosen is ParameterSource.COMMANDLINE else None
        backbone = load_backbone(named, checkpoint, device=_device(device), dtype=DTYPES[dtype])
    else:
        backbone = joint_run.new_network(adapter_name, architecture, changes, images.shape, config.seed)
        backbone = backbone.to(_device(device), DTYPES[dtype])
    if images.shape != backbone.image_shape:
        raise ConfigurationError(f"the network is of images {backbone.image_shape}, found {data} with {images.shape}")
    with Bar("train", config.iterations) as bar:
        result = joint_run.train_into(
            commands.run_directory(out, "train", resume=resume),
            backbone,
            images,
            test,
            config,
            checkpoint=checkpoint,
            resume=resume,
            overwrite=overwrite,
            on_step=bar.step,
        )
    _show(result, as_json, report.train_summary)


@main.command("anomaly-table")
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
@click.option("--width", type=click.IntRange(1), default=12, show_default=True, help="of the generator")
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


@main.command()
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


@main.command("latents-2d")
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
@click.option("--out", type=PATH, default=Path("ebm-prior-demo"), show_default=True, help="where results are written")
@click.option("--overwrite", is_flag=True, help="write into --out though it holds something else than a demo")
@SEED
@JSON
def demo(out: Path, overwrite: bool, seed: int, as_json: bool) -> None:
    """Fit a prior to the bundled HVAE and show samples before and after. Offline, a few minutes on two cores."""
    require_demo_folder(out, overwrite)
    with Bar("demo", demo_config().iterations) as bar:
        result = run_demo(out, seed=seed, overwrite=overwrite, on_step=bar.step, on_stage=bar.remark)
    _show(result, as_json, report.demo_summary)


@main.command()
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


@main.command()
@JSON
def backbones(as_json: bool) -> None:
    """List the adapters that are installed, and the trained backbones that come with the package."""
    _show(commands.list_backbones(), as_json, report.backbone_list)


def _new_or_resumed(resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise click.UsageError("--resume goes on with a run, --overwrite starts it anew: give one of them")


def _unused(given: Mapping[str, Any], starts: tuple[str, ...], used: bool, why: str) -> None:
    """Refuse options that would change nothing."""
    names = [f"--{key.replace('_', '-')}" for key, v in given.items() if key.startswith(starts) and v is not None]
    if names and not used:
        raise click.UsageError(f"{why}: leave out {', '.join(names)}")


def _processes() -> Processes:
    """Those that torchrun has started, connected by `main`."""
    return click.get_current_context().find_object(Processes) or ALONE


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _complain(text: str) -> None:
    """One line on stderr; of several processes each has its own."""
    processes = _processes()
    if processes.first:
        click.echo(f"ebm-prior: {text}", err=True)
    else:  # whose sys.stderr leads nowhere
        click.echo(f"ebm-prior: process {processes.rank} of {processes.count}: {text}", file=sys.__stderr__)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(own_device(name))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _preflight(need: memory.Need, device: str) -> None:
    click.echo(memory.require(need, _device(device)), err=True)


def _command() -> str:
    """The command that runs, as it was typed."""
    return shlex.join(["ebm-prior", *click.get_current_context().meta[WORDS]])


def _show(result: Any, as_json: bool, human: Callable[[Any], str]) -> None:
    """Print a result: text, or JSON that also says which command made it."""
    if not as_json:
        click.echo(human(result))
        return
    made = {"command": _command()}
    marked = [made | each for each in result] if isinstance(result, list) else made | result
    click.echo(json.dumps(without_nan(marked), sort_keys=True))
