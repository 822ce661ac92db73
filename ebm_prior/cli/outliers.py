"""Commands that score images: ood and anomaly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ebm_prior.cli.options import config_options
from ebm_prior.cli.progress import Bar
from ebm_prior.cli.shared import (
    DATA_FORMS,
    DATA_ROOT,
    DEVICE,
    DTYPES,
    JSON,
    PATH,
    PRIOR,
    RECORDED,
    SEED,
    own,
    show_result,
    together,
    torch_device,
    typed_command,
)
from ebm_prior.data import outlier_sets
from ebm_prior.data.images import open_images
from ebm_prior.evaluation.outliers import (
    LOWERS,
    MODES,
    OutlierConfig,
    every_form,
    find_anomalies,
    find_outliers,
    parsed_k,
    set_size,
)
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.model.scores import Lower, Mode
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


@click.command()
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
    type=click.Choice(MODES),
    multiple=True,
    help="eq20: the paper's, literally; elbo: as the backbone's own bound; iw: that with L^{>0} importance-weighted; "
    "prior: L^{>0} without log p(x|z)  [default: each]",
)
@click.option(
    "--lower",
    "lowers",
    type=click.Choice(LOWERS),
    multiple=True,
    help="groups not inferred: drawn from the prior given the others, or means of the backbone's  [default: each]",
)
@RESULTS
@config_options(OutlierConfig)
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
    config = replace(resolve(OutlierConfig(), given), seed=seed)
    loaded = load_prior(prior, checkpoint=checkpoint, force=force, device=torch_device(device), dtype=DTYPES[dtype])
    to = to or places.next_free(prior.parent, "ood")
    require_folder(to, overwrite)
    own(to)
    loaded.sampler = resolve(loaded.sampler, given)
    known = inside or backbones.named_data(prior_record(prior)["record"], str(prior), option="--in")
    shape = loaded.backbone.image_shape
    sets = [
        outlier_sets.open_set(spec, shape, config.samples, seed=seed, data_root=data_root, download=download)
        for spec in (known, *outside)
    ]
    numbers = parsed_k(ks, len(loaded.backbone.groups))
    forms = every_form(numbers, modes or MODES, lowers or LOWERS)
    with Bar("ood", len(sets) * set_size(sets[0], sets[1:], config)) as bar:
        result, columns, scored = find_outliers(loaded, sets[0], sets[1:], forms, config, on_images=bar.advance)
    title = f"{scored[0].name} (in) and {', '.join(each.name for each in scored[1:])} (out)"
    result |= {"prior": str(prior), "command": typed_command()}
    result["files"] = write_results(to, result, columns, scored, title)
    show_result(result, as_json, findings.outlier_tables)


@click.command()
@PRIOR
@click.option("--normal", required=True, help=f"normal images, {DATA_FORMS}; those with --labels are left out")
@click.option("--test", "anomalies", required=True, help=f"anomalies, {DATA_FORMS}: the images with --labels, or all")
@click.option("--labels", type=int, multiple=True, help="label of an anomaly; several times for several")
@DATA_ROOT
@RESULTS
@config_options(OutlierConfig, skip=("seed", "samples"))
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
    config = replace(resolve(OutlierConfig(), given), seed=seed)
    loaded = load_prior(prior, checkpoint=checkpoint, force=force, device=torch_device(device), dtype=DTYPES[dtype])
    to = to or places.next_free(prior.parent, "anomaly")
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
        result, columns, scored = find_anomalies(loaded, known, strange, config, on_images=bar.advance)
    result |= {"prior": str(prior), "command": typed_command()}
    result["files"] = write_results(
        to, result, columns, scored, f"Anomalies of {scored[1].name} among {scored[0].name}"
    )
    show_result(result, as_json, findings.outlier_tables)
