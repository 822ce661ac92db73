"""The joint energy-based prior p_α(z) ∝ exp(τ f(z)) p_β(z) on a frozen backbone (Eq. 6): density, samples, log Z.

In this module τ f always means min(τ f, ceiling). A prior without a ceiling has ceiling = inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from ebm_prior.compute.isolation import isolated
from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.compute.randomness import BlockGenerator, Purpose, chunks, derived_seed
from ebm_prior.errors import ConfigurationError, RegimeError, described, few
from ebm_prior.interfaces import SILENT, Progress
from ebm_prior.model.arguments import (
    require_backbone,
    require_calibrated,
    require_count,
    require_images,
    usable_device,
)
from ebm_prior.model.backbone import Backbone, Gaussian, Trace, require_usable
from ebm_prior.model.by_group import HeadsWalk, draw_by_group
from ebm_prior.model.drawing import draw
from ebm_prior.model.energy import JointEnergy
from ebm_prior.model.latents import require_latents, require_upper
from ebm_prior.model.normalizer import Normalised
from ebm_prior.model.samplers import Potential, SamplerConfig, graphed
from ebm_prior.model.samples import Samples, decoded, joined
from ebm_prior.model.scores import Batch, Form, FreeGroups, list_of_forms, scores
from ebm_prior.model.terms import ImageTerms

Regime = Literal["calibrated", "refiner"]
Target = Literal["exact", "published"]
Seen = TypeVar("Seen")
Owned = TypeVar("Owned", bound="_Kept")
TAU_LIMIT, CEILING_LIMIT = 1e3, 1e9  # largest τ, and largest |ceiling| in nats; training stays far below

_HALF_LOG = 0.5 * math.log(2 * math.pi)
ANCESTRAL = SamplerConfig(proposals=1, steps=0)
"""The sampler that ignores f: the backbone's own prior."""


class _Kept:
    """The part of a prior that moves it to a device, saves and loads it, prints it, and begins a walk over f."""

    backbone: Backbone
    energy: JointEnergy
    tau: float
    regime: Regime
    record: dict[str, Any]
    refiner: EBMPrior | None

    @property
    def sampling(self) -> EBMPrior:
        """The prior that draws the samples: the refiner, or this one where it is None (`prior.refiner = None`)."""
        return self.refiner or cast(EBMPrior, self)

    def to(self: Owned, device: torch.device | str) -> Owned:
        """Move backbone and heads to a device, in place; returns the prior.

        The backbone that the prior was made with moves, too, where it is the same module. Raises ConfigurationError
        where this machine cannot use the device.
        """
        place = usable_device(device)
        self.backbone.to(place)
        self.energy.to(place)
        if self.refiner:
            self.refiner.to(place)
        return self

    def walk(self) -> HeadsWalk:
        """The terms τ f_i at the groups of one traversal, in order, where f is a sum over groups."""
        return HeadsWalk(self.energy, self.tau)

    if TYPE_CHECKING:  # `storage.checkpoint` sets both methods, to its functions save_prior and load_prior

        def save(self, path: str | Path, *, checkpoint: str | Path | None = None) -> None: ...

        @staticmethod
        def load(
            path: str | Path,
            backbone: Backbone | None = None,
            *,
            checkpoint: str | Path | None = None,
            force: bool = False,
            device: torch.device | str = "cpu",
            dtype: torch.dtype = torch.float32,
        ) -> EBMPrior: ...

    def __repr__(self) -> str:
        kind, groups = type(self.backbone).__name__, self.backbone.groups
        few = ", ".join(f"{group.name} {tuple(group.shape)}" for group in groups[:8]) + ", …" * (len(groups) > 8)
        nats = self.record.get("held_out", {}).get("tempered", {}).get("nats")
        gain = "" if nats is None or self.regime != "calibrated" else f", gain {nats:+.3g} nats"
        count = sum(parameter.numel() for parameter in self.energy.parameters())
        return (
            f"<EBMPrior {self.regime} on {kind}: {len(groups)} groups ({few}), {count:,} parameters, "
            f"tau {self.tau:.3g}{gain}{', samples by a refiner' if self.refiner else ''}>"
        )


