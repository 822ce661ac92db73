"""Settings of joint training: the default and the published ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.samplers import ALL_GROUPS, SamplerConfig
from ebm_prior.settings import (
    require,
    require_kinds,
    require_not_negative,
    require_positive,
    require_seed,
    require_shares,
    setting,
    within,
)

Space = Literal["eps", "z"]


@dataclass(frozen=True)
class JointConfig:
    """Settings of joint training. The published ones of the paper's Table 1 are `paper_joint()`."""

    posterior: Literal["langevin", "inference"] = setting(
        "inference", "Source of posterior latents: Langevin chains through the generator, or the inference network"
    )
    prior: Literal["ebm", "gaussian"] = setting(
        "ebm", "Prior of the latents: energy-based (ebm), or Gaussian with f = 0 as in a VAE"
    )
    iterations: int = setting(5_000, "Number of gradient steps")
    batch_size: int = setting(100, "Images per gradient step, matched by as many prior chains")
    learning_rate: float = setting(1e-3, "Peak learning rate of the generator and the inference network")
    energy_learning_rate: float = setting(1e-4, "Peak learning rate of the energy")
    energy_from: float = setting(0.2, "Share of the run that trains with f = 0, before the energy joins")
    warmup: int = setting(100, "Iterations over which the learning rates rise linearly to their peaks")
    decay: bool = setting(True, "Let the learning rates fall to 0 along a cosine")
    betas: tuple[float, float] = setting((0.9, 0.999), "Decay rates of Adam's two moment estimates")
    gradient_clip: float = setting(200.0, "Largest gradient norm of the generator and the inference network")
    ema: float = setting(0.999, "Decay of the moving average of the weights; 0 turns averaging off")
    energy: EnergyConfig = field(
        default_factory=lambda: EnergyConfig(hidden=200, vector_layers=4, joint=0, standardize=False)
    )
    penalty: float = setting(0.0, "Weight of the penalty E[f_q² + f_p²] on the energy's size")
    space: Space = setting("eps", "Space in which chains move: ε (Appendix A.3), or the latents z themselves")
    chains: Literal["fresh", "persistent"] = setting(
        "fresh", "Start of the prior chains: new draws, or the last ends of persistent chains"
    )
    refresh: float = setting(0.05, "Share of the persistent chains that start again at each step")
    prior_chain: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(proposals=1, kernel="langevin", steps=40, step_size=0.08)
    )
    posterior_chain: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(proposals=1, kernel="langevin", steps=40, step_size=0.005)
    )
    bfloat16: bool = setting(
        False, "Compute the image head in bfloat16 in posterior chains, which is about twice as fast"
    )
    channels_last: bool = setting(False, "Store tensors with channels last, which makes many networks faster on a CPU")
    evaluate_every: int = setting(
        500, "Iterations between two evaluations, each with metrics, a saved state and pictures"
    )
    seed: int = setting(0, "Seed of all random numbers")

    def __post_init__(self) -> None:
        require_kinds(self)
        positive = ("iterations", "batch_size", "learning_rate", "energy_learning_rate", "gradient_clip")
        require_positive(self, *positive, "evaluate_every")
        require_seed(self)
        require_shares(self, "ema", "energy_from", "betas", open=True)
        require_not_negative(self, "warmup", "penalty")
        require_shares(self, "refresh")
        with within("energy"):
            moving = "must be off in joint training, because latents change during it"
            require(self.energy, "standardize", not self.energy.standardize, moving)
            require(self.energy, "groupwise", not self.energy.groupwise, moving)
        given = "which start from a given point, so there is nothing to choose among"
        with within("prior_chain"):
            fresh = self.space == "eps" and self.chains == "fresh"
            single = f"must be 1 for persistent chains and for chains in z, {given}"
            require(self.prior_chain, "proposals", fresh or self.prior_chain.proposals == 1, single)
            require(self.prior_chain, "by_group", not self.prior_chain.by_group, ALL_GROUPS)
        with within("posterior_chain"):
            single = f"must be 1 for posterior chains, {given}"
            require(self.posterior_chain, "proposals", self.posterior_chain.proposals == 1, single)
            require(self.posterior_chain, "by_group", not self.posterior_chain.by_group, ALL_GROUPS)
        for name in ("prior_chain", "posterior_chain"):
            with within(name):
                unknown = "must be 0, because joint training changes the latents' typical set"
                require(getattr(self, name), "norm_limit", getattr(self, name).norm_limit == 0, unknown)


def paper_joint() -> JointConfig:
    """The joint training as published by Cui, Wu and Han (CVPR 2023): langevin + ebm, z-space chains, batch 100.

    K = 60 steps of 0.4 for the prior (the paper's text says 40), 40 of 0.1 for the posterior, in the convention
    z + ½s²∇ + sξ: s²/2 = 0.08 and 0.005 in the units of Eq. 12. The learning rates are 1e-4 and, for the energy, 2e-5.
    Differences: chains start from the model's own Gaussian prior, both heads have four layers of 200 (Table 12 gives
    z_2 two of 100), gradients are clipped, the moving average of the weights is kept, and the prior records the exact
    default sampler in ε instead of the short chains in z.
    """
    heads = EnergyConfig(hidden=200, vector_layers=4, joint=0, activation="leaky_relu", standardize=False)
    return JointConfig(
        posterior="langevin",
        learning_rate=1e-4,
        energy_learning_rate=2e-5,
        energy_from=0.0,
        warmup=0,
        decay=False,
        betas=(0.5, 0.999),
        energy=heads,
        space="z",
        prior_chain=SamplerConfig(proposals=1, kernel="langevin", steps=60, step_size=0.08),
        posterior_chain=SamplerConfig(proposals=1, kernel="langevin", steps=40, step_size=0.005),
    )


JOINT_PRESETS = {"default": JointConfig, "paper": paper_joint}
