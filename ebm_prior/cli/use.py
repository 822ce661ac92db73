"""The commands that read a trained prior: sample, eval, ood, anomaly, show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ebm_prior.cli.options import config_options
from ebm_prior.cli.preflight import for_samples
from ebm_prior.cli.progress import Bar
from ebm_prior.cli.shared import (
    DATA_FORMS,
    DATA_ROOT,
    DEVICE,
    DTYPES,
    JSON,
    OWN_DATA,
    PASSES,
    PATH,
    PRIOR,
    RECORDED,
    SEED,
    launched_processes,
    own,
    preflight,
    show_result,
    torch_device,
)
from ebm_prior.data.images import open_images
from ebm_prior.evaluation.evaluate import EvalConfig, evaluate_all, feature_classifier
from ebm_prior.evaluation.fid import amount, published
from ebm_prior.evaluation.inception import MODES, load_inception
from ebm_prior.evaluation.inception import Mode as InceptionMode
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.pictures.show import LONG_RUN, PICTURES, WITH_CHAINS, WITH_IMAGES, draw_picture
from ebm_prior.reports import findings, summaries
from ebm_prior.runs import backbones, samples
from ebm_prior.settings import resolve
from ebm_prior.storage import places
from ebm_prior.storage.checkpoint import load_prior, prior_record


@click.command()
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
@PASSES
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
    compiled: bool,
    dtype: str,
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
    places.require_free(out, overwrite, folder=not out.suffix)
    if not out.suffix and processes.first:
        own(out)
    loaded = load_prior(prior, checkpoint=checkpoint, force=force, device=torch_device(device), dtype=DTYPES[dtype])
    if checkpointing:
        loaded.backbone = loaded.backbone.checkpointing()
    sampler = resolve(loaded.sampler, given)
    preflight(for_samples(loaded, number, chunk, sampler), device)
    if compiled:  # for the batches to come, not for those of the measurement
        loaded.backbone = loaded.backbone.compiled()
    with Bar("sample", number) as bar:
        drawn = loaded.sample(number, seed=seed, sampler=sampler, chunk=chunk, on_chunk=bar.to, processes=processes)
    if not processes.first:
        return
    files = samples.write_samples(loaded, drawn, out, seed=seed, compare=compare)
    result = samples.describe_samples(drawn, sampler, seed, files)
    show_result(result, as_json, summaries.sample_summary)


@click.command("eval")
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
@PASSES
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
    compiled: bool,
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
    first = load_prior(priors[0], checkpoint=checkpoint, force=force, device=torch_device(device), dtype=DTYPES[dtype])
    if checkpointing:
        first.backbone = first.backbone.checkpointing()
    loaded = [first, *(load_prior(path, first.backbone, force=force) for path in priors[1:])]
    for prior in loaded:
        prior.sampler = resolve(prior.sampler, given)
    preflight(for_samples(loaded[0], config.samples, config.chunk, loaded[0].sampler), device)
    if compiled:
        for prior in loaded:
            prior.backbone = prior.backbone.compiled()
    spec = data or backbones.named_data(prior_record(priors[0])["record"], str(priors[0]))
    test, train = (
        open_images(
            spec, split=split, data_root=data_root, download=download, image_shape=loaded[0].backbone.image_shape
        )
        for split in ("test", "train")
    )
    networks = [
        load_inception(inception, mode=mode, download=download, device=torch_device(device))
        for mode in (dict.fromkeys(modes or ("clean",)) if inception or fid else ())
    ]
    extractor = networks[0] if networks else feature_classifier(test, classifier, torch_device(device))
    processes = launched_processes()
    with Bar("eval", 4 * len(loaded) + 1) as bar:
        results = evaluate_all(loaded, [str(p) for p in priors], test, train, extractor, config, bar.stage, processes)
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
    show_result(results, as_json, findings.evaluation_tables)


@click.command()
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
    loaded = load_prior(prior, checkpoint=checkpoint, force=force, device=torch_device(device), dtype=DTYPES[dtype])
    if what == "energy":
        given["steps"] = given["steps"] or LONG_RUN
    loaded.sampler = resolve(loaded.sampler, given)
    out = out or places.next_free(prior.parent, what, ".png")
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
        shown = draw_picture(loaded, what, images, number, seed=seed, on_step=bar.to)
    show_result(samples.write_page(shown.image, shown.arrays, out), as_json, summaries.files_written)