class EBMPrior(_Kept, ImageTerms, Normalised):
    """A trained (or, with f = 0, untrained) energy-based prior p_α(z) ∝ exp(τ f(z)) p_β(z) (Eq. 6).

    `tau` multiplies f (tempering after training). τ f is clipped at `ceiling` nats, as f is not reliable far from the
    latents of training. `regime`: "calibrated" (f is a log density ratio, so that scores and log Z have a meaning) or
    "refiner" (short-run dynamics as published, for samples only). `target`: "exact", the density of Appendix A.3, or
    "published", which has log p_β(T(ε)) in place of log N(ε), for replication only. A calibrated prior may have a
    `refiner`, a prior of its own on the same backbone, which then draws the samples by its own sampler.

    >>> samples = prior.sample(4, seed=1)
    >>> samples.images.shape, prior.f(samples.z).shape  # in [0, 1]; nats
    (torch.Size([4, 1, 8, 8]), torch.Size([4]))
    """

    def __init__(
        self,
        backbone: Backbone,
        energy: JointEnergy,
        *,
        tau: float = 1.0,
        ceiling: float = math.inf,
        regime: Regime = "calibrated",
        target: Target = "exact",
        sampler: SamplerConfig | None = None,
        record: Mapping[str, Any] | None = None,
        refiner: EBMPrior | None = None,
    ) -> None:
        require_backbone(backbone)
        require_usable(backbone)
        _require_consistent(energy, regime, target, tau, ceiling)
        like = next(backbone.parameters())
        self.backbone = backbone.for_inference()
        self.checkpoint = backbone.checkpoint  # where the backbone was loaded from, for `save`
        self.energy = energy.to(device=like.device, dtype=like.dtype).eval().requires_grad_(False)
        self.tau, self.ceiling, self.regime, self.target = tau, ceiling, regime, target
        self.sampler, self.record = sampler or SamplerConfig(), dict(record or {})
        self.refiner = _refiner_for(self, refiner)

    @isolated()
    def f(
        self, z: Sequence[Tensor], eps: Sequence[Tensor] | None = None, priors: Sequence[Gaussian] | None = None
    ) -> Tensor:
        """The negative energy min(τ f(z), ceiling) in nats, (B,), for z a list of (B, *group.shape).

        eps, priors: T_β⁻¹(z) and the p_β(z_i | z_<i), if the caller has them; else computed where the heads need them.
        """
        return _f(self, z, eps, priors)

    @isolated()
    def potential(self, eps: Sequence[Tensor]) -> Tensor:
        """The potential g(ε) in nats, (B,): the chains' log density is g(ε) − ½‖ε‖² + const (Appendix A.3)."""
        trace = self.backbone.transform(eps)
        if self.target == "exact":
            return _f(self, trace.z, eps, trace.priors)
        # −½‖ε‖² is in log p_β(T(ε)), too, and the chains have it already.
        return _f(self, trace.z, eps, trace.priors) + _log_scales(trace)

    @isolated()
    def log_density(self, eps: Sequence[Tensor]) -> Tensor:
        """log p_α(ε) + log Z in nats, (B,): τ f(T_β(ε)) + log N(ε; 0, I)."""
        require_calibrated(self.regime, "log_density")
        trace = self.backbone.transform(eps)
        return _f(self, trace.z, eps, trace.priors) + _log_standard_normal(eps)

    @isolated()
    def log_prior(self, z: Sequence[Tensor]) -> Tensor:
        """log p_α(z) + log Z in nats, (B,): τ f(z) + log p_β(z) (Eq. 6)."""
        require_calibrated(self.regime, "log_prior")
        trace = self.backbone.given(z)
        return _f(self, z, trace.eps, trace.priors) + trace.log_prior.sum(1)

    @isolated(grad=False)
    def map_chunks(
        self,
        see: Callable[[Samples], Seen],
        n: int,
        *,
        seed: int = 0,
        sampler: SamplerConfig | None = None,
        chunk: int = 128,
        progress: Progress = SILENT,
        processes: Processes = ALONE,
        first_only: bool = False,
    ) -> list[Seen]:
        """Draw n samples in chunks, call `see` with each chunk, and return its results in order.

        Sample i depends on (seed, i) alone, not on `chunk` (rounded to blocks of 64). The `processes` share the chunks;
        `first_only`: the first one gets all results, the others none. sampler: None takes that of `sampling`, the role
        that draws. progress: advances by the draws. Raises DivergenceError where a chain is not finite.
        """
        n, seed, chunk = require_count("n", n), require_count("seed", seed), require_count("chunk", chunk, least=1)
        role, sampler = self.sampling, _chosen(sampler, self.sampling)
        device = next(self.backbone.parameters()).device
        potential, done = graphed(role.potential, device), 0

        def drawn(part: tuple[int, int]) -> Seen:
            nonlocal done
            found = see(_drawn(role, potential, sampler, part[1], BlockGenerator(seed, *part, device)))
            now = min(n, done + processes.count * part[1])  # the others are about as far
            progress.advance(now - done)
            done = now
            return found

        return (processes.gather if first_only else processes.map)(drawn, chunks(n, chunk))

    @isolated()
    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        sampler: SamplerConfig | None = None,
        chunk: int = 128,
        progress: Progress = SILENT,
        processes: Processes = ALONE,
    ) -> Samples:
        """Draw n samples of p_α; image i depends on (seed, i) alone, not on `chunk`. n = 0 gives empty tensors.

        sampler: as in `map_chunks`.  progress: advances by the draws. Raises ConfigurationError for a number out of its
        range, and DivergenceError where a chain is not finite.
        """
        told: dict[str, Any] = {"progress": progress, "processes": processes}
        parts = self.map_chunks(lambda part: part, n, seed=seed, sampler=sampler, chunk=chunk, **told)
        return joined(self.backbone, parts)

    @isolated(grad=False)
    def complete(
        self, upper: Sequence[Tensor], *, seed: int = 0, sampler: SamplerConfig | None = None, chunk: int = 128
    ) -> Samples:
        """Draw the lower groups given the first ones, z_{≤k} ~ p_α(z_{≤k} | z_{>k}) (target "exact"), and the images.

        upper: z of the first groups, one to all but one, a list of (n, *group.shape): of `sample`, or a posterior's;
        z.expand(n, …) draws n times for one code. Draw i depends on upper[…][i] and (seed, i) alone, not on `chunk`.
        norm and ess_fraction are those of the lower groups' ε. sampler and errors: as in `sample`.
        """
        require_upper("upper", upper, self.backbone.groups, next(self.backbone.parameters()))
        seed, chunk = require_count("seed", seed), require_count("chunk", chunk, least=1)
        role, sampler = self.sampling, _chosen(sampler, self.sampling)
        parts = [_completed(role, upper, sampler, seed, part) for part in chunks(len(upper[0]), chunk)]
        return joined(self.backbone, parts)

    @isolated()
    def scores(
        self,
        images: Tensor,
        forms: Form | Iterable[Form],
        *,
        draws: int = 8,
        sampler: SamplerConfig | None = None,
        seed: int = 0,
        first: int = 0,
        chunk: int = 256,
        watch: Callable[[Batch, int], None] | None = None,
    ) -> dict[Form, Tensor]:
        """Scores of images (B, C, H, W) in [0, 1] (Eqs. 20, 21): for each form a tensor (B,) in nats, on shared draws.

        sampler: draws the lower groups; None takes the one recorded with the prior. The draws of image i depend on
        (seed, first + i) alone, not on `chunk`; `first` must be a multiple of 64. watch: called with each chunk and
        number of a draw. Raises RegimeError for a refiner if a form uses f, and the errors of `model.scores.scores`.
        """
        forms = list_of_forms(forms)
        require_images(images, self.backbone.image_shape)
        draws, seed = require_count("draws", draws, least=1), require_count("seed", seed)
        chunk, sampler = require_count("chunk", chunk, least=1), _chosen(sampler, self)
        if any(form.energy for form in forms):
            require_calibrated(self.regime, "a score")
        parts = [
            scores(
                self.backbone,
                self.f,
                images[start : start + count],
                forms,
                draws=draws,
                sampler=sampler,
                walk=self.walk,
                seed=seed,
                first=first + start,
                watch=watch,
            )
            for start, count in chunks(len(images), chunk)
        ]
        return {form: torch.cat([part[form] for part in parts]) if parts else images.new_empty(0) for form in forms}


