"""Samplers in ε-space, where the backbone's prior is N(0, I) and the target is (Appendix A.3)

    log p(ε) = g(ε) − ½‖ε‖² + const,    g(ε) = f(T_β(ε)).

The Jacobian of T_β cancels, and the gradient of −½‖ε‖² is exactly −ε, so only g is differentiated. Kernels are pure
functions: (state, potential, step_size, generator) -> (state, info). Latents are always a list of (B, *group.shape).
Chains are independent: each has its own step size, acceptance and norm, (B,), so no result depends on the batching.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ebm_prior.compute.cuda_graphs import Graphs
from ebm_prior.compute.randomness import Generator, standard_normal, uniform
from ebm_prior.errors import DivergenceError
from ebm_prior.settings import later_setting, require, require_counts, require_kinds, require_not_negative, setting

MOST_STEPS, MOST_PROPOSALS, MOST_LEAPFROGS = 100_000, 100_000, 1_000  # more would not end in reasonable time
JITTER = 0.3  # largest relative change of a trajectory's step size
# Optimal acceptances are .57 for one leapfrog (Roberts & Rosenthal 1998), .65 for many (Beskos et al. 2013).
TARGET_ACCEPTANCE = 0.6
ALL_GROUPS = "must be off: chains in training move all groups together"

Potential = Callable[[Sequence[Tensor]], Tensor]
"""g: ε, a list of (B, *group.shape) -> (B,) nats, differentiable."""


class ChainState(NamedTuple):
    """The state of chains between two steps: the position ε, and g with its gradient there."""

    eps: list[Tensor]
    value: Tensor  # g(ε), (B,)
    gradient: list[Tensor]  # ∇g(ε)


class ChainInfo(NamedTuple):
    """Diagnostics of one step, per chain."""

    acceptance: Tensor  # probability in [0, 1]; 1 for the unadjusted kernel
    norm: Tensor  # ‖ε‖/√D, about 1 under the backbone's prior


Kernel = Callable[[ChainState, Potential, Tensor, Generator], tuple[ChainState, ChainInfo]]


@dataclass(frozen=True)
class SamplerConfig:
    """Settings of a sampler: importance resampling among `proposals` draws, then `steps` of a Markov kernel.

    With proposals = 1 there is no resampling, with steps = 0 no chain. The kernel is Langevin (Eq. 12; `step_size` is
    s) or pCN-Langevin, which is exact. With `by_group` both are done for each latent group in turn
    (`ebm_prior.model.by_group`). Raises ConfigurationError for a value out of its range or of the wrong type.

    >>> longer = SamplerConfig(proposals=4, steps=10)
    >>> prior.sample(2, sampler=longer).acceptance.shape
    torch.Size([2])
    """

    proposals: int = setting(
        32, "Ancestral draws of which one is kept, with probability proportional to exp f; 1: a plain draw"
    )
    kernel: Literal["langevin", "pcn-langevin"] = setting(
        "pcn-langevin", "Markov kernel of the chains: langevin (Eq. 12), or pcn-langevin, which is exact"
    )
    steps: int = setting(40, "Steps of the Markov kernel after the choice among the proposals")
    step_size: float = setting(0.15, "Step size of the Markov kernel: s of Eq. 12 for langevin, δ for pcn-langevin")
    adapt_steps: int = setting(
        0, "Number of first steps in which pcn-langevin adapts its step size, at most all; later steps are exact"
    )
    leapfrogs: int = setting(
        1, "Leapfrog steps in each step of pcn-langevin; more than 1 make it Hamiltonian Monte Carlo"
    )
    temperature: float = setting(1.0, "Factor on the noise of the langevin kernel")
    by_group: bool = later_setting(
        False, "Draw one latent group after another, each by its own head, in one pass through the network"
    )
    norm_limit: float = later_setting(
        0.0, "Largest ‖ε‖/√D with which a chain may end; a chain beyond it begins anew, up to 5 times; 0: no limit"
    )

    def __post_init__(self) -> None:
        require_kinds(self)
        require_counts(self, "proposals", most=MOST_PROPOSALS)
        require(self, "steps", 0 <= self.steps <= MOST_STEPS, f"must be from 0 to {MOST_STEPS:,}")
        require(self, "adapt_steps", 0 <= self.adapt_steps <= MOST_STEPS, f"must be from 0 to {MOST_STEPS:,}")
        require_counts(self, "leapfrogs", most=MOST_LEAPFROGS)
        require(self, "step_size", 0 < self.step_size <= 2, "must be in (0, 2]")
        require_not_negative(self, "temperature", "norm_limit")
        noisy, exact = self.kernel == "langevin" and self.steps > 0, self.kernel == "pcn-langevin"
        cold = "must be 1 unless the kernel is langevin with at least one step"
        require(self, "temperature", self.temperature == 1 or noisy, cold)
        require(self, "leapfrogs", self.leapfrogs == 1 or exact, "must be 1 unless the kernel is pcn-langevin")
        fixed = (
            "must be 0 unless the kernel is pcn-langevin (langevin accepts every step, so it cannot adapt): set both"
        )
        require(self, "adapt_steps", self.adapt_steps == 0 or exact, fixed)
        together = "must be 0 with by_group: it is a limit of all latent groups together"
        require(self, "norm_limit", self.norm_limit == 0 or not self.by_group, together)


def _unchanged(name: str) -> Any:
    """A dataclass field that is None by default and has the help text of the field `name` of SamplerConfig."""
    return field(default=None, metadata=SamplerConfig.__dataclass_fields__[name].metadata)


@dataclass(frozen=True)
class SamplerChanges:
    """Settings that replace those of another sampler; None leaves the other's setting as it is."""

    proposals: int | None = _unchanged("proposals")
    kernel: Literal["langevin", "pcn-langevin"] | None = _unchanged("kernel")
    steps: int | None = _unchanged("steps")
    step_size: float | None = _unchanged("step_size")
    leapfrogs: int | None = _unchanged("leapfrogs")
    adapt_steps: int | None = _unchanged("adapt_steps")
    temperature: float | None = _unchanged("temperature")
    by_group: bool | None = _unchanged("by_group")
    norm_limit: float | None = _unchanged("norm_limit")

    def __post_init__(self) -> None:
        require_kinds(self)

    def of(self, sampler: SamplerConfig) -> SamplerConfig:
        """A copy of `sampler` with these settings. Raises ConfigurationError where they do not fit together."""
        return replace(sampler, **{name: value for name, value in asdict(self).items() if value is not None})


