"""The commands that remake the paper's experiments with joint training: anomaly-table, ablation, latents-2d."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch

from ebm_prior.cli.progress import Bar
from ebm_prior.cli.shared import DATA, DATA_ROOT, DEVICE_NAME, SEED, open_images, together, torch_device
from ebm_prior.cli.types import PATH, require_suffix
from ebm_prior.data.outlier_sets import labelled
from ebm_prior.evaluation import evaluate
from ebm_prior.experiments import ablations, anomaly_table, jobs, latents_2d
from ebm_prior.pictures.grids import save_png
from ebm_prior.storage import places
from ebm_prior.storage.atomic import without_nan, write_atomically

REPEATED = together(
    click.option("--out", type=PATH, required=True, help="JSON file to write, with one row per result"),
    click.option("--overwrite", is_flag=True, help="Replace an existing file at --out"),
    click.option(
        "--seed",
        "seeds",
        type=click.IntRange(0),
        multiple=True,
        default=(0,),
        show_default=True,
        help="Seed of a training; repeat the option for several, and get mean and spread",
    ),
    click.option(
        "--jobs",
        "at_once",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Number of trainings at a time, each on one thread; several also use a GPU better",
    ),
    DEVICE_NAME,
)


def _write(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    write_atomically(out, json.dumps(without_nan(rows), indent=2).encode())


def _flat(parts: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for part in parts for row in part]


@click.command("anomaly-table")
@click.option(
    "--data", default="mnist", show_default=True, help="Labelled data set; both of its splits form the pool of images"
)
@DATA_ROOT
@click.option(
    "--digit",
    "digits",
    type=int,
    multiple=True,
    default=anomaly_table.DIGITS,
    show_default=True,
    help="Label that is held out of the training; repeat the option for several",
)
@click.option(
    "--model",
    "models",
    type=click.Choice(list(anomaly_table.MODELS)),
    multiple=True,
    default=tuple(anomaly_table.MODELS),
    show_default=True,
    help="Model to train; repeat the option for several",
)
@click.option(
    "--latents", type=(int, int), default=(16, 8), show_default=True, help="Dimensions of the latents z_1 and z_2"
)
@click.option("--width", type=click.IntRange(1), default=32, show_default=True, help="Width of the generator network")
@click.option(
    "--sigma",
    type=float,
    default=0.3,
    show_default=True,
    help="Standard deviation of a pixel given the latents, on [-1, 1]",
)
@click.option(
    "--epochs", type=click.IntRange(1), default=16, show_default=True, help="Number of epochs of each training"
)
@click.option(
    "--draws", type=click.IntRange(1), default=8, show_default=True, help="Posterior draws over which a score averages"
)
@REPEATED
def anomalies(
    data: str,
    data_root: Path | None,
    download: bool,
    digits: tuple[int, ...],
    models: tuple[str, ...],
    out: Path,
    overwrite: bool,
    seeds: tuple[int, ...],
    at_once: int,
    device: str,
    **settings: Any,
) -> None:
    """Remake Table 4: one digit held out of the training, and found again by the un-normalised posterior.

    Each row is written as soon as it is measured, so that a failure loses no finished row.
    """
    require_suffix(out, ".json")
    places.require_free(out, overwrite)
    torch_device(device)
    pool = anomaly_table.pooled(
        [open_images(data, split=s, data_root=data_root, download=download) for s in ("train", "test")]
    )
    assert pool.labels is not None  # `pooled` refuses images without labels
    for digit in digits:  # refuses a digit that is not there, before any training
        anomaly_table.split_by_digit(pool.labels, digit)
    calls = [
        {"pool": pool, "digit": digit, "model": model, "seed": seed, "device": device, **settings}
        for seed, digit, model in product(*map(dict.fromkeys, (seeds, digits, models)))
    ]
    with Bar("anomaly-table", len(calls)) as bar:

        def keep(found: Sequence[Sequence[dict[str, Any]]]) -> None:
            bar.advance(1)
            _write(_flat(found), out)

        rows = _flat(jobs.run_all(anomaly_table.run_digit, calls, jobs=at_once, on_done=keep))
    click.echo(anomaly_table.as_table(rows))


@click.command()
@click.argument("name", type=click.Choice(list(ablations.ABLATIONS)))
@DATA
@click.option(
    "--iterations",
    type=click.IntRange(1),
    default=2_000,
    show_default=True,
    help="Number of iterations of each training",
)
@click.option(
    "--latents", type=(int, int), default=(32, 16), show_default=True, help="Dimensions of the latents z_1 and z_2"
)
@click.option("--width", type=click.IntRange(1), default=12, show_default=True, help="Width of the generator network")
@click.option(
    "--samples",
    type=click.IntRange(2),
    default=2_000,
    show_default=True,
    help="Number of images and of draws in every Fréchet distance",
)
@click.option(
    "--classifier",
    type=PATH,
    help="Classifier that gives the features of FD  [default: the bundled one for such images]",
)
@REPEATED
def ablation(
    name: str,
    data: str,
    data_root: Path | None,
    download: bool,
    classifier: Path | None,
    out: Path,
    overwrite: bool,
    seeds: tuple[int, ...],
    at_once: int,
    device: str,
    **settings: Any,
) -> None:
    """Remake Tables 1 and 5 to 8: an ablation of joint training.

    The table has FD, seconds and parameters beside the paper's numbers. A plot with the same name and the suffix .png
    is written beside --out.
    """
    require_suffix(out, ".json")
    picture = out.with_suffix(".png")
    for path in (out, picture):
        places.require_free(path, overwrite)
    torch_device(device)
    images, test = (open_images(data, split=s, data_root=data_root, download=download) for s in ("train", "test"))
    extractor = evaluate.feature_classifier(test, classifier, torch.device("cpu"))
    shared = {"train": images, "test": test, "extractor": extractor, "device": device, **settings}
    calls = [
        {"variant": variant, "seed": seed, **shared}
        for seed, variant in product(dict.fromkeys(seeds), ablations.ABLATIONS[name].variants)
    ]
    with Bar(name, len(calls)) as bar:

        def keep(found: Sequence[dict[str, Any]]) -> None:
            bar.advance(1)
            _write(found, out)

        rows = jobs.run_all(ablations.measure, calls, jobs=at_once, on_done=keep)
    save_png(ablations.as_picture(name, rows), picture)
    click.echo(f"{ablations.as_table(name, rows)}\nwrote {out}, {picture}")


@click.command("latents-2d")
@click.option("--data", default="mnist", show_default=True, help="Labelled data set for the training")
@DATA_ROOT
@click.option(
    "--digit",
    "digits",
    type=int,
    multiple=True,
    default=(0, 1),
    show_default=True,
    help="Label of the training images; repeat the option for several",
)
@click.option("--iterations", type=click.IntRange(1), default=2_000, show_default=True, help="Number of gradient steps")
@click.option("--out", type=PATH, required=True, help="PNG file to write")
@click.option("--overwrite", is_flag=True, help="Replace an existing file at --out")
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
    """Remake Figure 2: two latents in each of two layers, posterior codes and the prior's chain."""
    require_suffix(out, ".png")
    places.require_free(out, overwrite)
    images = labelled(open_images(data, data_root=data_root, download=download), digits, among=True)
    config = latents_2d.config_2d(iterations=iterations, seed=seed)
    with Bar("latents-2d", iterations) as bar:
        prior = latents_2d.train_2d(images, config, progress=bar)
    save_png(latents_2d.picture_2d(latents_2d.transition(prior, images, config.prior_chain, seed=seed)), out)
    click.echo(f"wrote {out}")