def _drawn(
    prior: EBMPrior, potential: Potential, sampler: SamplerConfig, count: int, generator: BlockGenerator
) -> Samples:
    """The draws of one chunk of samples. `potential`: the prior's own, in the form that is fastest."""
    backbone = prior.backbone
    if sampler.by_group:
        trace, found = draw_by_group(backbone, prior.walk(), [], count, sampler, generator)
    else:
        found = draw(potential, partial(backbone.standard_normal, count, generator=generator), sampler, generator)
        trace = backbone.transform(found.eps)
    return decoded(backbone, trace, found.eps, found)


def _completed(
    prior: EBMPrior, upper: Sequence[Tensor], sampler: SamplerConfig, seed: int, part: tuple[int, int]
) -> Samples:
    """The draws of one chunk of `complete`; part: the number of its first draw, and its size."""
    first, count = part
    generator = BlockGenerator(derived_seed(seed, Purpose.COMPLETION), first, count, upper[0].device)
    free = FreeGroups(prior.backbone, prior.f, [z[first : first + count] for z in upper], count, prior.walk)
    trace, found = free.draw(sampler, generator)
    return decoded(prior.backbone, trace, trace.eps, found)


def _f(prior: EBMPrior, z: Sequence[Tensor], eps: Sequence[Tensor] | None, priors: Sequence[Gaussian] | None) -> Tensor:
    like, groups, config = next(prior.backbone.parameters()), prior.backbone.groups, prior.energy.config
    require_latents("z", z, groups, like)
    if eps is not None:
        require_latents("eps", eps, groups, like)
    if (config.views > 1 and eps is None) or (config.groupwise and priors is None):
        trace = prior.backbone.given(z)
        eps, priors = trace.eps if eps is None else eps, trace.priors
    value: Tensor = prior.tau * prior.energy(prior.energy.inputs(z, z if eps is None else eps, priors))
    return value if prior.ceiling == math.inf else value.clamp(max=prior.ceiling)


