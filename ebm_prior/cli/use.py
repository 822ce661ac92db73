"""The commands that measure a trained prior and show it: eval, show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from ebm_prior.cli.help import Command
from ebm_prior.cli.images import Opener
from ebm_prior.cli.options import Drawing, config_options
from ebm_prior.cli.preflight import for_samples
from ebm_prior.cli.progress import Bar
from ebm_prior.cli.shared import (
    CALIBRATED,
    CONFIG,
    DATA_FORMS,
    DATA_ROOT,
    ITS_BACKBONE,
    JSON,
    PASSES,
    PLACE,
    PRIOR,
    RECORDED,
    RUN_SEED,
    data_or,
    launched_processes,
    opened_prior,
    preflight,
    show_result,
)
from ebm_prior.cli.types import PATH, PRIOR_FILE, require_suffix
from ebm_prior.data.source import ImageSource, Shape, Split
from ebm_prior.errors import DataError, few
from ebm_prior.evaluation.evaluate import EvalConfig, evaluate_all, feature_classifier, parts
from ebm_prior.evaluation.features import own_features
from ebm_prior.evaluation.fid import amount, published
from ebm_prior.evaluation.inception import MODES, load_inception
from ebm_prior.evaluation.inception import Mode as InceptionMode
from ebm_prior.evaluation.metrics import FeatureExtractor
from ebm_prior.model.passes import Passes
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.pictures.film import MOVING, save_film, transitions_film
from ebm_prior.pictures.sheets import save_page
from ebm_prior.pictures.show import LONG_RUN, PICTURES, WITH_CHAINS, WITH_IMAGES, draw_picture
from ebm_prior.reports import findings, summaries
from ebm_prior.runs import backbones
from ebm_prior.runs.data import of_prior
from ebm_prior.settings import read_parts, resolve
from ebm_prior.storage import places
from ebm_prior.storage.checkpoint import prior_record


@click.command(
    "eval",
    cls=Command,
    first=("data", "data_root", "download", "samples", "fid", "classifier", "checkpoint", "seed", "device", "as_json"),
)
@click.argument("priors", type=PRIOR_FILE, nargs=-1, required=True)
@data_or("held-out images of the data that the prior was trained on")
@ITS_BACKBONE
@CALIBRATED
@click.option(
    "--classifier",
    type=PATH,
    help="Classifier that gives the features of FD  [default: the bundled one for such images]",
)
@click.option(
    "--features",
    "own",
    metavar="MODULE:FUNCTION",
    help="Function of your own that gives the features of FD, from images (B, C, H, W) in [0, 1] to (B, D), in an "
    "installed module or in the current folder",
)
@click.option(
    "--inception",
    type=PATH,
    help="Inception weights that give the features of FD, and FID: a file, or a folder of both files",
)
@click.option(
    "--fid",
    is_flag=True,
    help="Add FID, KID and Inception Score as published, on Inception weights from the user's cache (--download "
    "fetches them)",
)
@click.option(
    "--fid-mode",
    "modes",
    type=click.Choice(MODES),
    multiple=True,
    help="Preprocessing of clean-fid, where legacy_pytorch is comparable with the paper; repeat the option for several"
    "  [default: clean]",
)
@CONFIG
@config_options(EvalConfig, skip=("seed", "energy"))
@config_options(SamplerConfig, wording={"": RECORDED}, section="Sampler")
@RUN_SEED
@PASSES
@JSON
def evaluate(
    priors: tuple[Path, ...],
    data: str | None,
    data_root: Path | None,
    download: bool,
    checkpoint: str | None,
    force: bool,
    calibrated: bool,
    classifier: Path | None,
    own: str | None,
    inception: Path | None,
    fid: bool,
    modes: tuple[InceptionMode, ...],
    config_file: Path | None,
    seed: int | None,
    passes: Passes,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure priors of one backbone against held-out images: FD, KID, gap closed, held-out gain, AUC, pixels.

    FD and KID use the features of the bundled classifier for such images, or those of another network. For several
    PRIORS (of several training seeds, say) mean and standard deviation are printed too. With --fid the published
    figures are added: FID, KID and Inception Score of many draws against all images of a split, with their conditions.
    """
    _require_one_network((classifier, own, inception, fid), modes, given)
    stored, processes = read_parts(config_file, eval=EvalConfig, sampler=SamplerConfig), launched_processes()
    config = resolve(EvalConfig(), given | {"seed": seed}, stored["eval"])
    config = replace(config, gauge=replace(config.gauge, seed=config.seed))
    opened = partial(opened_prior, passes=passes, force=force, calibrated=calibrated)
    loaded = _loaded(priors, opened, checkpoint, given, stored["sampler"])
    backbone, drawing = loaded[0].backbone, loaded[0].sampling
    preflight(for_samples(drawing, config.samples, config.chunk, drawing.sampler, passes), passes.device)
    backbone = passes.apply(backbone)
    for prior in loaded:
        prior.backbone = prior.sampling.backbone = backbone
    memory = processes.of_first(partial(of_prior, priors[0]))
    test, train = _held_out(data, Opener(data_root, download, memory), priors[0], backbone.image_shape)
    networks = [
        load_inception(inception, mode=mode, download=download, device=passes.device)
        for mode in (dict.fromkeys(modes or ("clean",)) if inception or fid else ())
    ]
    extractor = networks[0] if networks else _features(test, classifier, own, passes.device)
    with Bar("eval", parts(len(loaded), len(backbone.groups), len(test), config)) as bar:
        results = evaluate_all(loaded, [str(p) for p in priors], test, train, extractor, config, bar, processes)
    if networks:
        compared = train if config.fid.split == "train" else test
        with Bar("FID", amount(len(loaded), len(networks), len(compared), config.fid)) as bar:
            cards = published(
                loaded,
                networks,
                compared,
                config.fid,
                seed=config.seed,
                chunk=config.chunk,
                progress=bar,
                processes=processes,
            )
        results = [result | {"published": card} for result, card in zip(results, cards, strict=True)]
    show_result(results, as_json, findings.evaluation_tables)


