"""Scores of sets of images, and their quality in detecting outliers and anomalies (`ebm-prior ood` and `anomaly`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ebm_prior.compute.randomness import Purpose, chunks, derived_generator
from ebm_prior.evaluation.detection import Detection, detection, interval, resampled
from ebm_prior.interfaces import SILENT, Images, Progress
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.scores import MODES, Form, Lower, Mode
from ebm_prior.settings import require_kinds, require_positive, require_seed, setting

Array = NDArray[np.float64]


@dataclass(frozen=True)
class OutlierConfig:
    """Settings of an evaluation of outlier scores."""

    samples: int = setting(10_000, "Largest number of images per set; the smallest set limits all sets")
    draws: int = setting(8, "Draws of the latents per image over which a score averages (S)")
    resamples: int = setting(500, "Bootstrap resamples from which the 95 % intervals are computed")
    chunk: int = setting(256, "Images computed at a time, rounded to blocks of 64; no result depends on it")
    seed: int = setting(0, "Seed of all random numbers")

    def __post_init__(self) -> None:
        require_kinds(self)
        require_positive(self, "samples", "draws", "resamples", "chunk")
        require_seed(self)


class Scored(NamedTuple):
    """A set of images and their scores."""

    name: str
    rows: NDArray[np.int64]  # (N,): which images of the source
    values: Array  # (N, number of forms), nats


def every_form(ks: Sequence[int], modes: Sequence[Mode], lowers: Sequence[Lower]) -> list[Form]:
    """L^{>k} for every k, LLR^{>k} for every k but 0, in every mode and with every kind of lower groups, with f.

    "iw" has a meaning of its own in L^{>0} and in ratios, "prior" in L^{>0}.
    """
    ways = [(k, mode, lower) for k in ks for mode in modes for lower in (lowers if k else lowers[:1])]
    plain = [Form(k, False, mode, lower) for k, mode, lower in ways if mode in ("eq20", "elbo") or not k]
    return plain + [Form(k, True, mode, lower) for k, mode, lower in ways if k and mode != "prior"]


def score_set(
    prior: EBMPrior,
    images: Images,
    forms: Sequence[Form],
    config: OutlierConfig,
    *,
    n: int,
    progress: Progress = SILENT,
) -> Scored:
    """Scores of n images, drawn without replacement where the set has more. progress: advances by the images."""
    rows = torch.arange(len(images))
    if len(images) > n:
        rows = (
            torch.randperm(len(images), generator=derived_generator(config.seed, Purpose.OUTLIER_CHOICE))[:n]
            .sort()
            .values
        )
    parts = []
    for first, count in chunks(len(rows), config.chunk):
        batch = images.batch(rows[first : first + count])
        found = prior.scores(batch, forms, draws=config.draws, seed=config.seed, first=first, chunk=config.chunk)
        parts.append(torch.stack([found[form] for form in forms], dim=1).double().cpu().numpy())
        progress.advance(len(batch))
    return Scored(images.name, rows.numpy(), np.concatenate(parts))


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
    n = set_size(inside, outside, config)
    both = [variant for form in forms for variant in (form, form._replace(energy=False))]
    scored = [score_set(prior, images, both, config, n=n, progress=progress) for images in (inside, *outside)]
    result = {
        "in": inside.name,
        "images": n,
        **_conditions(prior, config),
        "sets": [{"out": other.name, "rows": compare(both, other, scored[0], config)} for other in scored[1:]],
    }
    return result, both, scored


def _conditions(prior: EBMPrior, config: OutlierConfig) -> dict[str, Any]:
    """The settings on which scores and intervals depend, for the result."""
    return {
        "draws": config.draws,
        "resamples": config.resamples,
        "seed": config.seed,
        "sampler": asdict(prior.sampler),
        "tau": prior.tau,
    }


def set_size(inside: Images, outside: Sequence[Images], config: OutlierConfig) -> int:
    """Number of images per set: that of the smallest set, at most `config.samples`."""
    return min(config.samples, *(len(images) for images in (inside, *outside)))


def find_anomalies(
    prior: EBMPrior,
    normal: Images,
    anomalous: Images,
    config: OutlierConfig,
    *,
    progress: Progress = SILENT,
) -> tuple[dict[str, Any], list[Form], list[Scored]]:
    """L^{>0} as the decision function (§5.4, Table 4), in every mode, over all images of both sets.

    The result has the "prevalence" of anomalies: it is the AUPRC of a score that tells nothing. Returns the same three
    things as `find_outliers`.
    """
    forms = [Form(0, mode=mode, energy=energy) for mode in MODES for energy in (True, False)]
    scored = [score_set(prior, s, forms, config, n=len(s), progress=progress) for s in (normal, anomalous)]
    result = {
        "in": normal.name,
        "images": [len(normal), len(anomalous)],
        "prevalence": len(anomalous) / (len(normal) + len(anomalous)),
        **_conditions(prior, config),
        "sets": [{"out": anomalous.name, "rows": compare(forms, scored[1], scored[0], config)}],
    }
    return result, forms, scored
