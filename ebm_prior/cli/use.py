"""The commands that use a trained prior: sample, eval, show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ebm_prior.cli.help import Command
from ebm_prior.cli.options import config_options
from ebm_prior.cli.preflight import for_samples
from ebm_prior.cli.progress import Bar
from ebm_prior.cli.shared import (
    DATA_FORMS,
    DATA_ROOT,
    JSON,
    OWN_DATA,
    PASSES,
    PLACE,
    PRIOR,
    RECORDED,
    SEED,
    launched_processes,
    open_images,
    own,
    preflight,
    show_result,
)
from ebm_prior.cli.types import PATH, PRIOR_FILE
from ebm_prior.evaluation.evaluate import EvalConfig, evaluate_all, feature_classifier
from ebm_prior.evaluation.fid import amount, published
from ebm_prior.evaluation.inception import MODES, load_inception
from ebm_prior.evaluation.inception import Mode as InceptionMode
from ebm_prior.model.passes import Passes
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.pictures.sheets import save_page
from ebm_prior.pictures.show import LONG_RUN, PICTURES, WITH_CHAINS, WITH_IMAGES, draw_picture
from ebm_prior.reports import findings, summaries
from ebm_prior.runs import backbones, samples
from ebm_prior.settings import resolve
from ebm_prior.storage import places
from ebm_prior.storage.checkpoint import load_prior, prior_record


@click.command(
    cls=Command,
    first=("number", "out", "compare", "overwrite", "checkpoint", "steps", "temperature", "seed", "device", "as_json"),
)
@click.argument("prior", type=PRIOR_FILE, required=False)
@click.option("-n", "--number", type=click.IntRange(1), default=64, show_default=True, help="number of samples")
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
@config_options(SamplerConfig, wording={"": RECORDED}, section="Sampler")
@SEED
@PASSES
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
    passes: Passes,
    as_json: bool,
    **given: Any,
) -> None:
    """Draw images from a prior file, by the sampler recorded in it unless options say otherwise.

    Without PRIOR it is the newest one under ./runs.
    """
    processes = launched_processes()
    if prior is None:
        prior = places.newest_prior()
        click.echo(f"prior: {prior}, the newest under ./runs", err=True)
    out = out or places.next_drawing(prior)
    if out.suffix not in (".png", ".npz", ""):
        raise click.UsageError(f"--out is a .png, an .npz or a folder (without suffix), found {out}")
    if compare and out.suffix != ".png":
        raise click.UsageError(f"--compare shows samples in a grid: it needs --out with .png, found {out}")
    samples.require_place(out, overwrite)
    if not out.suffix and processes.first:
        own(out)
    loaded = load_prior(prior, checkpoint=checkpoint, force=force, device=passes.device, dtype=passes.dtype)
    sampler = resolve(loaded.sampler, given)
    preflight(for_samples(loaded, number, chunk, sampler, passes), passes.device)
    loaded.backbone = passes.apply(loaded.backbone)
    with Bar("sample", number) as bar:
        drawn = loaded.sample(number, seed=seed, sampler=sampler, chunk=chunk, progress=bar, processes=processes)
    if not processes.first:
        return
    files = samples.write_samples(loaded, drawn, out, seed=seed, compare=compare)
    result = samples.describe_samples(drawn, sampler, seed, files)
    show_result(result, as_json, summaries.sample_summary)


@click.command(
    "eval",
    cls=Command,
    first=("data", "data_root", "samples", "fid", "classifier", "checkpoint", "seed", "device", "as_json"),
)
@click.argument("priors", type=PRIOR_FILE, nargs=-1, required=True)
@OWN_DATA
@click.option("--ckpt", "checkpoint", help="where the backbone is, if it has moved")
@click.option("--force", is_flag=True, help="use a backbone with other weights than the prior was trained on")
@click.option("--classifier", type=PATH, help="feature classifier of FD  [default: the bundled one for such images]")
@click.option(
    "--inception", type=PATH, help="Inception weights, a file or a folder of both: take their features, and add FID"
)
@click.option("--fid", is_flag=True, help="as --inception, with the weights in the cache (--download fetches them)")
@click.option(
    "--fid-mode",
    "modes",
    type=click.Choice(MODES),
    multiple=True,
    help="clean-fid's preprocessing; repeat the option for several; legacy_pytorch is comparable with the paper  "
    "[default: clean]",
)
@config_options(EvalConfig, skip=("seed", "energy"))
@config_options(SamplerConfig, wording={"": RECORDED}, section="Sampler")
@SEED
@PASSES
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
    passes: Passes,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure priors of one backbone against held-out images: FD, KID, gap closed, held-out gain, AUC.

    With several PRIORS (training seeds, say) the mean and standard deviation are printed as well. With Inception's
    features come the figures that papers publish: FID, KID and Inception Score of --fid-samples draws against all
    images of --fid-split, each with its card.
    """
    _require_one_network(classifier, inception, fid, modes, given)
    config = resolve(EvalConfig(), given)
    config = replace(config, seed=seed, gauge=replace(config.gauge, seed=seed))
    loaded = _loaded(priors, checkpoint, force, passes, given)
    backbone = loaded[0].backbone
    preflight(for_samples(loaded[0], config.samples, config.chunk, loaded[0].sampler, passes), passes.device)
    backbone = passes.apply(backbone)
    for prior in loaded:
        prior.backbone = backbone
    spec = data or backbones.named_data(prior_record(priors[0])["record"], str(priors[0]))
    test, train = (
        open_images(spec, split=split, data_root=data_root, download=download, image_shape=backbone.image_shape)
        for split in ("test", "train")
    )
    networks = [
        load_inception(inception, mode=mode, download=download, device=passes.device)
        for mode in (dict.fromkeys(modes or ("clean",)) if inception or fid else ())
    ]
    extractor = networks[0] if networks else feature_classifier(test, classifier, passes.device)
    processes = launched_processes()
    with Bar("eval", 4 * len(loaded) + 1) as bar:
        results = evaluate_all(loaded, [str(p) for p in priors], test, train, extractor, config, bar, processes)
    if networks:
        compared = train if config.fid.split == "train" else test
        with Bar("FID", amount(len(loaded), len(networks), len(compared), config.fid)) as bar:
            cards = published(
                loaded, networks, compared, config.fid, seed=seed, chunk=config.chunk, progress=bar, processes=processes
            )
        results = [result | {"published": card} for result, card in zip(results, cards, strict=True)]
    show_result(results, as_json, findings.evaluation_tables)


