"""The doctor (`ebm-prior doctor`): does this VAE have a prior hole, and is it one that an energy can fill?

If reconstructions are good and samples are bad, the encoder's latents are distributed differently from the prior's. A
classifier measures how different they are, and in which groups. KL, active units and the moments of the standardised
codes ε show the reason. The AUC between two samples of the same distribution depends on their number and on the
classifier, so the same test is made on pairs of samples of the prior. A hole is reported only if the AUC is larger.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ebm_prior.compute.randomness import BlockGenerator, Purpose, chunks, derived_generator, derived_seed
from ebm_prior.errors import DataError, few
from ebm_prior.evaluation.gauge import GaugeConfig, GaugeResult, gauge_auc, networks
from ebm_prior.interfaces import SILENT, Images, Progress
from ebm_prior.model.backbone import Backbone
from ebm_prior.settings import require, require_kinds, require_positive, require_seed, setting

ACTIVE = 0.01  # variance of a unit's posterior mean over images, in units of the prior's (Burda et al. 2016)
INACTIVE_KL = 0.1  # nats: a group with less holds next to nothing of the image
HOLE = 0.53  # AUC below which a hole is too small to matter, however many images prove it
ERROR = 0.01  # probability of an AUC above the null interval, of any group, where there is no hole at all
BLUNT = 0.6  # upper end of the null interval above which the test misses holes worth filling
WIDE = 0.95  # AUC above which a single density ratio saturates


@dataclass(frozen=True)
class DoctorConfig:
    """Settings of the doctor's examination."""

    samples: int = setting(2000, "Number of images to read (at most all), matched by as many draws of the prior")
    chunk: int = setting(256, "Images computed at a time, rounded to blocks of 64; no result depends on it")
    pairs: int = setting(3, "Pairs of prior samples that give the interval of AUCs to expect without a prior hole")
    gauge: GaugeConfig = field(default_factory=lambda: GaugeConfig(iterations=150))
    seed: int = setting(0, "Seed of all random numbers")

    def __post_init__(self) -> None:
        require_kinds(self)
        require_positive(self, "samples", "chunk", "pairs")
        require_seed(self)
        require(self, "samples", self.samples >= self.gauge.least, f"must be {self.gauge.least} or more")


class _Moments:
    """Sums over images for one group: its KL, ε and ε², the noiseless ε and its square; and the range of σ."""

    def __init__(self) -> None:
        self.count, self.kl = 0, 0.0
        self.sums: list[Tensor] = []
        self.low, self.high = math.inf, 0.0

    def add(self, kl: Tensor, eps: Tensor, noiseless: Tensor, std: Tensor) -> None:
        new = [
            term.double().flatten(1).sum(0).cpu()
            for term in (eps, eps.square(), noiseless, noiseless.double().square())
        ]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new
        self.count += len(eps)
        self.kl += float(kl.double().sum())
        self.low, self.high = min(self.low, float(std.min())), max(self.high, float(std.max()))

    def described(self) -> dict[str, float]:
        mean, square, noiseless, noiseless_square = (total / self.count for total in self.sums)
        return {
            "units": len(mean),
            "active_units": int((noiseless_square - noiseless.square() > ACTIVE).sum()),
            "kl_nats": self.kl / self.count,
            "eps_mean_rms": float(mean.square().mean().sqrt()),
            "eps_variance": float((square - mean.square()).mean()),
            "std_low": self.low,
            "std_high": self.high,
        }


