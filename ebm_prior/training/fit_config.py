"""Settings of a fit: the default ones and the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ebm_prior.model.energy import MOST_GROUPS, EnergyConfig
from ebm_prior.model.prior import Regime, Target
from ebm_prior.model.samplers import ALL_GROUPS, MOST_STEPS, SamplerChanges, SamplerConfig
from ebm_prior.settings import (
    later_setting,
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

# Groups differ in their best step size by a factor of ten, so each chain finds that of its group.
GROUPWISE_SAMPLER = SamplerConfig(by_group=True, proposals=8, steps=60, step_size=0.5, adapt_steps=20)


@dataclass(frozen=True)
class FitConfig:
    """Settings of a fit. The defaults are the best that were measured (ebm_prior/training/README.md).

    Numbers count gradient steps, images, or draws; gains are in nats. Raises ConfigurationError for a value out of its
    range or of the wrong type. `ebm_prior.training.fit_config.paper_preset()` gives the published settings.

    >>> config = FitConfig(iterations=500, seed=1)
    >>> config.objective, config.energy.channels
    ('nce', 48)
    """

    objective: Literal["nce", "mle"] = setting(
        "nce", "Training objective of the heads: noise-contrastive (nce) or maximum likelihood (mle)"
    )
    iterations: int = setting(2_400, "Number of gradient steps")
    ratios: Literal["auto", "one", "staged", "groupwise"] = setting(
        "auto",
        "Density ratios that nce learns: one, staged, groupwise (one for each latent group, given those above it), or "
        "auto, which turns to stages if one saturates",
    )
    stage: StageConfig = field(default_factory=StageConfig)
    batch_size: int = setting(256, "Posterior draws per gradient step, matched by as many prior draws")
    parts: int = setting(
        1, "Parts of a batch, computed one at a time with noise of their own; more parts need less memory"
    )
    learning_rate: float = setting(4e-3, "Peak learning rate")
    warmup: int = setting(50, "Iterations over which the learning rate rises linearly to its peak")
    decay: bool = setting(True, "Let the learning rate fall to 0 along a cosine")
    optimizer: Literal["adamw", "adam"] = setting(
        "adamw", "Optimizer: AdamW with decoupled weight decay, or Adam with L2 weight decay"
    )
    betas: tuple[float, float] = setting((0.9, 0.999), "Decay rates of the optimizer's two moment estimates")
    weight_decay: float = setting(1e-2, "Weight decay of the optimizer")
    ema: float = setting(0.99, "Decay of the moving average of the weights; 0 turns averaging off")
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    chains: Literal["fresh", "persistent"] = setting(
        "fresh", "Start of the chains: new draws, or the last ends of persistent ones (only with --objective mle)"
    )
    chain: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(proposals=1, kernel="langevin", steps=20, step_size=0.01)
    )
    refresh: float = setting(
        0.05, "Share of the persistent chains that start again at each step (only with --objective mle)"
    )
    penalty: float = setting(
        1e-4, "Weight of the penalty E[f_q² + f_p²] on the energy's size (only with --objective mle)"
    )
    refuse: bool = later_setting(
        True,
        "Let a refiner's chains that leave the typical set of posterior latents begin anew (only with --regime "
        "refiner)",
    )
    noise_weight: float = later_setting(
        1.0, "Weight of the prior draws against the posterior draws in the loss (only with --objective nce)"
    )
    choose_steps: bool = later_setting(
        False,
        "Choose the number of a refiner's steps on held-out images, at the end: those of training, or 2 or 4 times as "
        "many (only with --regime refiner)",
    )
    refine: int | None = later_setting(
        None,
        "Iterations of a refiner that is fitted afterwards and draws the samples if they are nearer to held-out "
        "images, while scores and log Z stay those of the calibrated f; 0: no refiner",
    )
    gradient_clip: float = later_setting(
        0.0, "Largest norm of a gradient; a larger one is scaled down to it; 0: no limit"
    )
    sampler: SamplerChanges = field(default_factory=SamplerChanges)  # changes of `recorded_sampler`
    target: Target = setting(
        "exact", "Density that chains in ε-space sample: exact (Appendix A.3), or as published, to replicate only"
    )
    regime: Regime = setting(
        "calibrated", "Meaning of f: a calibrated log density ratio, or a refiner that only guides short chains"
    )
    held_out: int = setting(
        5_000, "Images held out to measure the gain on their latents, at most a tenth of all images"
    )
    ess_floor: float = setting(0.05, "Lowest effective sample size, as a share of the draws, that tempering accepts")
    evaluate_every: int = setting(
        100, "Iterations between two measurements of the held-out gain, each with a saved state"
    )
    patience: int = setting(10, "Evaluations without a better held-out gain after which the fit stops")
    seed: int = setting(0, "Seed of all random numbers")

    def __post_init__(self) -> None:
        require_kinds(self)
        require_positive(self, "iterations", "batch_size", "learning_rate", "held_out", "evaluate_every", "patience")
        require_positive(self, "noise_weight")
        most, draws = min(self.batch_size, self.stage.particles), self.stage.particles
        parts = f"must divide the batch of {self.batch_size} and be at most the {draws} draws of stages"
        require(self, "parts", 1 <= self.parts <= most and self.batch_size % self.parts == 0, parts)
        require_shares(self, "ema", "ess_floor", "betas", open=True)
        require_not_negative(self, "warmup", "weight_decay", "penalty", "gradient_clip")
        require_shares(self, "refresh")
        with within("chain"):
            single = "must be 1 for persistent chains, which start from their last ends"
            require(self.chain, "proposals", self.chains == "fresh" or self.chain.proposals == 1, single)
            require(self.chain, "by_group", not self.chain.by_group, ALL_GROUPS)
        suited = self.objective == "nce" and self.regime == "calibrated"
        unsuited = "must be one or auto unless the objective is nce and the regime calibrated"
        require(self, "ratios", self.ratios in ("one", "auto") or suited, unsuited)
        with within("energy"):
            alone = "must be off: ratios groupwise turns it on"
            require(self.energy, "groupwise", not self.energy.groupwise, alone)
        refiner = self.regime == "refiner"
        chosen = "must be off unless the regime is refiner, whose samples depend on the number of steps"
        require(self, "choose_steps", refiner or not self.choose_steps, chosen)
        require(self, "refine", (self.refine or 0) >= 0, "must not be negative")
        second = "must be 0 with regime refiner: it adds a refiner to a calibrated prior"
        require(self, "refine", not (refiner and self.refine), second)
        require_seed(self)
        _ = self.recorded_sampler  # raises ConfigurationError where its settings do not fit together
        exact = "must be exact with regime calibrated (published is not the density that f then describes)"
        require(self, "target", self.target == "exact" or self.regime == "refiner", exact)

    @property
    def heads(self) -> EnergyConfig:
        """The settings of the heads that are fitted: `energy`, with what groupwise ratios require."""
        groupwise = self.ratios == "groupwise"
        return replace(self.energy, groupwise=groupwise, local=groupwise)

    @property
    def may_stage(self) -> bool:
        """Whether stages (`staging`) take over where one ratio saturates."""
        return self.objective == "nce" and self.ratios == "auto" and self.regime == "calibrated"

    def staging(self, after: int) -> FitConfig:
        """The settings with which a fit continues in stages, after one ratio has saturated at iteration `after`.

        The negatives of stages move at each iteration, which takes most of its time. So the batch is halved, and only a
        third of the iterations follow.
        """
        batch = max(1, self.batch_size // 2 // self.parts) * self.parts
        iterations = min(self.iterations, after + max(1, self.iterations // 3))
        return replace(self, ratios="staged", batch_size=batch, iterations=iterations)

    @property
    def recorded_sampler(self) -> SamplerConfig:
        """The sampler that the prior file records, with the changes of `sampler`.

        For a calibrated prior it starts from the exact default, with groupwise ratios group by group; for a refiner, as
        published, from the training chain with twice its steps.
        """
        start = GROUPWISE_SAMPLER if self.ratios == "groupwise" else SamplerConfig()
        if self.regime != "calibrated":
            start = replace(self.chain, steps=min(MOST_STEPS, 2 * self.chain.steps))
        with within("sampler"):
            return self.sampler.of(start)


def paper_preset() -> FitConfig:
    """The fit as published by Cui, Wu and Han (CVPR 2023; NVAE on CIFAR-10, Gaussian decoder): a short-run refiner.

    Adam(0.99, 0.999) at 1e-4 with weight decay 3e-5, batch 32, 5,000 iterations; K = 20 steps in training and 40 in
    sampling with s = 2e-5 in the units of Eq. 12 (the published code's 4e-5 is 2s), on the published ε-target.
    There are three differences: the heads' last layer starts at zero, some images are held out to measure the gain (no
    result depends on it), and divergence is noticed earlier than at |mean f| > 1e9.
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
        energy=EnergyConfig(
            channels=64, hidden=200, joint=0, activation="leaky_relu", standardize=False, own_heads=MOST_GROUPS
        ),
        chain=SamplerConfig(proposals=1, kernel="langevin", steps=20, step_size=2e-5),
        penalty=0.0,
        refuse=False,
        target="published",
        regime="refiner",
    )