def _require_one_network(
    classifier: Path | None, inception: Path | None, fid: bool, modes: Sequence[str], given: Mapping[str, Any]
) -> None:
    """Refuse options that name several networks of features, or that mean nothing without Inception's."""
    if sum(map(bool, (classifier, inception, fid))) > 1:
        raise click.UsageError("--classifier, --inception and --fid each name the network of features: give one")
    lacking = [key for key in ("fid_samples", "fid_split") if given[key] is not None] + ["fid_mode"] * bool(modes)
    if lacking and not (inception or fid):
        names = ", ".join(f"--{key.replace('_', '-')}" for key in lacking)
        raise click.UsageError(f"{names}: only Inception's features have these; pass --fid or --inception with it")


def _loaded(
    paths: Sequence[Path], checkpoint: str | None, force: bool, passes: Passes, given: Mapping[str, Any]
) -> list[EBMPrior]:
    """The priors, on one backbone, with the options of the sampler that are given in place of those recorded."""
    first = load_prior(paths[0], checkpoint=checkpoint, force=force, device=passes.device, dtype=passes.dtype)
    loaded = [first, *(load_prior(path, first.backbone, force=force) for path in paths[1:])]
    for prior in loaded:
        prior.sampler = resolve(prior.sampler, given)
    return loaded


@click.command(
    cls=Command, first=("data", "data_root", "number", "out", "overwrite", "steps", "seed", "device", "as_json")
)
@PRIOR
@click.argument("what", type=click.Choice(list(PICTURES)))
@click.option("--data", help=f"images to start from, {DATA_FORMS}  [default: what the prior was trained on]")
@DATA_ROOT
@click.option("-n", "--number", type=click.IntRange(1), help="rows, chains or codes  [default: depends on the picture]")
@click.option(
    "--out", type=PATH, help="the .png; its arrays lie beside it as .npz  [default: the next free beside PRIOR]"
)
@click.option("--overwrite", is_flag=True, help="replace what is at --out")
@config_options(SamplerConfig, wording={"": RECORDED}, section="Sampler")
@SEED
@PLACE
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
    passes: Passes,
    as_json: bool,
    **given: Any,
) -> None:
    """Draw pictures of a prior at work, as a PNG with the arrays behind it. WHAT is one of

    \b
    transitions     chains from the backbone's prior to the energy-based one (Figs. 5, 14)
    energy          energy per group along 100 and --steps (2,500) steps (Fig. 8)
    hierarchy       samples with their lower groups redrawn (Figs. 7, 11)
    reconstruction  images with their lower groups redrawn (Fig. 12)
    interpolate     from one image to another in ε-space
    latents         posterior codes and chains, two dimensions per group (Fig. 2)
    """
    loaded = load_prior(prior, checkpoint=checkpoint, force=force, device=passes.device, dtype=passes.dtype)
    if what == "energy":
        given["steps"] = given["steps"] or LONG_RUN
    loaded.sampler = resolve(loaded.sampler, given)
    out = out or places.next_free(places.beside(prior), what, ".png")
    if out.suffix != ".png":
        raise click.UsageError(f"--out is a .png, found {out}")
    for path in (out, out.with_suffix(".npz")):
        places.require_free(path, overwrite)
    images = None
    if what in WITH_IMAGES:
        data = data or backbones.named_data(prior_record(prior)["record"], str(prior))
        shape = loaded.backbone.image_shape
        images = open_images(data, split="test", data_root=data_root, download=download, image_shape=shape)
    elif data is not None:
        raise click.UsageError(f"{what} starts from no images: leave --data out")
    with Bar("show", loaded.sampler.steps if what in WITH_CHAINS else 1) as bar:
        drawn = draw_picture(loaded, what, images, number, seed=seed, progress=bar)
    files = save_page(drawn.image, drawn.arrays, out)
    show_result({"files": [str(file) for file in files]}, as_json, summaries.files_written)
