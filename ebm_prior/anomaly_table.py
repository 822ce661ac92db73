"""Anomaly detection with one digit held out (§5.4, Table 4): the models, their scores, and the table.

The pool is the whole data set, train and test split together. 80 % of the normal images train; the other 20 % and all
anomalies are the test. Score: the un-normalised log posterior L^{>0} (Eq. 20 with k = 0), low for an anomaly. Nothing
is chosen on the test images: a figure is the mean over the last epochs, whatever they gave.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_prior.data import ImageSource, from_array
from ebm_prior.energy import EnergyConfig
from ebm_prior.errors import ConfigurationError
from ebm_prior.joint import train_jointly
from ebm_prior.joint_config import JointConfig
from ebm_prior.pretrain import build
from ebm_prior.prior import EBMPrior
from ebm_prior.randomness import derived_generator
from ebm_prior.registry import adapter
from ebm_prior.report import table
from ebm_prior.samplers import SamplerConfig
from ebm_prior.training import Images

DIGITS = (1, 4, 5, 7, 9)
PAPER = {1: 0.470, 4: 0.941, 5: 0.964, 7: 0.815, 9: 0.796}  # AUPRC, Table 4
LAST = 10  # epochs averaged over

MODELS: dict[str, dict[str, Any]] = {
    "EBM, L=2": {"prior": "ebm", "layers": 2},
    "Gaussian, L=2": {"prior": "gaussian", "layers": 2},
    "LEBM, L=1": {"prior": "ebm", "layers": 1},
}


class Split(NamedTuple):
    """Indices into the pool."""

    train: Tensor  # 80 % of the normal images
    test: Tensor  # the other normal images, then all anomalies
    anomalous: NDArray[np.bool_]  # of each test image


class Detection(NamedTuple):
    """How well a score tells anomalies (the positive class) from normal images."""

    auprc: float  # area under precision-recall by the trapezoid rule, as published
    average_precision: float  # the same as a step function, which does not interpolate
    auroc: float


def split_by_digit(labels: Tensor, digit: int, *, seed: int = 0) -> Split:
    """The protocol's split for labels (N,) with one digit held out. Raises ConfigurationError where it is absent."""
    held_out = labels == digit
    if not bool(held_out.any()) or bool(held_out.all()):
        raise ConfigurationError(f"digit {digit}: expected some images with this label and some without")
    normal = held_out.logical_not().nonzero()[:, 0]
    normal = normal[torch.randperm(len(normal), generator=derived_generator(seed, 40))]
    cut = int(0.8 * len(normal))
    test = torch.cat([normal[cut:], held_out.nonzero()[:, 0]])
    return Split(normal[:cut], test, held_out[test].numpy())


def detection(score: NDArray[np.float64], anomalous: NDArray[np.bool_]) -> Detection:
    """Of scores (N,), larger = more anomalous; equal scores are one threshold."""
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))  # of each group of equal scores
    found = np.cumsum(anomalous[order])[last].astype(float)  # true positives at each threshold
    precision, recall = found / (last + 1), found / anomalous.sum()
    false_rate = (last + 1 - found) / (~anomalous).sum()
    steps = np.diff(recall, prepend=0.0)
    curve = np.append(1.0, precision)  # at recall 0, as is usual
    trapezoid = float((steps * (curve[1:] + curve[:-1]) / 2).sum())
    up = np.append(0.0, recall)
    area = float((np.diff(false_rate, prepend=0.0) * (up[1:] + up[:-1]) / 2).sum())
    return Detection(trapezoid, float((steps * precision).sum()), area)


@torch.no_grad()
def log_posterior(
    prior: EBMPrior, images: Images, indices: Tensor, *, draws: int = 8, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """L^{>0} = E_q[log p(x|z) + log p_β(z) + f(z)] (Eq. 20) of the images at `indices`, and E_q[f], (N,) nats each."""
    backbone = prior.backbone
    like = next(backbone.parameters())
    rows = []
    for number, part in enumerate(torch.split(indices, 500)):
        generator = derived_generator(seed, 41, number, device=like.device)
        found = torch.zeros(2, len(part), dtype=torch.float64)
        for _ in range(draws):
            x = backbone.observe(images.batch(part).to(like.device, like.dtype), generator=generator)
            z = backbone.infer(x, generator=generator)
            f = prior.f(z.z)
            found += torch.stack([backbone.likelihood(z.features).log_prob(x) + z.log_p.sum(1) + f, f]).double().cpu()
        rows.append(found / draws)
    total, energy = torch.cat(rows, dim=1).numpy()
    return total, energy


def pooled(parts: Sequence[ImageSource]) -> ImageSource:
    """Both splits of a labelled data set as one."""
    pixels = torch.cat([part.batch(range(len(part))).mul(255).round().to(torch.uint8) for part in parts])
    if any(part.labels is None for part in parts):
        raise ConfigurationError(f"{parts[0].name} has no labels, by which a digit could be held out")
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
        prior_chain=SamplerConfig(proposals=1, kernel="pcn-langevin", steps=8, step_size=0.15),
    )
    return replace(base, **changes)


