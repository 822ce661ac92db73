"""Scores of sets of images, and their quality in detecting outliers and anomalies (`ebm-prior ood` and `anomaly`).

Besides the forms of `ebm_prior.model.scores` there are three modes of L^{>0} (`DERIVED`) that are made of others:

    complexity   L^{>0} iw, a bound on log p(x), plus the nats of a lossless code of x (Serrà et al. 2020)
    typicality   − |L^{>0} iw − its mean over the reference images| (Nalisnick et al. 2019)
    composite    the log density of the image's terms (`EBMPrior.terms`) under a Gaussian fitted to the reference images

x is what the likelihood models, for instance binarised pixels. Reference images are normal ones that are not among the
images scored. No outlier has a part in any of the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_prior.compute.randomness import Purpose, chunks, derived_generator
from ebm_prior.errors import DataError
from ebm_prior.evaluation.detection import Detection, detection, interval, resampled
from ebm_prior.evaluation.normality import TermDensity, code_length
from ebm_prior.interfaces import SILENT, Images, Progress
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.scores import DERIVED, MODES, Derived, Form, Lower, Mode, observed
from ebm_prior.model.terms import CEILING, ENERGY
from ebm_prior.settings import require_kinds, require_positive, require_seed, setting

Array = NDArray[np.float64]


@dataclass(frozen=True)
class OutlierConfig:
    """Settings of an evaluation of outlier scores."""

    samples: int = setting(10_000, "Largest number of images per set; the smallest set limits all sets")
    reference: int = setting(
        1_000,
        "Normal images, at most half of all, that are held out from the scored ones for the modes typicality and "
        "composite",
    )
    draws: int = setting(8, "Draws of the latents per image over which a score averages (S)")
    resamples: int = setting(500, "Bootstrap resamples from which the 95 % intervals are computed")
    chunk: int = setting(256, "Images computed at a time, rounded to blocks of 64; no result depends on it")
    seed: int = setting(0, "Seed of all random numbers")

    def __post_init__(self) -> None:
        require_kinds(self)
        require_positive(self, "samples", "reference", "draws", "resamples", "chunk")
        require_seed(self)


class Scored(NamedTuple):
    """A set of images, their scores, and what users can make scores of their own from."""

    name: str
    rows: NDArray[np.int64]  # (N,): which images of the source
    values: Array  # (N, number of forms), nats
    terms: dict[str, Array]  # by name, (N,) nats each
    code: Array  # (N,): nats of a lossless code of what the likelihood models


class Sizes(NamedTuple):
    """Numbers of images."""

    each: int  # of every set that is scored
    reference: int  # of normal images beside them; 0 where no form needs any


def every_form(ks: Sequence[int], modes: Sequence[Mode | Derived], lowers: Sequence[Lower]) -> list[Form]:
    """L^{>k} for every k, LLR^{>k} for every k but 0, in every mode and with every kind of lower groups, with f.

    "iw" has a meaning of its own in L^{>0} and in ratios, "prior" in L^{>0}. The modes in `DERIVED` are of L^{>0},
    whatever `ks` are.
    """
    measured = [mode for mode in modes if mode not in DERIVED]
    ways = [(k, mode, lower) for k in ks for mode in measured for lower in (lowers if k else lowers[:1])]
    plain = [Form(k, False, mode, lower) for k, mode, lower in ways if mode in ("eq20", "elbo") or not k]
    ratios = [Form(k, True, mode, lower) for k, mode, lower in ways if k and mode != "prior"]
    return plain + [Form(0, mode=mode) for mode in modes if mode in DERIVED] + ratios


def needs_reference(forms: Sequence[Form]) -> bool:
    """Whether a form compares images with held-out normal ones."""
    return any(form.mode in ("typicality", "composite") for form in forms)


def order_of(images: Images, n: int, seed: int) -> Tensor:
    """The rows of a set of images, in a random order where there are more than the n of which the first are used."""
    if len(images) <= n:
        return torch.arange(len(images))
    return torch.randperm(len(images), generator=derived_generator(seed, Purpose.OUTLIER_CHOICE))


def score_set(
    prior: EBMPrior,
    images: Images,
    forms: Sequence[Form],
    config: OutlierConfig,
    *,
    rows: Tensor,
    progress: Progress = SILENT,
) -> Scored:
    """Scores of the images `rows` of a set, in no form of `DERIVED`. progress: advances by the images."""
    parts, terms, codes = [], [], []
    for first, count in chunks(len(rows), config.chunk):
        batch = images.batch(rows[first : first + count])
        found, own_terms = prior.scores_and_terms(
            batch, forms, draws=config.draws, seed=config.seed, first=first, chunk=config.chunk
        )
        parts.append(torch.stack([found[form] for form in forms], dim=1).double().cpu().numpy())
        terms.append(own_terms)
        codes.append(code_length(observed(prior.backbone, batch, seed=config.seed, first=first)))
        progress.advance(len(batch))
    joined = {name: torch.cat([part[name] for part in terms]).double().cpu().numpy() for name in terms[0]}
    return Scored(images.name, rows.numpy(), np.concatenate(parts), joined, np.concatenate(codes))


def score_sets(
    prior: EBMPrior,
    sets: Sequence[tuple[Images, int]],
    reference: int,
    forms: Sequence[Form],
    config: OutlierConfig,
    *,
    progress: Progress = SILENT,
) -> list[Scored]:
    """Scores in all forms of the given numbers of images of each set, the first of which is the normal one.

    Where a set has more images, they are drawn without replacement. reference: number of normal images to hold out.
    """
    bounds = [Form(0, mode="iw", energy=energy) for energy in (True, False)]
    derived = [form for form in forms if form.mode in DERIVED]
    used = {form.energy for form in derived if form.mode != "composite"}
    measured = [form for form in forms if form not in derived]
    measured += [form for form in bounds if form.energy in used and form not in measured]
    scored, held_out = [], None
    for number, (images, n) in enumerate(sets):
        rows = order_of(images, n, config.seed)
        if number == 0 and reference:
            beside = rows[n : n + reference].sort().values
            held_out = score_set(prior, images, measured, config, rows=beside, progress=progress)
        rows = rows[:n].sort().values
        scored.append(score_set(prior, images, measured, config, rows=rows, progress=progress))
    return [_in_all_forms(each, forms, measured, held_out) for each in scored]


def _in_all_forms(scored: Scored, forms: Sequence[Form], measured: Sequence[Form], reference: Scored | None) -> Scored:
    """`scored`, which has a column per form in `measured`, with one per form in `forms`."""

    def column(form: Form, images: Scored) -> Array:
        return images.values[:, measured.index(form)]

    def values(form: Form) -> Array:
        bound = Form(0, mode="iw", energy=form.energy)
        if form in measured:
            return column(form, scored)
        if form.mode == "complexity":
            return column(bound, scored) + scored.code
        assert reference is not None
        if form.mode == "typicality":
            found: Array = -np.abs(column(bound, scored) - column(bound, reference).mean())
            return found
        return TermDensity(_weighed(reference, form.energy)).log_density(_weighed(scored, form.energy))

    return scored._replace(values=np.stack([values(form) for form in forms], axis=1))


def _weighed(scored: Scored, energy: bool) -> Array:
    """The terms that the composite score weighs, (N, T), with those of the energy or without.

    What a ceiling takes from f is a function of the other terms.
    """
    names = [name for name in scored.terms if name != CEILING and (energy or not name.startswith(ENERGY))]
    return np.stack([scored.terms[name] for name in names], axis=1)


def compare(forms: Sequence[Form], outlying: Scored, others: Scored, config: OutlierConfig) -> list[dict[str, Any]]:
    """One row per form: its detection with and without f, and the paired difference, with 95 % intervals.

    `forms`: pairs, a form with f followed by the same without. Where only forms without f were scored, rows have no f.
    """
    columns = {form: (-1.0 if not form.ratio else 1.0, index) for index, form in enumerate(forms)}
    values = [
        {form.name: sign * scored.values[:, index] for form, (sign, index) in columns.items()}
        for scored in (outlying, others)
    ]
    drawn = resampled(*values, resamples=config.resamples, seed=config.seed)
    rows = []
    for form in (form for form in forms if not form.energy):
        row: dict[str, Any] = {"k": form.k, "score": "LLR" if form.ratio else "L", "mode": form.mode}
        row["lower"] = form.lower if form.k else None
        for key, variant in (("f=0", form), ("f", form._replace(energy=True))):
            if variant in columns:
                row[key] = _described(detection(values[0][variant.name], values[1][variant.name]), drawn[variant.name])
        if "f" in row:
            change = [row["f"][key] - row["f=0"][key] for key in Detection._fields]
            row["gain"] = _described(Detection(*change), drawn[form._replace(energy=True).name] - drawn[form.name])
        rows.append(row)
    return rows


def _described(value: Detection, drawn: Array) -> dict[str, Any]:
    around = interval(drawn)
    return value._asdict() | {"low": around.low._asdict(), "high": around.high._asdict()}


def find_outliers(
    prior: EBMPrior,
    inside: Images,
    outside: Sequence[Images],
    forms: Sequence[Form],
    config: OutlierConfig,
    *,
    progress: Progress = SILENT,
) -> tuple[dict[str, Any], list[Form], list[Scored]]:
    """Scores of equally many images of every set, `inside` first, and how well they tell each other set from it.

    forms: with f. They are scored without f, too, on the same draws. Returns the result (plain values), the forms in
    the order of the columns, and the scores.
    """
    sizes = set_sizes(inside, outside, forms, config)
    both = [variant for form in forms for variant in (form, form._replace(energy=False))]
    sets = [(images, sizes.each) for images in (inside, *outside)]
    scored = score_sets(prior, sets, sizes.reference, both, config, progress=progress)
    result = {
        "in": inside.name,
        "images": sizes.each,
        **_conditions(prior, config, sizes.reference),
        "sets": [{"out": other.name, "rows": compare(both, other, scored[0], config)} for other in scored[1:]],
    }
    return result, both, scored


def _conditions(prior: EBMPrior, config: OutlierConfig, reference: int) -> dict[str, Any]:
    """The settings on which scores and intervals depend, for the result."""
    return {
        "draws": config.draws,
        "resamples": config.resamples,
        "seed": config.seed,
        "sampler": asdict(prior.sampler),
        "tau": prior.tau,
        **({"reference": reference} if reference else {}),
    }


def set_sizes(inside: Images, outside: Sequence[Images], forms: Sequence[Form], config: OutlierConfig) -> Sizes:
    """Numbers of images: per set that of the smallest, at most `config.samples`, and of reference images beside them.

    Raises DataError where the normal images are too few for a reference.
    """
    reference = reference_size(inside, forms, config)
    return Sizes(min(config.samples, len(inside) - reference, *(len(images) for images in outside)), reference)


def reference_size(normal: Images, forms: Sequence[Form], config: OutlierConfig) -> int:
    """Number of normal images held out as a reference; 0 where no form needs any.

    Raises DataError where the images are too few for a reference.
    """
    if not needs_reference(forms):
        return 0
    if len(normal) < 4:
        raise DataError(
            f"{normal.name}: expected 4 or more normal images, half of them as a reference for the modes "
            f"typicality and composite; found {len(normal)}"
        )
    return min(config.reference, len(normal) // 2)


def find_anomalies(
    prior: EBMPrior,
    normal: Images,
    anomalous: Images,
    config: OutlierConfig,
    *,
    modes: Sequence[Mode | Derived] = MODES,
    progress: Progress = SILENT,
) -> tuple[dict[str, Any], list[Form], list[Scored]]:
    """L^{>0} as the decision function (§5.4, Table 4), in the given modes, over all images of both sets.

    Normal images that serve as a reference are not scored. The result has the "prevalence" of anomalies: it is the
    AUPRC of a score that tells nothing. Returns the same three things as `find_outliers`.
    """
    forms = [Form(0, mode=mode, energy=energy) for mode in modes for energy in (True, False)]
    reference = reference_size(normal, forms, config)
    sizes = [len(normal) - reference, len(anomalous)]
    sets = list(zip((normal, anomalous), sizes, strict=True))
    scored = score_sets(prior, sets, reference, forms, config, progress=progress)
    result = {
        "in": normal.name,
        "images": sizes,
        "prevalence": sizes[1] / sum(sizes),
        **_conditions(prior, config, reference),
        "sets": [{"out": anomalous.name, "rows": compare(forms, scored[1], scored[0], config)}],
    }
    return result, forms, scored
