"""log Z = log E_{p_β}[e^{τf}] of a prior: an estimate by importance weights, or bounds on both sides by annealing.

The bounds take four steps. A pilot population chooses a ladder of τ and the moves on it, and is thrown away. Chains
climb the ladder from N(0, I): they bound log Z from below. Those that descend it must start from draws of the prior.
Nobody can draw from it exactly, so they start where the others have arrived and, where images are given, every second
one from a posterior latent, which the prior was trained to imitate. From there they move at τ = 1 for a while. They
bound log Z from above if by then they have the prior's distribution.

That premise is tested, not proved. A region of high f that neither climbing chains nor posterior latents have found is
in neither bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ebm_prior.compute.isolation import isolated
from ebm_prior.compute.randomness import BLOCK, BlockGenerator, Purpose, chunks, derived_seed
from ebm_prior.errors import ConfigurationError
from ebm_prior.interfaces import SILENT, Progress
from ebm_prior.model.annealing import Ladder, climb, descend, find_ladder, stay
from ebm_prior.model.arguments import require_calibrated, require_count, require_images
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.bounds import Bounds, Difference, bounds_of
from ebm_prior.model.samplers import Potential, effective_sample_size, start
from ebm_prior.settings import configured, require, require_counts, require_kinds, require_positive, setting


@dataclass(frozen=True)
class AnnealingConfig:
    """Settings of the chains that bound log Z. The work is that of 2 · repetitions · chains chains.

    >>> bounds = prior.log_normalizer(method="ais", config=AnnealingConfig(repetitions=4, chains=2, moves=2))
    >>> bounds.repetitions
    4
    """

    repetitions: int = setting(
        32, "Independent repetitions of both bounds, over which standard errors and confidence limits are computed"
    )
    chains: int = setting(8, "Annealed chains in each repetition and direction; more bring the two bounds closer")
    ess: float = setting(
        0.98, "Conditional effective sample size of each step of τ, as a share: nearer to 1, the ladder is finer"
    )
    rungs: int = setting(500, "Largest number of steps of τ between the backbone's prior and the energy-based one")
    leapfrogs: int = setting(5, "Leapfrog steps of each move of an annealed chain")
    moves: int = setting(40, "Moves at τ = 1 by which the chains of the upper bound settle before they are annealed")

    def __post_init__(self) -> None:
        require_kinds(self)
        require(self, "repetitions", self.repetitions >= 2, "must be 2 or more, for a standard error")
        require_positive(self, "chains", "rungs", "moves")
        require_counts(self, "leapfrogs", most=1000)
        require(self, "ess", 0 < self.ess < 1, "must be in (0, 1)")

    @property
    def total(self) -> int:
        """The number of chains in each direction."""
        return self.repetitions * self.chains


class Normalised:
    """The part of a prior that knows log Z."""

    backbone: Backbone
    regime: Literal["calibrated", "refiner"]

    if TYPE_CHECKING:

        def potential(self, eps: Sequence[Tensor]) -> Tensor: ...

    @overload
    def log_normalizer(
        self, *, method: Literal["importance"] = "importance", n: int = ..., seed: int = ..., chunk: int = ...
    ) -> tuple[float, float]: ...

    @overload
    def log_normalizer(
        self,
        *,
        method: Literal["ais"],
        images: Tensor | None = ...,
        config: AnnealingConfig | Mapping[str, Any] | None = ...,
        seed: int = ...,
        chunk: int = ...,
        progress: Progress = ...,
    ) -> Bounds: ...

    @isolated()
    def log_normalizer(
        self,
        *,
        method: Literal["importance", "ais"] = "importance",
        n: int = 10_000,
        images: Tensor | None = None,
        config: AnnealingConfig | Mapping[str, Any] | None = None,
        seed: int = 0,
        chunk: int = 128,
        progress: Progress = SILENT,
    ) -> tuple[float, float] | Bounds:
        """log Z = log E_{p_β}[e^{τf}] in nats: an estimate with its ESS, or bounds from both sides.

        method "importance": log Z from n ancestral draws, and the ESS of the estimate as a fraction of n. It lies below
        log Z in expectation, and far below where the ESS is small.

        method "ais": `Bounds` by annealed chains, as `config` says (`ebm_prior.model.normalizer`); n is not used.
        images: (M, C, H, W) in [0, 1]; half of the chains of the upper bound begin at their posterior latents. Without
        images the upper bound knows no other region of high f than the lower one.
        """
        require_calibrated(self.regime, "log_normalizer")
        n, seed = require_count("n", n, least=1), require_count("seed", seed)
        if method == "importance":
            return importance(self.backbone, self.potential, n=n, seed=seed, chunk=chunk)
        if method != "ais":
            raise ConfigurationError(f"method: expected importance or ais, found {method!r}")
        settings = configured(AnnealingConfig, config)
        posterior = None if images is None else posterior_noise(self.backbone, images, seed=seed, chunk=chunk)
        return annealed(
            self.backbone, self.potential, settings, posterior=posterior, seed=seed, chunk=chunk, progress=progress
        )


class _Annealed(NamedTuple):
    """The findings of a chunk of chains, (B,) each: log weights of both directions, and f while the chains settled."""

    climbed: Tensor
    descended: Tensor
    halfway: Tensor  # f after half of the moves at τ = 1
    settled: Tensor  # f after all of them
    acceptance: Tensor  # of the later half


def importance(backbone: Backbone, potential: Potential, *, n: int, seed: int, chunk: int) -> tuple[float, float]:
    """log Z from the importance weights of n ancestral draws, and their ESS as a fraction of n."""
    device = next(backbone.parameters()).device
    parts: list[Tensor] = []
    with torch.no_grad():
        for first, count in chunks(n, chunk):
            generator = BlockGenerator(seed, first, count, device)
            parts.append(potential(backbone.standard_normal(count, generator=generator)).double())
    f = torch.cat(parts)
    return float(f.logsumexp(0)) - math.log(n), float(effective_sample_size(f)) / n


def annealed(
    backbone: Backbone,
    potential: Potential,
    config: AnnealingConfig,
    *,
    posterior: Sequence[Tensor] | None = None,
    seed: int = 0,
    chunk: int = 128,
    progress: Progress = SILENT,
) -> Bounds:
    """Bounds on log Z by annealed chains; see the module.

    Args:
        backbone: gives the shape of ε.
        potential: g(ε) = τ f(T_β(ε)) in nats.
        config: the chains.
        posterior: ε of posterior latents, a list of (M, *group.shape), at which every second one of the chains that
            descend begins; with fewer of them than such chains, they are used again. None: all begin at annealed draws.
        seed: of all random numbers.
        chunk: chains computed at a time, rounded to blocks of 64; no result depends on it.
        progress: advances by the moves of chunks of chains.

    Raises:
        DivergenceError: where f is not finite on the way.
    """
    ladder = _piloted(backbone, potential, config, seed, progress)
    device, parts = next(backbone.parameters()).device, chunks(config.total, chunk)
    progress.begin("log Z", len(parts) * (2 * ladder.rungs + config.moves))

    def both_ways(part: tuple[int, int]) -> _Annealed:
        first, count = part
        generator = BlockGenerator(derived_seed(seed, Purpose.ANNEALING), first, count, device)
        told = partial(progress.advance, 1)
        begun = start(potential, backbone.standard_normal(count, generator=generator))
        end, climbed = climb(potential, begun, ladder, generator, told)
        if posterior is not None:
            end = start(potential, _every_second(end.eps, posterior, first))
        half, _ = stay(potential, end, ladder, config.moves // 2, generator, told)
        last, acceptance = stay(potential, half, ladder, config.moves - config.moves // 2, generator, told)
        return _Annealed(climbed, descend(potential, last, ladder, generator, told), half.value, last.value, acceptance)

    return _concluded(map(both_ways, parts), ladder, config, posterior is not None)


def _piloted(
    backbone: Backbone, potential: Potential, config: AnnealingConfig, seed: int, progress: Progress
) -> Ladder:
    """The ladder that a block of chains of their own finds."""
    device = next(backbone.parameters()).device
    generator = BlockGenerator(derived_seed(seed, Purpose.ANNEALING_PILOT), 0, BLOCK, device)
    progress.begin("ladder of τ", 0)
    return find_ladder(
        potential,
        backbone.standard_normal(BLOCK, generator=generator),
        generator,
        ess=config.ess,
        leapfrogs=config.leapfrogs,
        most=config.rungs,
        told=partial(progress.advance, 1),
    )


def _concluded(parts: Iterable[_Annealed], ladder: Ladder, config: AnnealingConfig, two_starts: bool) -> Bounds:
    """The bounds from the findings of all chunks; two_starts: every second chain began at a posterior latent."""
    climbed, descended, halfway, settled, acceptance = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    lower, upper, lower_error, upper_error = bounds_of(climbed, descended, config.repetitions)
    return Bounds(
        lower,
        upper,
        lower_error,
        upper_error,
        repetitions=config.repetitions,
        chains=config.chains,
        spread=(float(climbed.std()), float(descended.std())),
        rungs=ladder.rungs,
        leapfrogs=config.leapfrogs,
        moves=config.moves,
        acceptance=float(acceptance.mean()),
        drift=Difference.of(settled - halfway),
        apart=Difference.of(settled[::2], settled[1::2]) if two_starts else None,
    )


def _every_second(eps: Sequence[Tensor], others: Sequence[Tensor], first: int) -> list[Tensor]:
    """`eps`, a list of (B, *shape), with every second row from `others`; first: the number of the first row, even."""
    rows = torch.arange(first // 2, first // 2 + -(-len(eps[0]) // 2), device=eps[0].device) % len(others[0])
    mixed = [e.clone() for e in eps]
    for e, other in zip(mixed, others, strict=True):
        e[::2] = other[rows]
    return mixed


@torch.no_grad()
def posterior_noise(backbone: Backbone, images: Tensor, *, seed: int, chunk: int) -> list[Tensor]:
    """ε of one posterior draw for each of the images (M, C, H, W) in [0, 1]: a list of (M, *group.shape).

    Raises ConfigurationError for images of another form, or none.
    """
    require_images(images, backbone.image_shape)
    require_count("the number of images", len(images), least=1)
    like, parts = next(backbone.parameters()), []
    for first, count in chunks(len(images), chunk):
        generator = BlockGenerator(derived_seed(seed, Purpose.ANNEALING_POSTERIOR), first, count, like.device)
        batch = images[first : first + count].to(like.device, like.dtype)
        parts.append(backbone.infer(backbone.observe(batch, generator=generator), generator=generator).eps)
    return [torch.cat(group) for group in zip(*parts, strict=True)]
