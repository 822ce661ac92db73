"""Anomaly detection with one digit held out (§5.4, Table 4): the models, their scores, and the table.

The pool is the whole data set, train and test split together. 80 % of the normal images train; the other 20 % and all
anomalies are the test. The score is the unnormalised log posterior L^{>0} (Eq. 20 with k = 0), which is low for an
anomaly. A second score leaves out log p(x|z), which gives the unnormalised log prior of the latents. No epoch is chosen
by its test result: a figure is the mean over the last epochs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_prior.compute.randomness import Purpose, derived_generator
from ebm_prior.data.images import ImageSource, from_array
from ebm_prior.errors import ConfigurationError
from ebm_prior.evaluation.detection import Detection, detection
from ebm_prior.experiments.jobs import clock, named
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.model.scores import Form
from ebm_prior.reports.text import table
from ebm_prior.storage.registry import adapter, build
from ebm_prior.training.joint import train_jointly
from ebm_prior.training.joint_config import JointConfig

DIGITS = (1, 4, 5, 7, 9)
PAPER = {1: 0.470, 4: 0.941, 5: 0.964, 7: 0.815, 9: 0.796}  # AUPRC, Table 4
MOST_AVERAGED = 10  # final epochs

MODELS: dict[str, dict[str, Any]] = {
    "EBM, L=2": {"prior": "ebm", "layers": 2},
    "Gaussian, L=2": {"prior": "gaussian", "layers": 2},
    "LEBM, L=1": {"prior": "ebm", "layers": 1},
}


FORMS = {  # the forms of the score, by the end of a row's name
    "": Form(0),
    ", f = 0": Form(0, energy=False),
    ", prior alone": Form(0, mode="prior"),
    ", prior alone, f = 0": Form(0, mode="prior", energy=False),
}


class Split(NamedTuple):
    """Indices into the pool."""

    train: Tensor  # 80 % of the normal images
    test: Tensor  # the other normal images, then all anomalies
    anomalous: NDArray[np.bool_]  # of each test image


def split_by_digit(labels: Tensor, digit: int, *, seed: int = 0) -> Split:
    """The protocol's split for labels (N,) with one digit held out. Raises ConfigurationError where it is absent."""
    held_out = labels == digit
    if not bool(held_out.any()) or bool(held_out.all()):
        raise ConfigurationError(f"digit {digit}: expected some images with this label and some without")
    normal = held_out.logical_not().nonzero()[:, 0]
    normal = normal[torch.randperm(len(normal), generator=derived_generator(seed, Purpose.ANOMALY_SPLIT))]
    cut = int(0.8 * len(normal))
    test = torch.cat([normal[cut:], held_out.nonzero()[:, 0]])
    return Split(normal[:cut], test, held_out[test].numpy())


def pooled(parts: Sequence[ImageSource]) -> ImageSource:
    """Both splits of a labelled data set as one; of a file, which has none, the images once."""
    if len({part.fingerprint() for part in parts}) == 1:
        parts = parts[:1]
    pixels = torch.cat([part.batch(range(len(part))).mul(255).round().to(torch.uint8) for part in parts])
    if any(part.labels is None for part in parts):
        raise ConfigurationError(f"{parts[0].name} has no labels: give a labelled data set")
    labels = torch.cat([part.labels for part in parts if part.labels is not None])
    return from_array(pixels.numpy(), labels.numpy(), name=parts[0].name.partition("/")[0])