class GraphedPotential:
    """A potential on a GPU: its values, its gradients and whole steps of a kernel run as CUDA graphs.

    The weights of the potential may change in place.
    """

    def __init__(self, potential: Potential) -> None:
        self._potential, self._graphs = potential, Graphs()

    def __call__(self, eps: Sequence[Tensor]) -> Tensor:
        """g(ε), (B,)."""
        if torch.is_grad_enabled():  # the caller differentiates, which a graph of values does not support
            return self._potential(eps)
        value: Tensor = self._graphs.run("value", lambda e, _: self._potential(e), list(eps))
        return value

    def start(self, eps: Sequence[Tensor]) -> ChainState:
        """See `start`."""
        state: ChainState = self._graphs.run("start", lambda e, _: start(self._potential, e), list(eps))
        return state

    def steps(self, kernel: Kernel) -> Kernel:
        """`kernel` on this potential."""
        name = getattr(kernel, "func", kernel), tuple(sorted(getattr(kernel, "keywords", {}).items()))

        def stepped(inputs: Any, generator: Generator) -> Any:
            return kernel(inputs[0], self._potential, inputs[1], generator)

        return lambda state, _, step_size, generator: self._graphs.run(name, stepped, (state, step_size), generator)


def graphed(potential: Potential, device: torch.device) -> Potential:
    """The potential in the form in which chains on `device` run fastest. Graphs live as long as the returned object."""
    return GraphedPotential(potential) if device.type == "cuda" else potential


def start(potential: Potential, eps: Sequence[Tensor]) -> ChainState:
    """The state at ε: g and its gradient there."""
    if isinstance(potential, GraphedPotential):
        return potential.start(eps)
    leaves = [e.detach().requires_grad_(True) for e in eps]
    with torch.enable_grad():
        value = potential(leaves)
        gradient = torch.autograd.grad(value.sum(), leaves)
    return ChainState([leaf.detach() for leaf in leaves], value.detach(), list(gradient))


def langevin_step(
    state: ChainState, potential: Potential, step_size: Tensor, generator: Generator, *, temperature: float = 1.0
) -> tuple[ChainState, ChainInfo]:
    """Langevin (Eq. 12) on the ε-target: ε ← ε + s(∇g − ε) + √(2s)·τ·ξ. `step_size`: (B,)."""
    moved = _langevin_move(state, step_size, generator, temperature)
    return start(potential, moved), ChainInfo(torch.ones_like(step_size), norm(moved))


