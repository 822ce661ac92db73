"""Settings of a fit: the default ones and the published ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from ebm_prior.errors import ConfigurationError
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.prior import Regime, Target
from ebm_prior.model.samplers import SamplerChanges, SamplerConfig
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
from ebm_prior.training.stages import StageConfig


@dataclass(frozen=True)
class FitConfig:
    """Settings of a fit. The defaults are what measured best (ebm_prior/training/README.md).

    Numbers are of gradient steps, images, or draws; gains in nats. Raises ConfigurationError for values that make no
    sense, or of another kind. The published settings are `ebm_prior.training.fit_config.paper_preset()`.

    >>> config = FitConfig(iterations=500, seed=1)
    >>> config.objective, config.energy.channels
    ('nce', 48)
    """

    objective: Literal["nce", "mle"] = setting("nce", "how the heads are trained")
    iterations: int = setting(2_400, "gradient steps")
    ratios: Literal["auto", "one", "staged"] = setting(
        "auto", "nce: one density ratio, or stages of them; auto: one, and stages where it saturates"
    )
    stage: StageConfig = field(default_factory=StageConfig)
    batch_size: int = setting(256, "posterior draws, and as many prior draws, per step")
    parts: int = setting(1, "parts of a batch, each with noise of its own, one at a time: less memory")
    learning_rate: float = setting(4e-3, "peak rate")
    warmup: int = setting(50, "iterations over which the rate rises linearly")
    decay: bool = setting(True, "let the rate fall to 0 along a cosine")
    optimizer: Literal["adamw", "adam"] = setting("adamw", "decoupled or L2 weight decay")
    betas: tuple[float, float] = setting((0.9, 0.999), "moment decays of the optimizer")
    weight_decay: float = setting(1e-2, "weight decay")
    ema: float = setting(0.99, "decay of the weights' moving average; 0: none")
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    chains: Literal["fresh", "persistent"] = setting("fresh", "mle: where chains start")
    chain: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(proposals=1, kernel="langevin", steps=20, step_size=0.01)
    )
    refresh: float = setting(0.05, "mle: share of persistent chains restarted each step")
    penalty: float = setting(1e-4, "mle: weight of E[f_q² + f_p²]")
    sampler: SamplerChanges = field(default_factory=SamplerChanges)  # of the one recorded: `recorded_sampler`
    target: Target = setting("exact", "ε-target; published: to replicate only")
    regime: Regime = setting("calibrated", "calibrated: f is a log density ratio; refiner: f only guides short chains")
    held_out: int = setting(5_000, "images kept for held-out latents, at most a tenth")
    ess_floor: float = setting(0.05, "tempering keeps at least this ESS / number of draws")
    evaluate_every: int = setting(100, "iterations between held-out gains and resume states")
    patience: int = setting(10, "stop after so many held-out gains without a better one")
    seed: int = setting(0, "seed of everything random")

    def __post_init__(self) -> None:
        require_kinds(self)
        require_positive(self, "iterations", "batch_size", "learning_rate", "held_out", "evaluate_every", "patience")
        most, draws = min(self.batch_size, self.stage.particles), self.stage.particles
        parts = f"must divide the batch of {self.batch_size}, and be no more than the {draws} draws of stages"
        require(self, "parts", 1 <= self.parts <= most and self.batch_size % self.parts == 0, parts)
        require_shares(self, "ema", "ess_floor", "betas", open=True)
        require_not_negative(self, "warmup", "weight_decay", "penalty")
        require_shares(self, "refresh")
        if self.chains == "persistent" and self.chain.proposals > 1:
            raise ConfigurationError("persistent chains go on from their last step: chain proposals must be 1")
        if self.ratios == "staged" and (self.objective != "nce" or self.regime != "calibrated"):
            raise ConfigurationError("stages are of density ratios: objective nce and regime calibrated")
        require_seed(self)
        _ = self.recorded_sampler  # refuses what does not fit together
        if self.target == "published" and self.regime == "calibrated":
            raise ConfigurationError("the published target is not the density that f describes: regime must be refiner")

    @property
    def may_stage(self) -> bool:
        """Whether stages (`staging`) take over where one ratio saturates."""
        return self.objective == "nce" and self.ratios == "auto" and self.regime == "calibrated"

    def staging(self, after: int) -> FitConfig:
        """The settings that go on in stages where one ratio has saturated after `after` iterations.

        The draws that are their negatives move at each iteration, which takes longer than all else in it: so half the
        batch, and what follows a third of the iterations.
        """
        batch = max(1, self.batch_size // 2 // self.parts) * self.parts
        iterations = min(self.iterations, after + max(1, self.iterations // 3))
        return replace(self, ratios="staged", batch_size=batch, iterations=iterations)

    @property
    def recorded_sampler(self) -> SamplerConfig:
        """The sampler of the prior file: the exact default for a density; for a refiner, as published, the chain of
        training with twice its steps. What is asked for is put in.
        """
        longer = replace(self.chain, steps=2 * self.chain.steps)
        with within("sampler"):
            return self.sampler.of(SamplerConfig() if self.regime == "calibrated" else longer)


def paper_preset() -> FitConfig:
    """The published fit (NVAE on CIFAR-10, Gaussian decoder; references in README): a short-run refiner.

    Adam(0.99, 0.999) at 1e-4 with weight decay 3e-5, batch 32, 5,000 iterations; K = 20 steps in training and 40 in
    sampling with s = 2e-5 in the units of Eq. 12 (the published code's 4e-5 is 2s), on the published ε-target. What is
    not as published: the heads' last layer starts at zero, some images are held out to measure the gain (no result
    depends on it), and divergence is noticed earlier than at |mean f| > 1e9.
    """
    return FitConfig(
        objective="mle",
        iterations=5_000,
        batch_size=32,
        learning_rate=1e-4,
        warmup=0,
        decay=False,
        optimizer="adam",
        betas=(0.99, 0.999),
        weight_decay=3e-5,
        ema=0.0,
        energy=EnergyConfig(channels=64, hidden=200, joint=0, activation="leaky_relu", standardize=False),
        chain=SamplerConfig(proposals=1, kernel="langevin", steps=20, step_size=2e-5),
        penalty=0.0,
        target="published",
        regime="refiner",
    )


PRESETS = {"default": FitConfig, "paper": paper_preset}