@torch.no_grad()
def examine(
    backbone: Backbone,
    images: Images,
    config: DoctorConfig,
    *,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Examine a backbone. For each group: KL, active units, moments of ε, range of σ, AUC of posterior against prior.

    The result also has counts of non-finite numbers and a verdict, as plain values for JSON. progress: advances by
    `parts` in all. Raises DataError for fewer images than the AUC needs.
    """
    n = min(config.samples, len(images))
    if n < config.gauge.least:
        raise DataError(f"expected at least {config.gauge.least} images, found {n} of {images.name}")
    progress.stage("posterior codes")
    moments, posterior, audit = _posterior(backbone, images, n, config)
    progress.stage("prior draws")
    prior = _prior(backbone, n, config, derived_seed(config.seed, Purpose.DOCTOR_PRIOR), audit)
    groups: list[dict[str, Any]] = [
        {"group": group.name, **each.described()} for group, each in zip(backbone.groups, moments, strict=True)
    ]
    result: dict[str, Any] = {
        "data": images.name,
        "images": n,
        "seed": config.seed,
        "not_finite": {what: count for what, count in audit.items() if count},
        **_state(backbone),
    }
    if not result["not_finite"]:
        progress.stage("AUC of posterior against prior latents")
        found = _gauged(backbone, posterior, prior, config, progress)
        result |= {"auc": found.overall, "auc_budget": found.budget}
        for row in groups:
            row["auc"] = found.per_group[row["group"]]
        result["null"] = _null(backbone, n, config, progress)
    result["groups"] = groups
    return result | verdict(result)


def parts(groups: int, config: DoctorConfig) -> int:
    """Number of parts into which `examine` cuts its work, for its progress."""
    return 3 + config.pairs + (1 + config.pairs) * networks(groups, config.gauge)


def _gauged(
    backbone: Backbone, one: list[Tensor], other: list[Tensor], config: DoctorConfig, progress: Progress
) -> GaugeResult:
    """The AUC with which a fresh classifier tells one set of latents from the other."""
    device = next(backbone.parameters()).device
    with torch.enable_grad():
        return gauge_auc(one, other, backbone.groups, config=config.gauge, device=device, progress=progress)


def _null(backbone: Backbone, n: int, config: DoctorConfig, progress: Progress) -> dict[str, Any]:
    """The null interval: the AUCs of the same test on pairs of samples of the prior, n draws each.

    It is mean ± z σ over all groups and pairs. z is chosen such that without a hole any AUC of an examination lies
    above the interval with probability `ERROR`. σ is the AUCs' own, but at least that of random scores, because a few
    pairs can underestimate it.
    """
    found: list[float] = []
    for pair in range(config.pairs):
        progress.stage(f"AUC of two samples of the prior, pair {pair + 1} of {config.pairs}")
        seeds = [derived_seed(config.seed, Purpose.DOCTOR_NULL, pair, which) for which in range(2)]
        one, other = (_prior(backbone, n, config, seed, {}, latents_only=True) for seed in seeds)
        result = _gauged(backbone, one, other, config, progress)
        found += [result.overall, *result.per_group.values()]
    held = n // config.gauge.folds  # of each kind in a fold (Hanley & McNeil 1982: the variance of a rank statistic)
    chance = math.sqrt((2 * held + 1) / (12 * held**2) / config.gauge.folds)
    spread = max(chance, statistics.stdev(found))
    z = statistics.NormalDist().inv_cdf(1 - ERROR / (len(backbone.groups) + 1))
    reach = z * spread * math.sqrt(1 + 1 / config.pairs)  # the mean is of few pairs, too
    mean = statistics.fmean(found)
    return {"low": max(0.0, mean - reach), "high": min(1.0, mean + reach), "mean": mean, "pairs": config.pairs}


def verdict(result: dict[str, Any]) -> dict[str, Any]:
    """The verdict on an examination in words, and the names of the groups whose head is worth its parameters."""
    broken = result["not_finite"]
    if broken:
        what = few(f"{count:,} in {name}" for name, count in broken.items())
        return {
            "verdict": f"Broken: numbers that are not finite ({what}). No prior can mend this: look at the checkpoint, "
            "at its batch norms, and at --precision float64.",
            "worth_a_head": [],
        }
    auc, null = result["auc"], result["null"]
    limit = max(HOLE, null["high"])
    worth = [row["group"] for row in result["groups"] if row["auc"] > limit]
    silent = [row["group"] for row in result["groups"] if row["kl_nats"] < INACTIVE_KL]
    explained = f"two samples of the prior itself give {null['low']:.3f} to {null['high']:.3f}"
    if auc <= limit and not worth:
        text = (
            f"No prior hole in sight: with AUC {auc:.3f} a fresh classifier hardly tells posterior codes from draws of "
            f"the prior ({explained}). An energy has little to gain here; if samples are bad, reconstructions are "
            "probably bad too."
        )
        if null["high"] > BLUNT:
            text += " But few images make a blunt test, which sees wide holes alone: give more of them (--samples)."
    elif max(auc, *(row["auc"] for row in result["groups"])) < WIDE:
        text = (
            f"A prior hole that an energy can fill: AUC {auc:.3f} between posterior codes and draws of the prior "
            f"({explained}). `ebm-prior fit` with its defaults is the thing to try."
        )
    else:
        text = (
            f"A wide prior hole: with AUC {auc:.3f} posterior codes and draws of the prior hardly overlap "
            f"({explained}), and one density ratio saturates. `ebm-prior fit` then goes on in stages, which takes "
            "longer."
        )
    if not worth and auc > limit:
        text += " No group shows it alone: it lies in relations between groups, which the joint head sees."
    elif worth:
        best = max(row["auc"] for row in result["groups"])
        text += f" Worth a head: {few(worth)} (AUC up to {best:.3f} alone)."
    if silent:
        text += f" Nearly silent (KL below {INACTIVE_KL} nats): {few(silent)}."
    if result["training_mode"]:
        text += " Some layers are in training mode: call eval() before anything is measured."
    return {"verdict": text, "worth_a_head": worth}


def _posterior(
    backbone: Backbone, images: Images, n: int, config: DoctorConfig
) -> tuple[list[_Moments], list[Tensor], dict[str, int]]:
    """Moments per group and posterior latents of n images, and counts of numbers that are not finite."""
    like = next(backbone.parameters())
    rows = torch.arange(len(images))
    if len(images) > n:
        rows = torch.randperm(len(images), generator=derived_generator(config.seed, Purpose.DOCTOR_CHOICE))[:n]
    moments = [_Moments() for _ in backbone.groups]
    latents: list[list[Tensor]] = []
    audit: dict[str, int] = {"weights": sum(int((~t.isfinite()).sum()) for t in backbone.state_dict().values())}
    for first, count in chunks(n, config.chunk):
        batch = images.batch(rows[first : first + count]).to(like.device, like.dtype)
        generator = BlockGenerator(derived_seed(config.seed, Purpose.DOCTOR_POSTERIOR), first, len(batch), like.device)
        x = backbone.observe(batch, generator=generator)
        noise = backbone.standard_normal(len(batch), generator=generator)
        draw = backbone.encode(x, noise)
        trace = backbone.trace(draw, len(batch))
        noiseless = backbone.infer(x, noise=[torch.zeros_like(group) for group in noise])
        log_q, log_p = torch.stack(draw.log_q, dim=1), trace.log_prior
        for index, each in enumerate(moments):
            each.add(log_q[:, index] - log_p[:, index], trace.eps[index], noiseless.eps[index], trace.priors[index].std)
        latents.append([z.cpu() for z in trace.z])
        found = {"posterior codes": trace.z, "densities": [log_q, log_p]}
        found["reconstructions"] = [backbone.likelihood(trace.features).mean]
        _count(audit, found)
    return moments, [torch.cat(group) for group in zip(*latents, strict=True)], audit


def _prior(
    backbone: Backbone, n: int, config: DoctorConfig, seed: int, audit: dict[str, int], *, latents_only: bool = False
) -> list[Tensor]:
    """n draws of the backbone's prior; numbers that are not finite, of samples too, are added to the audit."""
    latents: list[list[Tensor]] = []
    device = next(backbone.parameters()).device
    for first, count in chunks(n, config.chunk):
        generator = BlockGenerator(seed, first, count, device)
        trace = backbone.transform(backbone.standard_normal(count, generator=generator))
        if not latents_only:
            _count(audit, {"prior draws": trace.z, "samples": [backbone.likelihood(trace.features).mean]})
        latents.append([z.cpu() for z in trace.z])
    return [torch.cat(group) for group in zip(*latents, strict=True)]


def _count(audit: dict[str, int], found: dict[str, list[Tensor]]) -> None:
    """Add to the audit how many numbers of each kind are not finite."""
    for name, tensors in found.items():
        audit[name] = audit.get(name, 0) + sum(int((~tensor.isfinite()).sum()) for tensor in tensors)


def _state(backbone: Backbone) -> dict[str, Any]:
    """Number and range of dropout layers and batch norms, and whether anything is in training mode."""
    modules: list[nn.Module] = list(backbone.modules())
    norms = [m for m in modules if isinstance(m, _BatchNorm) and m.running_var is not None]
    variances = [m.running_var for m in norms if m.running_var is not None]
    # Dropout is a module of torch's, or the attribute of a block that calls the function.
    rates = [m.p if isinstance(m, _DropoutNd) else getattr(m, "dropout", 0) for m in modules]
    dropouts = [rate for rate in rates if isinstance(rate, float) and rate > 0]
    return {
        "training_mode": any(m.training for m in modules),
        "dropout_layers": len(dropouts),
        "dropout_largest": max(dropouts, default=0.0),
        "batch_norms": len(norms),
        "running_variance": [min(float(v.min()) for v in variances), max(float(v.max()) for v in variances)]
        if variances
        else None,
    }