def last_langevin_step(
    state: ChainState, potential: Potential, step_size: Tensor, generator: Generator, *, temperature: float = 1.0
) -> tuple[ChainState, ChainInfo]:
    """`langevin_step` at the end of a chain: to the same ε, without the gradient there, which no step reads."""
    moved = _langevin_move(state, step_size, generator, temperature)
    with torch.no_grad():
        value = potential(moved)
    return ChainState(moved, value, []), ChainInfo(torch.ones_like(step_size), norm(moved))


def _langevin_move(state: ChainState, step_size: Tensor, generator: Generator, temperature: float) -> list[Tensor]:
    s, noise = step_size, (2 * step_size).sqrt() * temperature
    return [
        torch.lerp(e, d, _rows(s, e)).addcmul_(_rows(noise, e), _noise_like(e, generator))
        for e, d in zip(state.eps, state.gradient, strict=True)
    ]


def pcn_langevin_step(
    state: ChainState, potential: Potential, step_size: Tensor, generator: Generator, *, leapfrogs: int = 1
) -> tuple[ChainState, ChainInfo]:
    """Preconditioned Crank-Nicolson Langevin, and with more `leapfrogs` its Hamiltonian form; exact in any dimension.

    With velocities v ~ N(0, I), each leapfrog is a kick v ← v + t∇g(ε), a turn of (ε, v) by the angle 2 arctan t, and a
    second kick; t = √(δ/2), with δ the `step_size`, (B,). The turn is the exact motion under N(0, I), so with f = 0
    every trajectory is accepted, at any step size and dimension (Beskos et al. 2011). One leapfrog is the step of
    Cotter et al. (2013, §4.3): (2+δ)ε′ = (2−δ)ε + 2δ∇g + √(8δ)ξ. Several leapfrogs move in one direction, where as many
    single steps would do a random walk. With several, t varies by up to `JITTER` between trajectories: with a fixed
    length, a trajectory could be a whole period of the motion and return to its start (Neal 2011).
    """
    velocity = [_noise_like(e, generator) for e in state.eps]
    t, new = (0.5 * step_size).sqrt(), state
    if leapfrogs > 1:
        t = t * (1 + JITTER * (2 * uniform(t.shape, generator, dtype=t.dtype, device=t.device) - 1))
    cosine, sine = (1 - t**2) / (1 + t**2), 2 * t / (1 + t**2)
    # The energy is H = −g(ε) + ½‖ε‖² + ½‖v‖², and a trajectory is accepted with probability min(1, e^{−ΔH}). Turns
    # leave ½‖ε‖² + ½‖v‖² unchanged, and a kick changes it by ½‖v + t∇g‖² − ½‖v‖² = t v·∇g + ½t²‖∇g‖². So ΔH is the sum
    # of these changes over all kicks, minus the change of g.
    work = torch.zeros_like(state.value)

    def kick() -> Tensor:
        done = t * _dot(velocity, new.gradient) + 0.5 * t**2 * _dot(new.gradient, new.gradient)
        for v, d in zip(velocity, new.gradient, strict=True):
            v.addcmul_(_rows(t, v), d)
        return done

    for _ in range(leapfrogs):
        work += kick()
        turned = [(_rows(cosine, e) * e).addcmul_(_rows(sine, e), v) for e, v in zip(new.eps, velocity, strict=True)]
        velocity = [(_rows(cosine, e) * v).addcmul_(_rows(-sine, e), e) for e, v in zip(new.eps, velocity, strict=True)]
        new = start(potential, turned)
        work += kick()

    # A trajectory is rejected if g or its gradient is not finite at its end. (g = +∞ alone would be accepted.)
    log_ratio = (new.value - state.value - work).masked_fill(~new.value.isfinite(), -math.inf)
    acceptance = log_ratio.clamp(max=0).exp().nan_to_num(nan=0.0)
    accepted = uniform(t.shape, generator, dtype=t.dtype, device=t.device) < acceptance
    kept = ChainState(
        where(accepted, new.eps, state.eps),
        torch.where(accepted, new.value, state.value),
        where(accepted, new.gradient, state.gradient),
    )
    return kept, ChainInfo(acceptance, norm(kept.eps))


KERNELS: dict[str, Any] = {"langevin": langevin_step, "pcn-langevin": pcn_langevin_step}


def kernel_of(config: SamplerConfig) -> Kernel:
    """The kernel of a sampler, with all of its settings except the step size."""
    if config.kernel == "langevin":
        return partial(langevin_step, temperature=config.temperature)
    return partial(pcn_langevin_step, leapfrogs=config.leapfrogs)


def last_kernel_of(config: SamplerConfig) -> Kernel | None:
    """The kernel for the last step of a sampler's chain, where that can do with less than the others."""
    return partial(last_langevin_step, temperature=config.temperature) if config.kernel == "langevin" else None


