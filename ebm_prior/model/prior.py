"""The joint energy-based prior p_α(z) ∝ exp(τ f(z)) p_β(z) on a frozen backbone (Eq. 6): density, samples, log Z.

Wherever τ f stands, min(τ f, ceiling) is meant: a prior without a ceiling has inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ebm_prior.compute.isolation import isolated
from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.compute.randomness import BlockGenerator, chunks
from ebm_prior.errors import ConfigurationError, RegimeError
from ebm_prior.interfaces import SILENT, Progress
from ebm_prior.model.backbone import Backbone, require_usable
from ebm_prior.model.energy import JointEnergy
from ebm_prior.model.samplers import SamplerConfig, draw, effective_sample_size, graphed
from ebm_prior.model.scores import Form, scores

Regime = Literal["calibrated", "refiner"]
Target = Literal["exact", "published"]
Seen = TypeVar("Seen")
TAU_LIMIT, CEILING_LIMIT = 1e3, 1e9  # nats, the latter: beyond them is no prior that training gives

ANCESTRAL = SamplerConfig(proposals=1, steps=0)
"""The sampler that ignores f: the backbone's own prior."""


class Samples(NamedTuple):
    """Draws of the prior, with per-draw diagnostics (n,)."""

    z: list[Tensor]  # (n, *group.shape) each
    eps: list[Tensor]
    images: Tensor  # (n, C, H, W) in [0, 1]: the means of p(x | z)
    acceptance: Tensor
    norm: Tensor  # ‖ε‖/√D
    ess_fraction: Tensor


