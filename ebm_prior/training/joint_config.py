"""Settings of joint training: the default and the published one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ebm_prior.errors import ConfigurationError
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.settings import (
    require_kinds,
    require_not_negative,
    require_positive,
    require_seed,
    require_shares,
    setting,
)

Space = Literal["eps", "z"]


@dataclass(frozen=True)
class JointConfig:
    """Settings of joint training. The published ones of the paper's Table 1 are `paper_joint()`."""

    posterior: Literal["langevin", "inference"] = setting(
        "inference", "z of an image: chains through the generator, or the inference network"
    )
    prior: Literal["ebm", "gaussian"] = setting("ebm", "gaussian: f = 0, a VAE")
    iterations: int = setting(5_000, "gradient steps")
    batch_size: int = setting(100, "images, and as many prior chains, per step")
    learning_rate: float = setting(1e-3, "peak rate of generator and inference network")
    energy_learning_rate: float = setting(1e-4, "peak rate of the energy")
    energy_from: float = setting(0.2, "share of the run before the energy joins, with f = 0")
    warmup: int = setting(100, "iterations over which the rates rise linearly")
    decay: bool = setting(True, "let the rates fall to 0 along a cosine")
    betas: tuple[float, float] = setting((0.9, 0.999), "moment decays of Adam")
    gradient_clip: float = setting(200.0, "largest gradient norm of the generator's side")
    ema: float = setting(0.999, "decay of the weights' moving average; 0: none")
    energy: EnergyConfig = field(
        default_factory=lambda: EnergyConfig(hidden=200, vector_layers=4, joint=0, standardize=False)
    )
    penalty: float = setting(0.0, "weight of E[f_q² + f_p²]")
    space: Space = setting("eps", "where chains move: ε of appendix A.3, or z itself")
    chains: Literal["fresh", "persistent"] = setting("fresh", "where prior chains start")
    refresh: float = setting(0.05, "share of persistent chains restarted each step")
    prior_chain: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(proposals=1, kernel="langevin", steps=40, step_size=0.08)
    )
    posterior_chain: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(proposals=1, kernel="langevin", steps=40, step_size=0.005)
    )
    bfloat16: bool = setting(False, "the image head in bfloat16 in posterior chains, for about twice the speed")
    channels_last: bool = setting(False, "memory layout, for many networks faster on a CPU")
    evaluate_every: int = setting(500, "iterations between metrics, states and pictures")
    seed: int = setting(0, "seed of everything random")

    def __post_init__(self) -> None:
        require_kinds(self)
        positive = ("iterations", "batch_size", "learning_rate", "energy_learning_rate", "gradient_clip")
        require_positive(self, *positive, "evaluate_every")
        require_seed(self)
        require_shares(self, "ema", "energy_from", "betas", open=True)
        require_not_negative(self, "warmup", "penalty")
        require_shares(self, "refresh")
        if self.energy.standardize:
            raise ConfigurationError("energy standardize must be off: the latents move while they are learned")
        own_start = self.space == "z" or self.chains == "persistent"
        if max(self.prior_chain.proposals if own_start else 1, self.posterior_chain.proposals) > 1:
            raise ConfigurationError(
                "chain proposals must be 1 for posterior chains, for persistent chains and for chains in z: these "
                "start from a given point, so there is nothing to choose among"
            )


def paper_joint() -> JointConfig:
    """The published joint training (references in README): langevin + ebm, z-space chains, batch 100.

    K = 60 steps of 0.4 for the prior (the paper's text says 40), 40 of 0.1 for the posterior, in the convention
    z + ½s²∇ + sξ: s²/2 = 0.08 and 0.005 in the units of Eq. 12. Rates 1e-4 and, for the energy, 2e-5. Not as published:
    chains start from the model's own Gaussian prior, both heads have four layers of 200 (Table 12 gives z_2 two of
    100), gradients are clipped, and what is kept is the weights' moving average. Its prior is drawn from by the exact
    default sampler in ε, not by these short chains in z.
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