def refiner_preset() -> FitConfig:
    """A refiner for samples, by short chains on the exact target (training/README.md says why).

    Steps of s = .01 that move, a rate twenty times the published one that falls along a cosine, a moving average of the
    weights, and no chains outside the typical set.
    """
    return FitConfig(
        objective="mle",
        iterations=900,
        batch_size=32,
        learning_rate=2e-3,
        gradient_clip=1.0,
        choose_steps=True,
        regime="refiner",
    )


def refining(config: FitConfig, record: Mapping[str, Any]) -> FitConfig | None:
    """The settings of the refiner that follows a calibrated fit with this record, or None where none follows.

    It is the preset with the heads, the parts, the seed and the held-out images of the fit. Its iterations are
    `config.refine`. Where that is None, a refiner follows a ratio that has saturated. Its chains then take as many
    steps through the network as if the draws of the stages had moved in all their iterations, so that the second fit
    lasts about as long as the first.
    """
    preset, iterations, saturated = refiner_preset(), config.refine, record.get("saturated")
    batch = -(-preset.batch_size // config.parts) * config.parts
    if iterations is None and saturated:
        since, stage = saturated["iteration"], config.stage
        draws = min(config.staging(since).batch_size, stage.particles)
        steps = (record["iterations"] - since) * draws * stage.moves * stage.leapfrogs
        iterations = steps // (batch * preset.chain.steps)
    if not iterations:
        return None
    return replace(
        preset,
        iterations=iterations,
        batch_size=batch,
        parts=config.parts,
        energy=config.energy,
        held_out=config.held_out,
        evaluate_every=config.evaluate_every,
        seed=config.seed,
    )


def may_follow(config: FitConfig) -> FitConfig | None:
    """The settings of the refiner that may follow a fit, with any number of iterations; None where none can follow."""
    possible = config.may_stage if config.refine is None else config.refine > 0
    return refining(replace(config, refine=config.refine or 1), {}) if possible else None


PRESETS = {"default": FitConfig, "refiner": refiner_preset, "paper": paper_preset}