def run_chain(
    kernel: Kernel,
    state: ChainState,
    potential: Potential,
    steps: int,
    *,
    step_size: Tensor,
    adapt_steps: int = 0,
    generator: Generator = None,
    callback: Callable[[int, ChainState, ChainInfo], None] | None = None,
    may_leave: bool = False,
    last: Kernel | None = None,
) -> tuple[ChainState, Tensor, Tensor]:
    """Run `steps` of a kernel. Returns the last state, the mean acceptance (B,) and the step sizes (B,).

    `last`: the kernel of the last step, if another one. With CUDA graphs it is the same: one more graph would take
    memory.

    In the first `adapt_steps` each chain adapts its log step size towards the target acceptance (Robbins-Monro). After
    that the step size is fixed, so that the chain's target is exact. Unless chains `may_leave` the finite numbers,
    DivergenceError is raised when one, or g at its position, is no longer finite.
    """
    if isinstance(potential, GraphedPotential):
        kernel, last = potential.steps(kernel), None
    acceptance = torch.zeros_like(state.value)
    for step in range(steps):
        take = last if last is not None and step + 1 == steps else kernel
        state, info = take(state, potential, step_size, generator)
        acceptance += info.acceptance
        if step < adapt_steps:
            move = (info.acceptance - TARGET_ACCEPTANCE) / math.sqrt(step + 1)
            step_size = (step_size * move.exp()).clamp(1e-6, 2.0)
        if callback:
            callback(step, state, info)
    # g is checked too, because a backbone can overflow at a finite ε: at the last one, or at the first one, which
    # pCN-Langevin then never leaves.
    if not may_leave:
        require_finite_chains(norm(state.eps).isfinite() & state.value.isfinite(), steps)
    return state, acceptance / max(1, steps), step_size


def resample(
    potential: Potential, propose: Callable[[], list[Tensor]], proposals: int, generator: Generator
) -> tuple[list[Tensor], Tensor]:
    """Sampling-importance-resampling: one of `proposals` draws of N(0, I) per chain, with probability ∝ exp g.

    Returns ε and the effective sample size (Σw)²/Σw², (B,). The argmax of g + Gumbel noise is a draw from softmax(g)
    (the Gumbel-max identity), so only the best proposal so far is stored.
    """
    best = propose()
    if proposals == 1:
        return best, torch.ones(len(best[0]), dtype=best[0].dtype, device=best[0].device)
    with torch.no_grad():
        values = [potential(best)]
        score = values[0] + _gumbel_like(values[0], generator)
        for _ in range(proposals - 1):
            eps = propose()
            values.append(potential(eps))
            challenger = values[-1] + _gumbel_like(values[-1], generator)
            better = challenger > score
            score = torch.where(better, challenger, score)
            best = where(better, eps, best)
        return best, effective_sample_size(torch.stack(values, dim=1))


def require_finite_chains(finite: Tensor, steps: int) -> None:
    """Raise DivergenceError where chains are not finite: `finite` (B,)."""
    if lost := int((~finite).sum()):
        raise DivergenceError(
            f"{lost} of {len(finite)} chains left the finite numbers within {steps} steps: use a smaller step size "
            "or the exact kernel, pcn-langevin"
        )


def norm(eps: Sequence[Tensor]) -> Tensor:
    """‖ε‖/√D per chain, (B,): 1 ± 1/√(2D) under N(0, I)."""
    dimensions = sum(e[0].numel() for e in eps)
    return (_dot(eps, eps) / dimensions).sqrt()


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(Σw)²/Σw² over the last axis of log weights (..., M)."""
    return torch.exp(2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1))


def where(chosen: Tensor, yes: Sequence[Tensor], no: Sequence[Tensor]) -> list[Tensor]:
    """Per chain, one of two sets of latents: chosen (B,) -> a list of (B, *group.shape)."""
    return [torch.where(_rows(chosen, a), a, b) for a, b in zip(yes, no, strict=True)]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).flatten(1).sum(1) for x, y in zip(a, b, strict=True)]).sum(0)


def _rows(per_chain: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, …), to broadcast over a latent group."""
    return per_chain.reshape(-1, *(1 for _ in like.shape[1:]))


def _noise_like(e: Tensor, generator: Generator) -> Tensor:
    return standard_normal(e.shape, generator, dtype=e.dtype, device=e.device)


def _gumbel_like(value: Tensor, generator: Generator) -> Tensor:
    u = uniform(value.shape, generator, dtype=torch.float64, device=value.device)
    return -torch.log(-torch.log(u.clamp(min=1e-300))).to(value.dtype)