def _require_consistent(energy: object, regime: Regime, target: Target, tau: float, ceiling: float) -> None:
    _require_ranges(tau, ceiling)
    if not isinstance(energy, nn.Module) or not hasattr(energy, "inputs"):
        raise ConfigurationError(
            f"energy: expected a JointEnergy, found {described(energy)}: fit(…, energy=module) takes your own"
        )
    if target == "published" and regime == "calibrated":
        raise RegimeError(
            "target published needs regime refiner, because f is no log density ratio on it; found calibrated"
        )


def _refiner_for(prior: EBMPrior, refiner: EBMPrior | None) -> EBMPrior | None:
    """`refiner`, after a check that it is one and that `prior` can have it."""
    if refiner is not None:
        roles, groups = (refiner.regime, prior.regime), refiner.backbone.groups
        if roles != ("refiner", "calibrated") or groups != prior.backbone.groups:
            raise RegimeError(
                "refiner: expected a prior of regime refiner on the backbone of a calibrated prior, found a "
                f"{roles[0]} prior for a {roles[1]} one, with the groups {few(group.name for group in groups)}"
            )
    return refiner


def _chosen(sampler: SamplerConfig | None, prior: EBMPrior) -> SamplerConfig:
    """`sampler` after a check of its type, or the prior's own if it is None, if the prior can be drawn from by it."""
    if not isinstance(sampler, (SamplerConfig, type(None))):
        raise ConfigurationError(
            f"sampler: expected a SamplerConfig, found {described(sampler)}: dataclasses.replace(prior.sampler, "
            "steps=100) changes the recorded one"
        )
    chosen = sampler or prior.sampler
    if chosen.by_group and not (prior.regime == "calibrated" and prior.ceiling == math.inf and prior.energy.is_sum):
        raise ConfigurationError(
            "sampler: by_group needs a calibrated prior whose f is a sum over groups, without joint head and ceiling: "
            "fit one with --ratios groupwise, or draw with --no-by-group"
        )
    return chosen


def _require_ranges(tau: float, ceiling: float) -> None:
    if not 0 <= tau <= TAU_LIMIT:
        raise ConfigurationError(f"expected tau from 0 to {TAU_LIMIT:g}, found {tau}")
    if not (-CEILING_LIMIT <= ceiling <= CEILING_LIMIT or ceiling == math.inf):
        raise ConfigurationError(f"expected a ceiling within ±{CEILING_LIMIT:g} nats or inf for none, found {ceiling}")


def _log_scales(trace: Trace) -> Tensor:
    """log p_β(T(ε)) + ½‖ε‖² in nats, (B,): −Σ log std − ½ D log 2π."""
    logs = [(prior.std.log() + _HALF_LOG).expand_as(z) for prior, z in zip(trace.priors, trace.z, strict=True)]
    return -torch.stack([each.flatten(1).sum(1) for each in logs]).sum(0)


def _log_standard_normal(eps: Sequence[Tensor]) -> Tensor:
    return torch.stack([-0.5 * (e.square() + math.log(2 * math.pi)).flatten(1).sum(1) for e in eps]).sum(0)