def run_digit(
    pool: ImageSource,
    digit: int,
    *,
    seed: int = 0,
    models: Sequence[str] = tuple(MODELS),
    latents: Sequence[int] = (16, 8),
    width: int = 12,
    sigma: float = 0.3,
    draws: int = 8,
    epochs: int = 16,
    on_stage: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Train the models with one digit held out; a row for each, and one with f = 0 for each with an energy.

    A row: mean and standard deviation of `Detection` over the last LAST epochs, and the CPU-seconds of the training.
    """
    if pool.labels is None:
        raise ConfigurationError(f"{pool.name} has no labels, by which a digit could be held out")
    split = split_by_digit(pool.labels, digit, seed=seed)
    train, chance = pool.subset(split.train), float(split.anomalous.mean())
    rows = []
    for name in models:
        prior, layers = MODELS[name]["prior"], MODELS[name]["layers"]
        if on_stage:
            on_stage(f"digit {digit}: {name}")
        config = detector_config(len(train), epochs=epochs, prior=prior, seed=seed)
        network = {"image_shape": list(pool.shape), "latents": list(latents)[:layers], "width": width, "sigma": sigma}
        backbone = build(adapter("shallow"), network, seed=seed)
        course: dict[str, list[Detection]] = {name: []}
        scoring = 0.0

        def score(
            shown: Mapping[str, Any],
            course: dict[str, list[Detection]] = course,
            name: str = name,
            config: JointConfig = config,
        ) -> None:
            nonlocal scoring
            if shown["iteration"] <= config.iterations - LAST * config.evaluate_every:
                return
            began = time.process_time()
            total, f = log_posterior(shown["prior"], pool, split.test, draws=draws, seed=seed)
            course[name].append(detection(-total, split.anomalous))
            if config.prior == "ebm":
                course.setdefault(f"{name}, f = 0", []).append(detection(f - total, split.anomalous))
            scoring += time.process_time() - began

        began = time.process_time()
        train_jointly(backbone, train, config, validation=train, on_evaluate=score)
        seconds = time.process_time() - began - scoring
        rows += [
            {"digit": digit, "seed": seed, "model": row, "chance": chance, "cpu_seconds": seconds, **_summary(found)}
            for row, found in course.items()
        ]
    return rows


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """AUPRC by model and digit: mean ± sd over the last epochs, seeds averaged; below, the paper's and chance."""
    digits = sorted({row["digit"] for row in rows})
    names = list(dict.fromkeys(row["model"] for row in rows))

    def cell(name: str, digit: int) -> str:
        found = [row for row in rows if row["model"] == name and row["digit"] == digit]
        if not found:
            return "–"
        mean, sd = (np.mean([row[key] for row in found]) for key in ("auprc", "auprc_sd"))
        return f"{mean:.3f} ± {sd:.3f}"

    lines = [[name, *(cell(name, digit) for digit in digits)] for name in names]
    lines.append(["paper (Table 4)", *(f"{PAPER[digit]:.3f}" if digit in PAPER else "–" for digit in digits)])
    lines.append(["chance", *(f"{next(r['chance'] for r in rows if r['digit'] == d):.3f}" for d in digits)])
    return table(["AUPRC", *(f"digit {digit}" for digit in digits)], lines)


def _summary(course: Sequence[Detection]) -> dict[str, float]:
    columns = np.array(course)
    mean, sd = columns.mean(0), columns.std(0, ddof=min(1, len(columns) - 1))
    return {
        key: float(value)
        for name, m, s in zip(Detection._fields, mean, sd, strict=True)
        for key, value in ((name, m), (f"{name}_sd", s))
    }
