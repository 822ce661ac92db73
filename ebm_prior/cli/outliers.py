"""The commands that score images: ood and anomaly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from ebm_prior.cli.types import PATH, PRIOR_FILE
from ebm_prior.data import outlier_sets
from ebm_prior.data.source import ImageSource
from ebm_prior.errors import ConfigurationError, few
from ebm_prior.evaluation.outliers import (
    OutlierConfig,
    every_form,
    find_anomalies,
    find_outliers,
    needs_reference,
    set_sizes,
)
from ebm_prior.interfaces import Images, Progress
from ebm_prior.model.passes import Passes
from ebm_prior.model.prior import EBMPrior
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
WHOLE = "the chosen modes are of L^{>0} alone"
NO_LOWER = "there is no form of score here with k above 0"
NOT_SAMPLED = "no form of score here samples latent groups"
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
    first=(
        "inside",
        "outside",
        "reverse",
        "data_root",
        "ks",
        "modes",
        "out",
        "samples",
        "draws",
        "seed",
        "device",
        "as_json",
    ),
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
@click.option(
    "--reverse",
    type=PRIOR_FILE,
    multiple=True,
    help="Prior fitted to images like those of the first --outliers, which it tells from the images of --in for the "
    "other direction; repeat the option for the further --outliers in their order",
)
@DATA_ROOT
@click.option(
    "--k",
    "ks",
    help="Numbers of latent groups, counted from the bottom, that are not inferred from the image, e.g. 0,1,2; only in "
    "modes that have L^{>k} or LLR^{>k}  [default: all]",
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
    reverse: tuple[Path, ...],
    data_root: Path | None,
    download: bool,
    ks: str | None,
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

    Modes: eq20 of the paper; elbo, the bound of the backbone; iw, elbo with L^{>0} importance-weighted; prior, L^{>0}
    of eq20 without log p(x|z). Three more are of L^{>0} alone: complexity, iw plus the nats of a PNG file of the image
    as the likelihood sees it; typicality, the distance of iw from its mean over held-out normal images; composite, the
    density of the terms of L^{>0}, fitted to held-out normal images.

    Each set of outliers is compared with the images of --in. --reverse adds the other direction, from a prior that was
    fitted to the outliers' kind of images; its folder of results lies beside --out, with -reverse-1 after the name.
    """
    outside, chosen = sets_and_folder(outside, out, old_out)
    if len(reverse) > len(outside):
        raise click.UsageError(f"--reverse is given {len(reverse)} times, and --outliers {len(outside)} times")
    stored = read_parts(config_file, ood=OutlierConfig, sampler=SamplerConfig)
    config = resolve(OutlierConfig(), given | {"seed": seed}, stored["ood"])
    sides: list[Side] = []
    for path in (prior, *reverse):
        place, forced = (None, False) if sides else (checkpoint, force)
        loaded = load_prior(path, checkpoint=place, force=forced, device=passes.device, dtype=passes.dtype)
        loaded.sampler = resolve(loaded.sampler, given, stored["sampler"])
        forms = every_form(parsed_k(ks or "all", len(loaded.backbone.groups)), modes or MODES, lowers or LOWERS)
        sides.append(Side(path, loaded, Opener(data_root, download, of_prior(path)), forms, config))
    refuse_unused_options(given | {"k": ks, "lower": lowers or None}, modes, sides[0].forms)
    folder = chosen or places.next_free(places.beside(prior), "ood")
    folders = [folder, *(folder.with_name(f"{folder.name}-reverse-{i}") for i in range(1, len(sides)))]
    for each in folders:
        require_folder(each, overwrite)
        own(each)
    known = sides[0].recorded() if inside is None else inside
    specs = [[known, *outside], *([theirs, known] for theirs in outside[: len(reverse)])]
    sets = [side.opened(named) for side, named in zip(sides, specs, strict=True)]
    with Bar("ood", sum(map(Side.work, sides, sets))) as bar:
        results = [side.measured(each, to, bar) for side, each, to in zip(sides, sets, folders, strict=True)]
    show_result(results if reverse else results[0], as_json, findings.outlier_tables)


class Side(NamedTuple):
    """A prior of `ood`, what opens images for it, the forms of its scores, and the settings."""

    path: Path
    prior: EBMPrior
    opener: Opener
    forms: list[Form]
    config: OutlierConfig

    def recorded(self) -> ImageSource:
        """Held-out images of the kind on which the prior was trained. Raises ConfigurationError, DataError."""
        named = partial(backbones.named_data, prior_record(self.path)["record"], str(self.path), option="--in")
        shape = self.prior.backbone.image_shape
        return self.opener.held_out(otherwise=named, shape=shape, option="--in")[0]

    def opened(self, specs: Sequence[str | ImageSource]) -> list[Images]:
        """The sets of images that `specs` name, in the shape of the backbone's images. Raises DataError."""
        shape, n, seed = self.prior.backbone.image_shape, self.config.samples, self.config.seed
        return [outlier_sets.open_set(spec, shape, n, seed=seed, open_with=self.opener.typed) for spec in specs]

    def work(self, sets: Sequence[Images]) -> int:
        """Number of images to score. Raises DataError where there are too few."""
        sizes = set_sizes(sets[0], sets[1:], self.forms, self.config)
        return len(sets) * sizes.each + sizes.reference

    def measured(self, sets: Sequence[Images], folder: Path, progress: Progress) -> dict[str, Any]:
        """Compare each further set with the first, the known images, and write the folder; returns the result."""
        result, columns, scored = find_outliers(
            self.prior, sets[0], sets[1:], self.forms, self.config, progress=progress
        )
        title = f"{scored[0].name} (in) and {few(each.name for each in scored[1:])} (out)"
        result |= {"prior": str(self.path), "command": typed_command()}
        result["files"] = write_results(folder, result, columns, scored, title)
        return result


def refuse_unused_options(given: Mapping[str, Any], modes: Sequence[Mode | Derived], forms: Sequence[Form]) -> None:
    """Refuse options of `ood` without effect on the `forms` of scores that they and the chosen `modes` lead to.

    Raises click.UsageError.
    """
    has_k = not modes or any(form.k for form in every_form([1], modes, LOWERS))
    refuse_unused(given, ("k", "lower"), has_k, WHOLE)
    if "prior" in modes and Form(0, mode="prior") not in forms:
        raise click.UsageError("--mode prior is of L^{>0} alone: add 0 to --k, or leave out --mode prior")
    refuse_unused(given, ("lower",), any(form.k for form in forms), NO_LOWER)
    sampled = any(form.k and form.lower == "sample" for form in forms)
    refuse_unused(given, tuple(entry.name for entry in fields(SamplerConfig)), sampled, NOT_SAMPLED)
    refuse_unused(given, ("reference",), needs_reference(forms), NO_REFERENCE)


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
