"""The command that draws from a prior: sample."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ebm_prior.cli.help import Command, Option
from ebm_prior.cli.options import Drawing, config_options
from ebm_prior.cli.preflight import Kept, for_samples
from ebm_prior.cli.progress import Bar
from ebm_prior.cli.shared import (
    CALIBRATED,
    CONFIG,
    ITS_BACKBONE,
    JSON,
    PASSES,
    RECORDED,
    RUN_SEED,
    launched_processes,
    opened_prior,
    own,
    preflight,
    show_result,
)
from ebm_prior.cli.types import PATH, PRIOR_FILE, require_suffix
from ebm_prior.model.passes import Passes
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.model.traces import SHORTEST, Diagnosis, diagnose, long_enough
from ebm_prior.reports import mixing, summaries
from ebm_prior.runs import samples
from ebm_prior.settings import read_parts, resolve
from ebm_prior.storage import places

AUTO = "auto"


class _Steps(click.types.IntParamType):
    """A number of steps, or the word auto."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or the word."""
        return AUTO if value == AUTO else super().convert(value, param, ctx)


@click.command(
    cls=Command,
    first=("number", "out", "compare", "overwrite", "checkpoint", "steps", "temperature", "seed", "device", "as_json"),
)
@click.argument("prior", type=PRIOR_FILE, required=False)
@click.option("-n", "--number", type=click.IntRange(1), default=64, show_default=True, help="Number of samples to draw")
@click.option(
    "--out",
    type=PATH,
    help="File or folder to write: a .png grid, .npz arrays, or (without suffix) a folder of PNG files  "
    "[default: the next free drawn-001.png, drawn-002.png, … beside PRIOR]",
)
@click.option(
    "--compare", is_flag=True, help="Show the backbone's own samples beside those of the prior, in a .png grid"
)
@click.option("--overwrite", is_flag=True, help="Replace what exists at --out")
@ITS_BACKBONE
@CALIBRATED
@click.option(
    "--chunk",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Samples computed at a time, rounded to blocks of 64; no result depends on it",
)
@click.option(
    "--diagnose",
    "diagnosed",
    is_flag=True,
    help="Run 16 more chains of the sampler, and say whether they have mixed: split R̂, effective sample sizes and "
    "autocorrelation times",
)
@CONFIG
@click.option(
    "--steps",
    cls=Option,
    section="Sampler",
    type=_Steps(),
    help="Steps of the Markov kernel after the choice among the proposals; auto: ten autocorrelation times of the "
    "slowest quantity, found by trial chains  [default: as recorded]",
)
@config_options(SamplerConfig, skip=("seed", "steps"), wording={"": RECORDED}, section="Sampler")
@RUN_SEED
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
    calibrated: bool,
    chunk: int,
    diagnosed: bool,
    config_file: Path | None,
    steps: Any,
    seed: int | None,
    passes: Passes,
    as_json: bool,
    **given: Any,
) -> None:
    """Draw images from a prior, by the sampler recorded in it unless options say otherwise.

    Without PRIOR it is the newest one under ./runs.
    """
    processes, stored = launched_processes(), read_parts(config_file, drawing=Drawing, sampler=SamplerConfig)
    seed = resolve(Drawing(), {"seed": seed}, stored["drawing"]).seed
    if prior is None:
        prior = processes.of_first(places.newest_prior)
        click.echo(f"prior: {prior}, the newest under ./runs", err=True)
    out = out or processes.of_first(partial(places.next_drawing, prior))
    require_suffix(out, ".png", ".npz", "", why="without a suffix it is a folder")
    if compare and out.suffix != ".png":
        raise click.UsageError(f"--compare shows samples in a grid: it needs --out with .png, found {out}")
    processes.of_first(partial(samples.require_place, out, overwrite))
    if not out.suffix and processes.first:
        own(out)
    loaded = opened_prior(prior, passes, checkpoint=checkpoint, force=force, calibrated=calibrated).sampling
    sampler = resolve(loaded.sampler, given | {"steps": SHORTEST if steps == AUTO else steps}, stored["sampler"])
    kept = Kept.LATENTS if samples.holds_latents(out) else Kept.PIXELS
    preflight(for_samples(loaded, number, chunk, sampler, passes, kept=kept), passes.device)
    loaded.backbone = passes.apply(loaded.backbone)
    sampler, found = _diagnosis(loaded, sampler, seed, steps == AUTO, diagnosed)
    with Bar("sample", number) as bar:
        told: dict[str, Any] = {"progress": bar, "processes": processes}
        drawn = samples.draw_samples(loaded, number, out, seed=seed, sampler=sampler, chunk=chunk, **told)
    if drawn is None:  # in all processes but the first
        return
    files = samples.write_samples(loaded, drawn, out, seed=seed, compare=compare)
    result = samples.describe_samples(drawn, sampler, seed, files)
    if found is not None:
        result["mixing"] = mixing.as_plain(found)
    if refused := summaries.refusal_text(result):
        click.echo(f"remark: {refused}", err=True)
    show_result(result, as_json, mixing.sample_text)


def _diagnosis(
    prior: EBMPrior, sampler: SamplerConfig, seed: int, automatic: bool, asked: bool
) -> tuple[SamplerConfig, Diagnosis | None]:
    """The sampler, with as many steps as it needs if these are `automatic`, and its diagnosis if it was `asked` for.

    What speaks against it is said on stderr.
    """
    if automatic:
        sampler, found = long_enough(prior, sampler, seed=seed)
        click.echo(f"steps: {sampler.steps}, chosen by {found.chains} chains of {found.steps}", err=True)
    elif asked:
        found = diagnose(prior, sampler, seed=seed)
    else:
        return sampler, None
    if said := mixing.remark(found):
        click.echo(f"remark: {said}", err=True)
    return sampler, found if asked else None
