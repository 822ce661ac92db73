"""Scores of images: the unnormalised log-posterior L^{>k}_EBM (Eq. 20) and the ratio LLR^{>k}_EBM (Eq. 21).

    L^{>k} = E[log p(x|z) + log p_β(z) + f(z)],   z_{>k} ~ q(z | x),  z_{≤k} ~ p_α(z_{≤k} | z_{>k})        (20)
    LLR^{>k} = L^{>0} − L^{>k}                                                                            (21)

k counts latent groups from the bottom, as in the paper, so the last k of `backbone.groups` are redrawn. The two terms
of a ratio, all k, and the scores with f and with f = 0 share the same upper latents, so that their noise cancels in
differences of scores. Nothing is normalised, since log Z is the same constant for all images.

All randomness of image i comes from (seed, i), so no score depends on the batch in which an image is scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ebm_prior.compute.randomness import BlockGenerator, Generator, Purpose, derived_seed, standard_normal
from ebm_prior.errors import ConfigurationError, described
from ebm_prior.model.backbone import Backbone, Gaussian, Posterior, Trace
from ebm_prior.model.by_group import Walk, draw_by_group
from ebm_prior.model.drawing import Sampled, draw
from ebm_prior.model.samplers import Potential, SamplerConfig

Mode = Literal["eq20", "elbo", "iw", "prior"]
Derived = Literal["complexity", "typicality", "composite"]
Lower = Literal["sample", "mean"]
MODES: tuple[Mode, ...] = get_args(Mode)
DERIVED: tuple[Derived, ...] = get_args(Derived)  # modes of L^{>0} that `ebm_prior.evaluation.outliers` makes of others
LOWERS: tuple[Lower, ...] = get_args(Lower)

NegativeEnergy = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Gaussian]], Tensor]
"""τ f of z and ε = T_β⁻¹(z), lists of (B, *group.shape), and of the p_β(z_i | z_<i), in nats: (B,)."""

_OBSERVATION, _POSTERIOR, _LOWER = 0, 1, 2  # purposes of random streams


class Form(NamedTuple):
    """One form of the score.

    k: number of groups, from the bottom, that are not inferred.
    ratio: LLR^{>k} instead of L^{>k}.
    mode: "eq20" is literally the paper's. "elbo" adds −log q(z_{>k}|x) and drops log p_β(z_{≤k}|z_{>k}), because these
        groups are drawn from their prior: it is the backbone's own bound. "iw" is "elbo" with L^{>0} replaced by the
        importance-weighted bound log E_q[p(x, z) e^f / q(z|x)] over the draws (Burda et al. 2016). "prior" is Eq. 20
        without log p(x|z), so log p_α(z) + log Z: log p(x|z) varies by many more nats than the prior and hides it.
        The modes "complexity", "typicality" and "composite" need more than the image and the prior:
        `ebm_prior.evaluation.outliers` has them.
    lower: "sample" draws z_{≤k} ~ p_α given z_{>k}. "mean" takes the backbone's own conditional means (ε = 0), also in
        the posterior draws of these groups, since bottom-up encoders pass them upwards. With "iw" and without f this is
        the score of HVAE's code (Havtorn et al. 2021). A single draw is much noisier than the differences of interest.
    energy: False leaves f out, both as a term and in the lower groups.
    """

    k: int
    ratio: bool = False
    mode: Mode | Derived = "eq20"
    lower: Lower = "sample"
    energy: bool = True

    @property
    def name(self) -> str:
        """E.g. LLR>1 elbo mean f."""
        return " ".join(
            [
                f"{'LLR' if self.ratio else 'L'}>{self.k}",
                self.mode,
                *([self.lower] if self.k else []),
                "f" if self.energy else "f=0",
            ]
        )


class Summands(NamedTuple):
    """The terms of Eq. 20 at one draw of the latents, (B,) nats each."""

    log_likelihood: Tensor  # log p(x | z)
    log_p_upper: Tensor  # Σ_{i>k} log p_β(z_i | z_{i+1})
    log_q_upper: Tensor  # Σ_{i>k} log q(z_i | …)
    log_p_lower: Tensor  # Σ_{i≤k} log p_β(z_i | z_{i+1})
    f: Tensor  # τ f(z); 0 without the energy

    def value(self, mode: Mode | Derived) -> Tensor:
        """The quantity that L^{>k} averages over draws, (B,) nats."""
        if mode == "eq20":
            return self.log_likelihood + self.log_p_upper + self.log_p_lower + self.f
        if mode == "prior":
            return self.log_p_upper + self.log_p_lower + self.f
        return self.log_likelihood + self.log_p_upper - self.log_q_upper + self.f


def scores(
    backbone: Backbone,
    f: NegativeEnergy,
    images: Tensor,
    forms: Iterable[Form],
    *,
    draws: int = 8,
    sampler: SamplerConfig,
    walk: Callable[[], Walk] | None = None,
    seed: int = 0,
    first: int = 0,
    watch: Callable[[Batch, int], None] | None = None,
) -> dict[Form, Tensor]:
    """The scores of images (B, C, H, W) in [0, 1]: for every form a tensor (B,) in nats, on shared draws.

    draws: S, the number of draws of the latents; the expectation of Eq. 20 is the mean over them. The observation
    x̃ ~ `observe` is drawn once.  sampler: draws the lower groups from p_α.  walk: begins a walk over the terms of τ f,
    which a sampler by groups needs.  first: the number of the first image in its set, a multiple of 64.  watch: called
    with the batch and the number of each draw of the latents. Raises ConfigurationError for a form that the backbone
    does not have, and DivergenceError where a chain is not finite.
    """
    forms = list(forms)
    _check(forms, len(backbone.groups), draws)
    needed = {form._replace(ratio=False) for form in forms}
    needed |= {form._replace(k=0, ratio=False) for form in forms if form.ratio}
    batch = Batch(backbone, f, images, sampler, walk, seed, first)
    values: dict[Form, list[Tensor]] = {form: [] for form in needed}
    # The loops are ordered such that only one posterior draw is in memory at a time. The draw of all groups comes
    # first, since k = 0 and lower = "sample" share it.
    passes = sorted(
        {(_lower(form), form.k, form.energy) for form in needed}, key=lambda each: (each[0] == "mean", each)
    )
    for number in range(draws):
        if watch is not None:
            watch(batch, number)
        for lower, k, energy in passes:
            summands = batch.summands(number, k, lower, energy)
            for form, column in values.items():
                if (_lower(form), form.k, form.energy) == (lower, k, energy):
                    column.append(summands.value(form.mode))
    level = {form: _expectation(form, torch.stack(column)) for form, column in values.items()}
    return {
        form: level[form._replace(k=0, ratio=False)] - level[form._replace(ratio=False)] if form.ratio else level[form]
        for form in forms
    }


class Whole(NamedTuple):
    """One draw of all groups from q(z | x): the draw, its traversal of the backbone, and log p(x | z), (B,)."""

    posterior: Posterior
    trace: Trace
    log_likelihood: Tensor


class Batch:
    """A batch of images, with a cache of the last posterior draw and summands, which several forms share."""

    def __init__(
        self,
        backbone: Backbone,
        f: NegativeEnergy,
        images: Tensor,
        sampler: SamplerConfig,
        walk: Callable[[], Walk] | None,
        seed: int,
        first: int,
    ) -> None:
        self.backbone, self.f, self.sampler, self.walk = backbone, f, sampler, walk
        self.seed, self.first, self.size, self.device = seed, first, len(images), next(backbone.parameters()).device
        self.x = observed(backbone, images, seed=seed, first=first)
        self._posterior: tuple[tuple[int, int], Posterior] | None = None
        self._summands: tuple[tuple[int, int, Lower], Summands] | None = None
        self._whole: tuple[int, Whole] | None = None

    def generator(self, purpose: int, *words: int) -> BlockGenerator:
        """A random generator for a purpose. Image i of the set gets the same numbers in any batch."""
        return _stream(self.seed, self.first, self.size, self.device, purpose, *words)

    def summands(self, number: int, k: int, lower: Lower, energy: bool) -> Summands:
        """The terms of Eq. 20 at draw `number`."""
        if k and lower == "sample":
            return self._at(number, k, energy, sampled=True)
        # If f has no effect on the latents, one pass serves both f and f = 0.
        if self._summands is None or self._summands[0] != (number, k, lower):
            self._summands = (number, k, lower), self._at(number, k, True, sampled=False)
        found = self._summands[1]
        return found if energy else found._replace(f=torch.zeros_like(found.f))

    @torch.no_grad()
    def whole(self, number: int) -> Whole:
        """The traversal with draw `number` of all groups."""
        if self._whole is None or self._whole[0] != number:
            posterior = self.posterior(number, 0)
            trace = self.backbone.given(posterior.z)
            self._whole = number, Whole(posterior, trace, self.backbone.likelihood(trace.features).log_prob(self.x))
        return self._whole[1]

    @torch.no_grad()
    def _at(self, number: int, k: int, energy: bool, *, sampled: bool) -> Summands:
        if not k:
            posterior, trace, log_likelihood = self.whole(number)
        else:
            posterior = self.posterior(number, 0 if sampled else k)
            free = FreeGroups(self.backbone, self.f, posterior.z[:-k], self.size, self.walk)
            generator = self.generator(_LOWER, number, k)
            trace = free.sample(self.sampler if energy else None, generator) if sampled else free.trace(None)
            log_likelihood = self.backbone.likelihood(trace.features).log_prob(self.x)
        upper = len(self.backbone.groups) - k
        return Summands(
            log_likelihood=log_likelihood,
            log_p_upper=trace.log_prior[:, :upper].sum(1),
            log_q_upper=posterior.log_q[:, :upper].sum(1),
            log_p_lower=trace.log_prior[:, upper:].sum(1),
            f=self.f(trace.z, trace.eps, trace.priors) if energy else trace.log_prior.new_zeros(self.size),
        )

    def posterior(self, number: int, means: int) -> Posterior:
        """Draw number `number` of q(z | x), in which the `means` lowest groups take their means."""
        if self._posterior is None or self._posterior[0] != (number, means):
            noise = self.backbone.standard_normal(self.size, generator=self.generator(_POSTERIOR, number))
            upper = len(noise) - means
            noise = [*noise[:upper], *(torch.zeros_like(group) for group in noise[upper:])]
            self._posterior = (number, means), self.backbone.infer(self.x, noise=noise)
        return self._posterior[1]


class FreeGroups:
    """The lower groups as functions of their ε, where the upper ones are fixed at z_{>k}."""

    def __init__(
        self,
        backbone: Backbone,
        f: NegativeEnergy,
        fixed: Sequence[Tensor],
        size: int,
        walk: Callable[[], Walk] | None = None,
    ) -> None:
        """walk: begins a walk over the terms of τ f, which a sampler by groups needs."""
        self.backbone, self.f, self.fixed, self.size, self.walk = backbone, f, fixed, size, walk

    def trace(self, eps: Sequence[Tensor] | None) -> Trace:
        """The traversal with z_{>k} fixed and z_{≤k} = T_β(ε); None: ε = 0."""
        first = len(self.fixed)

        def at(index: int, prior: Gaussian, context: Any) -> Tensor:
            if index < first:
                return self.fixed[index]
            if eps is None:
                return prior.mean.expand(self.size, *prior.mean.shape[1:])
            return prior.mean + prior.std * eps[index - first]

        return self.backbone.trace(at, self.size)

    def sample(self, sampler: SamplerConfig | None, generator: Generator) -> Trace:
        """The traversal with z_{≤k} drawn from p_α given z_{>k}, or from p_β if `sampler` is None.

        The draw of p_β equals the first proposal of the draw of p_α.
        """
        return self.trace(self.propose(generator)) if sampler is None else self.draw(sampler, generator)[0]

    def draw(self, sampler: SamplerConfig, generator: Generator) -> tuple[Trace, Sampled]:
        """The traversal with z_{≤k} drawn from p_α given z_{>k}, and the sampler's ε_{≤k} and diagnostics.

        A limit of ‖ε‖/√D, which is that of all groups, is widened for the fewer dimensions D of the free ones.
        """
        if sampler.by_group:
            assert self.walk is not None
            return draw_by_group(self.backbone, self.walk(), self.fixed, self.size, sampler, generator)
        if sampler.norm_limit:
            sizes = [math.prod(group.shape) for group in self.backbone.groups]
            wider = math.sqrt(sum(sizes) / sum(sizes[len(self.fixed) :]))
            sampler = replace(sampler, norm_limit=1 + max(0.0, sampler.norm_limit - 1) * wider)
        propose = partial(self.propose, generator)
        found = draw(self.potential, propose, sampler, generator, of_rows=self._of_rows)
        return self.trace(found.eps), found

    def _of_rows(self, rows: Tensor) -> Potential:
        return FreeGroups(self.backbone, self.f, [z[rows] for z in self.fixed], len(rows)).potential

    def propose(self, generator: Generator) -> list[Tensor]:
        """ε ~ N(0, I) of the free groups, a list of (B, *group.shape)."""
        like = next(self.backbone.parameters())
        shapes = [(self.size, *group.shape) for group in self.backbone.groups[len(self.fixed) :]]
        return [standard_normal(shape, generator, dtype=like.dtype, device=like.device) for shape in shapes]

    @property
    def potential(self) -> Potential:
        """g(ε_{≤k}) = τ f(z_{>k}, T_β(ε_{≤k})): the target is g(ε) − ½‖ε‖², the conditional of p_α in ε-space."""
        if self.alone:
            known = self.trace(None)
            (mean, std), upper = known.priors[-1], known.eps[:-1]
            return lambda eps: self.f([*self.fixed, mean + std * eps[0]], [*upper, eps[0]], known.priors)

        def traversed(eps: Sequence[Tensor]) -> Tensor:
            trace = self.trace(eps)
            return self.f(trace.z, trace.eps, trace.priors)

        return traversed

    @property
    def alone(self) -> bool:
        """Whether only one group is free. Then its prior is fixed, and its energy needs no traversal."""
        return len(self.fixed) == len(self.backbone.groups) - 1


@torch.no_grad()
def observed(backbone: Backbone, images: Tensor, *, seed: int = 0, first: int = 0) -> Tensor:
    """The observations x̃ of images (B, C, H, W) that `scores` draws for the same `seed` and `first`: (B, C, H, W).

    They are what the likelihood models (`Backbone.observe`), for instance binarised pixels.
    """
    like = next(backbone.parameters())
    generator = _stream(seed, first, len(images), like.device, _OBSERVATION)
    return backbone.observe(images.to(like.device, like.dtype), generator=generator)


def _stream(seed: int, first: int, size: int, device: torch.device, purpose: int, *words: int) -> BlockGenerator:
    seed = derived_seed(seed, Purpose.SCORES, purpose + 1, *(word + 1 for word in words))
    return BlockGenerator(seed, first, size, device)


def list_of_forms(forms: object) -> list[Form]:
    """Forms of scores, one or several, as a list. Raises ConfigurationError for anything else."""
    listed = isinstance(forms, Iterable) and not isinstance(forms, Form)
    given: list[Any] = list(forms) if listed else [forms]  # type: ignore[call-overload]
    strange = [form for form in given if not isinstance(form, Form)]
    if strange:
        raise ConfigurationError(
            f"forms: expected forms of scores, as [Form(k=1, ratio=True)] from ebm_prior.model.scores, found "
            f"{described(strange[0])}"
        )
    return given


def _expectation(form: Form, values: Tensor) -> Tensor:
    """The expectation over the draws, (S, B) -> (B,)."""
    if form.mode == "iw" and form.k == 0:
        return values.logsumexp(0) - math.log(len(values))
    return values.mean(0)


def _lower(form: Form) -> Lower:
    """The form's kind of lower groups; "sample" with k = 0, where there are none."""
    return form.lower if form.k else "sample"


def _check(forms: Sequence[Form], groups: int, draws: int) -> None:
    for form in forms:
        if not 0 <= form.k < groups or form.mode not in MODES or form.lower not in LOWERS:
            raise ConfigurationError(
                f"expected k from 0 to {groups - 1} (the backbone has {groups} groups), mode "
                f"{' or '.join(MODES)}, lower {' or '.join(LOWERS)}; found {form}"
            )
        if form.ratio and not form.k:
            raise ConfigurationError("LLR^{>k} compares L^{>0} with L^{>k}: expected k of 1 or more, found 0")
    if draws < 1:
        raise ConfigurationError(f"expected 1 draw or more, found {draws}")