def detector_config(train: int, **changes: Any) -> JointConfig:
    """Settings for `train` images: `epochs` (default 16) of batches of 100, metrics once an epoch."""
    epochs = changes.pop("epochs", 16)
    per_epoch = max(1, train // 100)
    base = JointConfig(
        iterations=epochs * per_epoch,
        evaluate_every=per_epoch,
        energy=EnergyConfig(hidden=128, vector_layers=2, joint=0, standardize=False),
        energy_learning_rate=3e-4,
        energy_from=0.4,
        chains="persistent",
        # Several leapfrogs per step, so that chains keep up with f. With as many single steps training diverged on
        # digit 1.
        prior_chain=SamplerConfig(proposals=1, kernel="pcn-langevin", steps=2, step_size=0.15, leapfrogs=3),
        channels_last=True,
    )
    return replace(base, **changes)


def averaged(epochs: int) -> int:
    """Number of final epochs that a figure averages: 10, or half of the epochs if there are fewer than 20."""
    return max(1, min(MOST_AVERAGED, epochs // 2))


def run_digit(
    pool: ImageSource,
    digit: int,
    *,
    model: str = "EBM, L=2",
    seed: int = 0,
    latents: Sequence[int] = (16, 8),
    width: int = 32,
    sigma: float = 0.3,
    draws: int = 8,
    epochs: int = 16,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Train a model with one digit held out; a row for each of FORMS, with f = 0 where there is an energy.

    A row: mean and standard deviation of `Detection` over the last `averaged` epochs, and the seconds of the training
    (`jobs.clock`). Raises ConfigurationError for a digit that is not there.
    """
    if pool.labels is None:
        raise ConfigurationError(f"{pool.name} has no labels: give a labelled data set")
    split = split_by_digit(pool.labels, digit, seed=seed)
    train, test, chance = pool.subset(split.train), pool.batch(split.test).to(device), float(split.anomalous.mean())
    prior, layers = MODELS[model]["prior"], MODELS[model]["layers"]
    config = detector_config(len(train), epochs=epochs, prior=prior, seed=seed)
    network = {"image_shape": list(pool.shape), "latents": list(latents)[:layers], "width": width, "sigma": sigma}
    backbone = build(adapter("shallow"), network, seed=seed).to(device)
    # Without an energy f is 0 in any case, and rows do not say so.
    forms = {model + name: form for name, form in FORMS.items() if form.energy or prior == "ebm"}
    course: dict[str, list[Detection]] = {row: [] for row in forms}
    scoring = 0.0

    def score(shown: Mapping[str, Any]) -> None:
        nonlocal scoring
        if shown["iteration"] <= config.iterations - averaged(epochs) * config.evaluate_every:
            return
        began = clock(test.device)
        found = shown["prior"].scores(test, forms.values(), draws=draws, seed=seed, chunk=1024)
        for row, form in forms.items():
            values = -found[form].double().cpu().numpy()
            course[row].append(detection(values[split.anomalous], values[~split.anomalous]))
        scoring += clock(test.device) - began

    began = clock(test.device)
    with named(f"{model}, digit {digit}, seed {seed}"):
        trained = train_jointly(backbone, train, config, validation=train, on_evaluate=score)
    seconds = clock(test.device) - began - scoring
    shared = {
        "digit": digit,
        "seed": seed,
        "chance": chance,
        "seconds": seconds,
        "device": test.device.type,
        "rollbacks": trained.record["rollbacks"],
    }
    return [{**shared, "model": row, **summary(found)} for row, found in course.items()]


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """AUPRC (trapezoid) by model and digit, the paper's, and chance.

    mean ± sd: over the seeds, where there are several, of the means over the last epochs; else over those epochs.
    """
    digits = sorted({row["digit"] for row in rows})
    names = list(dict.fromkeys(row["model"] for row in rows))

    def cell(name: str, digit: int) -> str:
        found = [row for row in rows if row["model"] == name and row["digit"] == digit]
        if not found:
            return "–"
        means = np.array([row["auprc_trapezoid"] for row in found])
        sd = means.std(ddof=1) if len(found) > 1 else found[0]["auprc_trapezoid_sd"]
        return f"{means.mean():.3f} ± {sd:.3f}" + (f" ({len(found)} seeds)" if len(found) > 1 else "")

    lines = [[name, *(cell(name, digit) for digit in digits)] for name in names]
    lines.append(["paper (Table 4)", *(f"{PAPER[digit]:.3f}" if digit in PAPER else "–" for digit in digits)])
    lines.append(["chance", *(f"{next(r['chance'] for r in rows if r['digit'] == d):.3f}" for d in digits)])
    return table(["AUPRC", *(f"digit {digit}" for digit in digits)], lines)


def summary(course: Sequence[Detection]) -> dict[str, float]:
    """Mean and standard deviation over epochs, the latter with the suffix _sd."""
    columns = np.array(course)
    mean, sd = columns.mean(0), columns.std(0, ddof=min(1, len(columns) - 1))
    return {
        key: float(value)
        for name, m, s in zip(Detection._fields, mean, sd, strict=True)
        for key, value in ((name, m), (f"{name}_sd", s))
    }