class EBMPrior:
    """A trained (or, with f = 0, untrained) energy-based prior.

    `tau` multiplies f (tempering after training), and τ f is cut off at `ceiling`, in nats: at latents unlike any in
    training, f is no density ratio. `regime`: "calibrated" (f is a log density ratio: scores and
    log Z mean something) or "refiner" (short-run dynamics as published: samples only). `target`: "exact", the density
    of Appendix A.3, or "published", which differentiates log p_β(T(ε)) where that has log N(ε); for replication only.
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
    ) -> None:
        _require_ranges(tau, ceiling)
        if target == "published" and regime == "calibrated":
            raise RegimeError("f is no log density ratio on the published target: only a refiner has it")
        like = next(backbone.parameters())
        require_usable(backbone)
        self.backbone = backbone.for_inference()
        self.energy = energy.to(device=like.device, dtype=like.dtype).eval().requires_grad_(False)
        self.tau, self.ceiling = tau, ceiling
        self.regime = regime
        self.target = target
        self.sampler = sampler or SamplerConfig()
        self.record = dict(record or {})

    @isolated()
    def f(self, z: Sequence[Tensor], eps: Sequence[Tensor] | None = None) -> Tensor:
        """The negative energy min(τ f(z), ceiling) in nats, (B,), for z a list of (B, *group.shape).

        eps: T_β⁻¹(z), of z's shapes, where the caller knows it; else it is computed if the heads see it.
        """
        if eps is None:
            eps = self.backbone.standardize(z) if self.energy.config.conditional else z
        value: Tensor = self.tau * self.energy(self.energy.inputs(z, eps))
        return value if self.ceiling == math.inf else value.clamp(max=self.ceiling)

    def potential(self, eps: Sequence[Tensor]) -> Tensor:
        """g(ε), (B,): the target's log density is g(ε) − ½‖ε‖² + const (Appendix A.3)."""
        trace = self.backbone.transform(eps)
        if self.target == "exact":
            return self.f(trace.z, eps)
        squares = torch.stack([e.square().flatten(1).sum(1) for e in eps], dim=1)
        return self.f(trace.z, eps) + (trace.log_prior + 0.5 * squares).sum(1)

    def log_density(self, eps: Sequence[Tensor]) -> Tensor:
        """log p_α(ε) + log Z in nats, (B,): τ f(T_β(ε)) + log N(ε; 0, I)."""
        self._require_calibrated("log_density")
        return self.f(self.backbone.reparameterize(eps), eps) + _log_standard_normal(eps)

    def log_prior(self, z: Sequence[Tensor]) -> Tensor:
        """log p_α(z) + log Z in nats, (B,): τ f(z) + log p_β(z) (Eq. 6)."""
        self._require_calibrated("log_prior")
        trace = self.backbone.given(z)
        return self.f(z, trace.eps) + trace.log_prior.sum(1)

    @isolated()
    def log_normalizer(self, *, n: int = 10_000, seed: int = 0, chunk: int = 128) -> tuple[float, float]:
        """log Z = log E_{p_β}[e^{τf}] from n ancestral draws, and the ESS of the estimate as a fraction of n.

        Forward importance sampling underestimates log Z where the ESS is small.
        """
        self._require_calibrated("log_normalizer")
        device = next(self.backbone.parameters()).device
        parts: list[Tensor] = []
        with torch.no_grad():
            for first, count in chunks(n, chunk):
                eps = self.backbone.standard_normal(count, generator=BlockGenerator(seed, first, count, device))
                parts.append(self.f(self.backbone.reparameterize(eps), eps).double())
        f = torch.cat(parts)
        return float(f.logsumexp(0)) - math.log(n), float(effective_sample_size(f)) / n

    @isolated(grad=False)
    def map_chunks(
        self,
        see: Callable[[Samples], Seen],
        n: int,
        *,
        seed: int = 0,
        sampler: SamplerConfig | None = None,
        chunk: int = 128,
        processes: Processes = ALONE,
    ) -> list[Seen]:
        """Draw n samples in chunks, and return the results of `see`, called with each chunk, in order.

        Draw i depends on (seed, i) alone, not on `chunk` (blocks of 64). The `processes` share the chunks. sampler:
        default, the one recorded with the prior. Raises DivergenceError when a chain leaves the finite numbers.
        """
        sampler = sampler or self.sampler
        device = next(self.backbone.parameters()).device
        potential = graphed(self.potential, device)

        def drawn(part: tuple[int, int]) -> Seen:
            first, count = part
            generator = BlockGenerator(seed, first, count, device)
            found = draw(
                potential, lambda: self.backbone.standard_normal(count, generator=generator), sampler, generator
            )
            trace = self.backbone.transform(found.eps)
            images = self.backbone.likelihood(trace.features).mean
            return see(Samples(trace.z, found.eps, images, found.acceptance, found.norm, found.ess_fraction))

        return processes.map(drawn, chunks(n, chunk))

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
        """n draws of p_α by `sampler` (default: the one recorded with the prior); image i depends on (seed, i) alone.

        progress: advances by the draws. Raises DivergenceError when a chain leaves the finite numbers.
        """
        done = 0

        def see(part: Samples) -> Samples:
            nonlocal done
            now = min(n, done + processes.count * len(part.images))  # the others are about as far
            progress.advance(now - done)
            done = now
            return part

        parts = self.map_chunks(see, n, seed=seed, sampler=sampler, chunk=chunk, processes=processes)
        return Samples(
            [torch.cat(group) for group in zip(*(part.z for part in parts), strict=True)],
            [torch.cat(group) for group in zip(*(part.eps for part in parts), strict=True)],
            *(torch.cat(column) for column in zip(*(part[2:] for part in parts), strict=True)),
        )

    @isolated()
    def scores(
        self,
        images: Tensor,
        forms: Iterable[Form],
        *,
        draws: int = 8,
        sampler: SamplerConfig | None = None,
        seed: int = 0,
        first: int = 0,
        chunk: int = 256,
    ) -> dict[Form, Tensor]:
        """Scores of images (B, C, H, W) in [0, 1] in several forms on shared draws, (B,) nats each (Eqs. 20, 21).

        sampler: of the lower groups (default: the one recorded with the prior). Image i's draws depend on
        (seed, first + i) alone, `first` being a multiple of 64; not on `chunk`. Raises RegimeError for a refiner unless
        all forms are without f, and as `model.scores.scores` does.
        """
        forms = list(forms)
        if any(form.energy for form in forms):
            self._require_calibrated("a score")
        parts = [
            scores(
                self.backbone,
                self.f,
                images[start : start + count],
                forms,
                draws=draws,
                sampler=sampler or self.sampler,
                seed=seed,
                first=first + start,
            )
            for start, count in chunks(len(images), chunk)
        ]
        return {form: torch.cat([part[form] for part in parts]) for form in forms}

    def _require_calibrated(self, what: str) -> None:
        if self.regime != "calibrated":
            raise RegimeError(
                f"{what} needs a calibrated prior, found a refiner: its f is shaped by short-run dynamics and is no "
                "log density ratio. Fit with --objective nce, or use "
                "this prior for samples only"
            )


def _require_ranges(tau: float, ceiling: float) -> None:
    if not 0 <= tau <= TAU_LIMIT:
        raise ConfigurationError(f"expected tau from 0 to {TAU_LIMIT:g}, found {tau}")
    if not (-CEILING_LIMIT <= ceiling <= CEILING_LIMIT or ceiling == math.inf):
        raise ConfigurationError(f"expected a ceiling within ±{CEILING_LIMIT:g} nats or inf for none, found {ceiling}")


def _log_standard_normal(eps: Sequence[Tensor]) -> Tensor:
    return torch.stack([-0.5 * (e.square() + math.log(2 * math.pi)).flatten(1).sum(1) for e in eps]).sum(0)
