"""The commands that score images: ood and anomaly."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ebm_prior.cli.help import Command
from ebm_prior.cli.images import Opener
from ebm_prior.cli.options import config_options
from ebm_prior.cli.progress import Bar
from ebm_prior.cli.shared import (
    CONFIG,
    DATA_FORMS,
    DATA_ROOT,
    JSON,
    PLACE,
    PRIOR,
    RECORDED,
    RUN_SEED,
    own,
    refuse_unused,
    show_result,
    typed_command,
)
from ebm_prior.cli.types import PATH
from ebm_prior.data import outlier_sets
from ebm_prior.errors import ConfigurationError, few
from ebm_prior.evaluation.outliers import (
    OutlierConfig,
    every_form,
    find_anomalies,
    find_outliers,
    needs_reference,
    set_sizes,
)
from ebm_prior.interfaces import Images
from ebm_prior.model.passes import Passes
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.model.scores import DERIVED, LOWERS, MODES, Derived, Form, Lower, Mode
from ebm_prior.reports import findings
from ebm_prior.runs import backbones
from ebm_prior.runs.data import of_prior
from ebm_prior.runs.outliers import require_folder, write_results
from ebm_prior.settings import read_parts, resolve
from ebm_prior.storage import places
from ebm_prior.storage.checkpoint import load_prior, prior_record

FOLDER = "Folder for the results  [default: the next free one beside PRIOR]"
OLD_FOLDER = click.option("--to", "old_out", type=PATH, hidden=True, help="Old spelling of --out")
NO_REFERENCE = "only --mode typicality and composite have reference images"
MODE = click.option(
    "--mode",
    "modes",
    type=click.Choice((*MODES, *DERIVED)),
    multiple=True,
    help="Form of score, one of those that the help describes; repeat the option for several  [default: eq20, elbo, iw "
    "and prior]",
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace earlier results in --out")


@click.command(
    cls=Command,
    first=("inside", "outside", "data_root", "ks", "modes", "out", "samples", "draws", "seed", "device", "as_json"),
)
@PRIOR
@click.option(
    "--in", "inside", help=f"Images of the known kind: {DATA_FORMS}  [default: what the prior was trained on]"
)
@click.option(
    "--outliers",
    "outside",
    multiple=True,
    help=f"Outliers: {DATA_FORMS}, or the words noise or constant; repeat the option for several sets",
)
@DATA_ROOT
@click.option(
    "--k",
    "ks",
    default="all",
    show_default=True,
    help="Numbers of latent groups, counted from the bottom, that are not inferred from the image: e.g. 0,1,2",
)
@MODE
@click.option(
    "--lower",
    "lowers",
    type=click.Choice(LOWERS),
    multiple=True,
    help="Values of the latent groups that are not inferred: samples of the prior given the other groups, or means of "
    "the backbone's prior  [default: both]",
)
@click.option("--out", metavar="PATH", multiple=True, help=FOLDER)
@OLD_FOLDER
@OVERWRITE
@CONFIG
@config_options(OutlierConfig)
@config_options(SamplerConfig, wording={"": RECORDED}, section="Sampler")
@RUN_SEED
@PLACE
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
    modes: tuple[Mode | Derived, ...],
    lowers: tuple[Lower, ...],
    out: tuple[str, ...],
    old_out: Path | None,
    overwrite: bool,
    config_file: Path | None,
    seed: int | None,
    passes: Passes,
    as_json: bool,
    **given: Any,
) -> None:
    """Tell outliers from images of the known kind by L^{>k} and LLR^{>k} (Eqs. 20, 21), with f and without.

    Modes: eq20 of the paper; elbo, the bound of the backbone; iw, elbo with L^{>0} importance-weighted; prior, eq20
    without log p(x|z); and of L^{>0} alone: complexity, iw plus the nats of the image's PNG file; typicality, the
    distance of iw from its mean over held-out normal images; composite, the density of the terms of L^{>0} fitted to
    held-out normal images.

    Each set of outliers is compared with the images of --in. For the other direction exchange --in and --outliers, with
    a prior that was trained on images of the outliers' kind.
    """
    outside, chosen = sets_and_folder(outside, out, old_out)
    stored = read_parts(config_file, ood=OutlierConfig, sampler=SamplerConfig)
    config = resolve(OutlierConfig(), given | {"seed": seed}, stored["ood"])
    loaded = load_prior(prior, checkpoint=checkpoint, force=force, device=passes.device, dtype=passes.dtype)
    folder = chosen or places.next_free(places.beside(prior), "ood")
    require_folder(folder, overwrite)
    own(folder)
    loaded.sampler = resolve(loaded.sampler, given, stored["sampler"])
    images, shape = Opener(data_root, download, of_prior(prior)), loaded.backbone.image_shape
    open_set = partial(outlier_sets.open_set, shape=shape, n=config.samples, seed=config.seed, open_with=images.typed)
    if inside is not None:
        known = open_set(inside)
    else:
        named = partial(backbones.named_data, prior_record(prior)["record"], str(prior), option="--in")
        known = images.held_out(otherwise=named, shape=shape, option="--in")[0]
    sets: list[Images] = [known, *map(open_set, outside)]
    forms = every_form(parsed_k(ks, len(loaded.backbone.groups)), modes or MODES, lowers or LOWERS)
    refuse_unused(given, ("reference",), needs_reference(forms), NO_REFERENCE)
    sizes = set_sizes(known, sets[1:], forms, config)
    with Bar("ood", len(sets) * sizes.each + sizes.reference) as bar:
        result, columns, scored = find_outliers(loaded, sets[0], sets[1:], forms, config, progress=bar)
    title = f"{scored[0].name} (in) and {few(each.name for each in scored[1:])} (out)"
    result |= {"prior": str(prior), "command": typed_command()}
    result["files"] = write_results(folder, result, columns, scored, title)
    show_result(result, as_json, findings.outlier_tables)


def sets_and_folder(
    outliers: tuple[str, ...], out: tuple[str, ...], old_out: Path | None
) -> tuple[tuple[str, ...], Path | None]:
    """The sets of outliers and the folder of the results, from --outliers and --out.

    The old spellings, --out for the sets and --to for the folder, still work, with a remark. Raises click.UsageError.
    """
    if not outliers and not out:
        raise click.UsageError("no outliers are given: pass --outliers, once for each set of images")
    if not outliers:
        new = "--outliers for the sets" + ", --out for the folder" * (old_out is not None)
        click.echo(f"remark: --out with sets of outliers is an old spelling: {new}", err=True)
        return out, old_out
    if len(out) > 1 or "" in out:
        raise click.UsageError(f"--out takes one folder for the results, found {few(map(repr, out))}")
    return outliers, folder_of(Path(out[0]) if out else None, old_out)


def folder_of(out: Path | None, old_out: Path | None) -> Path | None:
    """The value of --out, or of its old spelling --to, with a remark. Raises click.UsageError where both are given."""
    if old_out is None:
        return out
    if out is not None:
        raise click.UsageError("--to is the old spelling of --out: give one of them")
    click.echo("remark: --to is an old spelling: --out", err=True)
    return old_out


def parsed_k(text: str, groups: int) -> list[int]:
    """The values of k in `text`: the word all, or numbers with commas between them. Raises ConfigurationError."""
    if text == "all":
        return list(range(groups))
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        ks = [-1]
    if not 0 <= ks[0] <= ks[-1] < groups:
        raise ConfigurationError(
            f"--k: expected all, or numbers from 0 to {groups - 1} with commas between them (the backbone has {groups} "
            f"groups), found {text!r}"
        )
    return ks


@click.command(
    cls=Command,
    first=(
        "normal",
        "anomalies",
        "labels",
        "data_root",
        "modes",
        "out",
        "overwrite",
        "draws",
        "seed",
        "device",
        "as_json",
    ),
)
@PRIOR
@click.option("--normal", required=True, help=f"Normal images: {DATA_FORMS}; those with --labels are left out")
@click.option(
    "--test", "anomalies", required=True, help=f"Anomalies: {DATA_FORMS}; only images with --labels, if given"
)
@click.option("--labels", type=int, multiple=True, help="Label of the anomalies; repeat the option for several")
@DATA_ROOT
@MODE
@click.option("--out", type=PATH, help=FOLDER)
@OLD_FOLDER
@OVERWRITE
@CONFIG
@config_options(OutlierConfig, skip=("seed", "samples"))
@RUN_SEED
@PLACE
@JSON
def anomaly(
    prior: Path,
    checkpoint: str | None,
    force: bool,
    normal: str,
    anomalies: str,
    labels: tuple[int, ...],
    modes: tuple[Mode | Derived, ...],
    data_root: Path | None,
    download: bool,
    out: Path | None,
    old_out: Path | None,
    overwrite: bool,
    config_file: Path | None,
    seed: int | None,
    passes: Passes,
    as_json: bool,
    **given: Any,
) -> None:
    """Tell anomalies from normal images by L^{>0}, the unnormalised log-posterior (§5.4, Table 4).

    The help of ood describes the modes. Where typicality or composite is one of them, the normal images that they hold
    out are not scored.
    """
    chosen = folder_of(out, old_out)
    config = resolve(OutlierConfig(), given | {"seed": seed}, config_file)
    refuse_unused(given, ("reference",), needs_reference([Form(0, mode=mode) for mode in modes]), NO_REFERENCE)
    loaded = load_prior(prior, checkpoint=checkpoint, force=force, device=passes.device, dtype=passes.dtype)
    folder = chosen or places.next_free(places.beside(prior), "anomaly")
    require_folder(folder, overwrite)
    own(folder)
    shape = loaded.backbone.image_shape
    images = Opener(data_root, download, of_prior(prior))
    known, strange = (images.typed(spec, split="test", image_shape=shape) for spec in (normal, anomalies))
    known, strange = (
        outlier_sets.labelled(known, labels, among=False),
        outlier_sets.labelled(strange, labels, among=True),
    )
    with Bar("anomaly", len(known) + len(strange)) as bar:
        result, columns, scored = find_anomalies(loaded, known, strange, config, modes=modes or MODES, progress=bar)
    result |= {"prior": str(prior), "command": typed_command()}
    result["files"] = write_results(
        folder, result, columns, scored, f"Anomalies of {scored[1].name} among {scored[0].name}"
    )
    show_result(result, as_json, findings.outlier_tables)
