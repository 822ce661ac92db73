"""The commands that score images: ood and anomaly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ebm_prior.cli.help import Command
from ebm_prior.cli.options import config_options
from ebm_prior.cli.progress import Bar
from ebm_prior.cli.shared import (
    DATA_FORMS,
    DATA_ROOT,
    JSON,
    PLACE,
    PRIOR,
    RECORDED,
    SEED,
    open_images,
    own,
    show_result,
    together,
    typed_command,
)
from ebm_prior.cli.types import PATH
from ebm_prior.data import outlier_sets
from ebm_prior.errors import ConfigurationError
from ebm_prior.evaluation.outliers import OutlierConfig, every_form, find_anomalies, find_outliers, set_size
from ebm_prior.model.passes import Passes
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.model.scores import LOWERS, MODES, Lower, Mode
from ebm_prior.reports import findings
from ebm_prior.runs import backbones
from ebm_prior.runs.outliers import require_folder, write_results
from ebm_prior.settings import resolve
from ebm_prior.storage import places
from ebm_prior.storage.checkpoint import load_prior, prior_record

RESULTS = together(
    click.option("--to", type=PATH, help="folder of the results  [default: the next free one beside PRIOR]"),
    click.option("--overwrite", is_flag=True, help="replace the results that lie in --to"),
)


@click.command(
    cls=Command,
    first=("inside", "outside", "data_root", "ks", "modes", "to", "samples", "draws", "seed", "device", "as_json"),
)
@PRIOR
@click.option(
    "--in", "inside", help=f"images of the known kind, {DATA_FORMS}  [default: what the prior was trained on]"
)
@click.option(
    "--out",
    "outside",
    multiple=True,
    required=True,
    help=f"outliers, {DATA_FORMS}, or noise, constant; repeat the option for several",
)
@DATA_ROOT
@click.option(
    "--k",
    "ks",
    default="all",
    show_default=True,
    help="numbers of groups, counted from the bottom, that are not inferred: e.g. 0,1,2",
)
@click.option(
    "--mode",
    "modes",
    type=click.Choice(MODES),
    multiple=True,
    help="eq20: as in the paper; elbo: as in the backbone's own bound; iw: elbo with L^{>0} importance-weighted; "
    "prior: L^{>0} as in eq20, without log p(x|z)  [default: all]",
)
@click.option(
    "--lower",
    "lowers",
    type=click.Choice(LOWERS),
    multiple=True,
    help="groups that are not inferred: drawn from the prior given the others, or means of the backbone's prior  "
    "[default: both]",
)
@RESULTS
@config_options(OutlierConfig)
@config_options(SamplerConfig, wording={"": RECORDED}, section="Sampler")
@SEED
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
    modes: tuple[Mode, ...],
    lowers: tuple[Lower, ...],
    to: Path | None,
    overwrite: bool,
    seed: int,
    passes: Passes,
    as_json: bool,
    **given: Any,
) -> None:
    """Tell outliers from images of the known kind by L^{>k} and LLR^{>k} (Eqs. 20, 21), with f and without."""
    config = replace(resolve(OutlierConfig(), given), seed=seed)
    loaded = load_prior(prior, checkpoint=checkpoint, force=force, device=passes.device, dtype=passes.dtype)
    to = to or places.next_free(places.beside(prior), "ood")
    require_folder(to, overwrite)
    own(to)
    loaded.sampler = resolve(loaded.sampler, given)
    known = inside or backbones.named_data(prior_record(prior)["record"], str(prior), option="--in")
    shape = loaded.backbone.image_shape
    sets = [
        outlier_sets.open_set(
            spec, shape, config.samples, seed=seed, open_with=open_images, data_root=data_root, download=download
        )
        for spec in (known, *outside)
    ]
    numbers = parsed_k(ks, len(loaded.backbone.groups))
    forms = every_form(numbers, modes or MODES, lowers or LOWERS)
    with Bar("ood", len(sets) * set_size(sets[0], sets[1:], config)) as bar:
        result, columns, scored = find_outliers(loaded, sets[0], sets[1:], forms, config, progress=bar)
    title = f"{scored[0].name} (in) and {', '.join(each.name for each in scored[1:])} (out)"
    result |= {"prior": str(prior), "command": typed_command()}
    result["files"] = write_results(to, result, columns, scored, title)
    show_result(result, as_json, findings.outlier_tables)


def parsed_k(text: str, groups: int) -> list[int]:
    """`all`, or numbers with commas between them: 0,1,2. Raises ConfigurationError."""
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
    first=("normal", "anomalies", "labels", "data_root", "to", "overwrite", "draws", "seed", "device", "as_json"),
)
@PRIOR
@click.option("--normal", required=True, help=f"normal images, {DATA_FORMS}; those with --labels are left out")
@click.option("--test", "anomalies", required=True, help=f"anomalies, {DATA_FORMS}: the images with --labels, or all")
@click.option("--labels", type=int, multiple=True, help="label of anomalies; repeat the option for several")
@DATA_ROOT
@RESULTS
@config_options(OutlierConfig, skip=("seed", "samples"))
@SEED
@PLACE
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
    passes: Passes,
    as_json: bool,
    **given: Any,
) -> None:
    """Tell anomalies from normal images by L^{>0}, the unnormalised log-posterior (§5.4, Table 4)."""
    config = replace(resolve(OutlierConfig(), given), seed=seed)
    loaded = load_prior(prior, checkpoint=checkpoint, force=force, device=passes.device, dtype=passes.dtype)
    to = to or places.next_free(places.beside(prior), "anomaly")
    require_folder(to, overwrite)
    own(to)
    shape = loaded.backbone.image_shape
    known, strange = (
        open_images(spec, split="test", data_root=data_root, download=download, image_shape=shape)
        for spec in (normal, anomalies)
    )
    known, strange = (
        outlier_sets.labelled(known, labels, among=False),
        outlier_sets.labelled(strange, labels, among=True),
    )
    with Bar("anomaly", len(known) + len(strange)) as bar:
        result, columns, scored = find_anomalies(loaded, known, strange, config, progress=bar)
    result |= {"prior": str(prior), "command": typed_command()}
    result["files"] = write_results(
        to, result, columns, scored, f"Anomalies of {scored[1].name} among {scored[0].name}"
    )
    show_result(result, as_json, findings.outlier_tables)