def _held_out(data: str | None, images: Opener, prior: Path, shape: Shape) -> list[ImageSource]:
    """The test and the training images: those of --data, or else those that the prior was trained on."""
    if data is not None:
        splits: tuple[Split, ...] = ("test", "train")
        return [images.typed(data, split=split, image_shape=shape) for split in splits]
    return images.held_out(
        otherwise=partial(backbones.named_data, prior_record(prior)["record"], str(prior)), shape=shape
    )


def _features(
    images: ImageSource, classifier: Path | None, own: str | None, device: torch.device
) -> FeatureExtractor | None:
    """The network that gives the features of FD: the one asked for, or else the bundled one for such images.

    Without either, None and a remark.
    """
    if own is not None:
        return own_features(own, device)
    try:
        return feature_classifier(images, classifier, device)
    except DataError as error:  # of bundled classifiers alone: one from a file is a CheckpointError
        click.echo(f"remark: FD and KID are left out. {error}", err=True)
        return None


def _require_one_network(named: Sequence[object], modes: Sequence[str], given: Mapping[str, Any]) -> None:
    """Refuse options that name more than one feature network, and options that only Inception's features have.

    named: the values of --classifier, --features, --inception and --fid.
    """
    inception, fid = named[-2:]
    if sum(map(bool, named)) > 1:
        raise click.UsageError(
            "--classifier, --features, --inception and --fid each choose the features of FD: give one of them"
        )
    lacking = [key for key in ("fid_samples", "fid_split") if given[key] is not None] + ["fid_mode"] * bool(modes)
    if lacking and not (inception or fid):
        names = few(f"--{key.replace('_', '-')}" for key in lacking)
        raise click.UsageError(f"{names}: only for Inception's features; pass --fid or --inception too")


def _loaded(
    paths: Sequence[Path],
    opened: Callable[..., EBMPrior],
    checkpoint: str | None,
    given: Mapping[str, Any],
    stored: Mapping[str, Any],
) -> list[EBMPrior]:
    """The priors on one shared backbone. Sampler settings of the command line or --config replace the recorded ones."""
    first = opened(paths[0], checkpoint=checkpoint)
    loaded = [first, *(opened(path, backbone=first.backbone) for path in paths[1:])]
    for prior in loaded:
        prior.sampling.sampler = resolve(prior.sampling.sampler, given, stored)
    return loaded


@click.command(
    cls=Command, first=("data", "data_root", "number", "fix", "out", "overwrite", "steps", "seed", "device", "as_json")
)
@PRIOR
@CALIBRATED
@click.argument("what", type=click.Choice(list(PICTURES)))
@click.option("--data", help=f"Images to start from: {DATA_FORMS}  [default: what the prior was trained on]")
@DATA_ROOT
@click.option(
    "-n", "--number", type=click.IntRange(1), help="Number of rows, chains or codes  [default: depends on the picture]"
)
@click.option(
    "--fix",
    type=click.IntRange(1),
    metavar="K",
    help="For hierarchy: keep the first K latent groups of every sample, those from the top, and draw the rest anew",
)
@click.option(
    "--out",
    type=PATH,
    help="PNG file to write (of transitions also a moving .gif), with its arrays beside it as .npz  "
    "[default: the next free one beside PRIOR]",
)
@click.option("--overwrite", is_flag=True, help="Replace what exists at --out")
@CONFIG
@config_options(SamplerConfig, wording={"": RECORDED}, section="Sampler")
@RUN_SEED
@PLACE
@JSON
def show(
    prior: Path,
    what: str,
    checkpoint: str | None,
    force: bool,
    calibrated: bool,
    data: str | None,
    data_root: Path | None,
    download: bool,
    number: int | None,
    fix: int | None,
    out: Path | None,
    overwrite: bool,
    config_file: Path | None,
    seed: int | None,
    passes: Passes,
    as_json: bool,
    **given: Any,
) -> None:
    """Draw pictures of a prior at work, as a PNG (transitions: or a GIF) with the arrays behind it. WHAT is one of

    \b
    transitions     chains from the backbone's prior to the energy-based one (Figs. 5, 14)
    energy          energy per group along 100 and --steps (2,500) steps (Fig. 8)
    hierarchy       samples with their lower groups redrawn (Figs. 7, 11)
                    (--fix K: with all but the first K)
    reconstruction  images with their lower groups redrawn (Fig. 12)
    interpolate     from one image to another in ε-space
    latents         posterior codes and chains, two dimensions per group (Fig. 2)
    """
    _require_picture(out, what)
    if fix is not None and what != "hierarchy":
        raise click.UsageError(f"the picture {what} fixes no groups: leave out --fix")
    stored = read_parts(config_file, drawing=Drawing, sampler=SamplerConfig)
    seed = resolve(Drawing(), {"seed": seed}, stored["drawing"]).seed
    loaded = opened_prior(prior, passes, checkpoint=checkpoint, force=force, calibrated=calibrated)
    loaded = loaded if what == "energy" else loaded.sampling  # a refiner has no energy to speak of
    long = {"steps": LONG_RUN} if what == "energy" else {}
    loaded.sampler = resolve(loaded.sampler, given, long | stored["sampler"])
    out = out or places.next_free(places.beside(prior), what, ".png")
    for path in (out, out.with_suffix(".npz")):
        places.require_free(path, overwrite)
    images = None
    if what in WITH_IMAGES:
        shape, opener = loaded.backbone.image_shape, Opener(data_root, download, of_prior(prior))
        named = partial(backbones.named_data, prior_record(prior)["record"], str(prior))
        if data is not None:
            images = opener.typed(data, split="test", image_shape=shape)
        else:
            (images,) = opener.own("test", otherwise=named, shape=shape)
    elif data is not None:
        raise click.UsageError(f"the picture {what} uses no images: leave out --data")
    with Bar("show", loaded.sampler.steps if what in WITH_CHAINS else 1) as bar:
        if out.suffix == ".gif":
            files = save_film(transitions_film(loaded, number or PICTURES[what], seed=seed, progress=bar), out)
        else:
            drawn = draw_picture(loaded, what, images, number, fix=fix, seed=seed, progress=bar)
            files = save_page(drawn.image, drawn.arrays, out)
    show_result({"files": [str(file) for file in files]}, as_json, summaries.files_written)


def _require_picture(out: Path | None, what: str) -> None:
    """Refuse a form of picture that there is not, before work is done."""
    if out is not None and what in MOVING:
        require_suffix(out, ".png", ".gif")
    elif out is not None:
        require_suffix(out, ".png", why=f"{what} does not move as {few(MOVING)} in a .gif does")
