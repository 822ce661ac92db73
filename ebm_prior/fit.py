"""Second stage: train the heads of a joint energy on a frozen backbone (Eqs. 10, 17; §5.2).

Positives are fresh posterior draws of training images, negatives are draws of the prior: ancestral ones for `nce`,
Langevin chains in ε-space for `mle`. On held-out latents the loop measures the gain in nats, keeps the best moving
average, watches for divergence, and at the end tempers. A run is a function of its seed: kill it and resume.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ebm_prior.backbone import Backbone
from ebm_prior.energy import EnergyConfig, JointEnergy, values
from ebm_prior.errors import ConfigurationError, DivergenceError
from ebm_prior.objectives import Gain, gain, mle_loss, nce_loss, temper
from ebm_prior.prior import EBMPrior, Regime, Target
from ebm_prior.randomness import derived_generator, seeded
from ebm_prior.samplers import SamplerConfig, draw, norm, where
from ebm_prior.training import (
    Callback,
    Images,
    Recorder,
    batch_indices,
    require_choices,
    require_positive,
    require_seed,
    update_average,
)

PRIOR_DRAWS = 4  # held-out prior latents per posterior one: log Z is the noisier half of the gain
HELD_OUT_BYTES = 2**31  # of memory for held-out latents, on the CPU
NORM_LIMIT = 1.2  # times the posterior's ‖ε‖/√D (1 ± 1/√(2D) under p_β): chains beyond it have left where data lies
GAIN_STEP = 1e-3  # nats by which a held-out gain must be better to count as better
GAP_LIMIT = 1e4  # nats of E_q[f] − E_p[f]: an exploding energy (a real one is KL(q‖p) + KL(p‖q) of the latents)
GAIN_DROP_LIMIT = 20.0  # nats that the held-out gain may fall below its best, where tempering does not mend it


@dataclass(frozen=True)
class FitConfig:
    """Settings of the second stage. The defaults are what measured best (README: Why these defaults)."""

    objective: Literal["nce", "mle"] = field(default="nce", metadata={"help": "how the heads are trained"})
    iterations: int = field(default=2_400, metadata={"help": "gradient steps"})
    batch_size: int = field(default=256, metadata={"help": "posterior draws, and as many prior draws, per step"})
    learning_rate: float = field(default=4e-3, metadata={"help": "peak rate"})
    warmup: int = field(default=50, metadata={"help": "iterations over which the rate rises linearly"})
    decay: bool = field(default=True, metadata={"help": "let the rate fall to 0 along a cosine"})
    optimizer: Literal["adamw", "adam"] = field(default="adamw", metadata={"help": "decoupled or L2 weight decay"})
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata={"help": "moment decays of the optimizer"})
    weight_decay: float = field(default=1e-2, metadata={"help": "weight decay"})
    ema: float = field(default=0.99, metadata={"help": "decay of the weights' moving average; 0: none"})
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    chains: Literal["fresh", "persistent"] = field(default="fresh", metadata={"help": "mle: where chains start"})
    chain: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(proposals=1, kernel="langevin", steps=20, step_size=0.02)
    )
    refresh: float = field(default=0.05, metadata={"help": "mle: share of persistent chains restarted each step"})
    penalty: float = field(default=1e-3, metadata={"help": "mle: weight of E[f_q² + f_p²]"})
    sampler: SamplerConfig | None = None  # recorded with the prior; None: see `recorded_sampler`
    target: Target = field(default="exact", metadata={"help": "ε-target; published: to replicate only"})
    regime: Regime = field(default="calibrated", metadata={"help": "what f is meant to be"})
    held_out: int = field(default=5_000, metadata={"help": "images kept for held-out latents, at most a tenth"})
    ess_floor: float = field(default=0.05, metadata={"help": "tempering keeps at least this ESS / number of draws"})
    evaluate_every: int = field(default=100, metadata={"help": "iterations between held-out gains and resume states"})
    patience: int = field(default=10, metadata={"help": "stop after so many held-out gains without a better one"})
    seed: int = field(default=0, metadata={"help": "seed of everything random"})

    def __post_init__(self) -> None:
        require_positive(self, "iterations", "batch_size", "learning_rate", "held_out", "evaluate_every", "patience")
        for name, value in (("ema", self.ema), ("ess_floor", self.ess_floor), *(("betas", b) for b in self.betas)):
            if not 0 <= value < 1:
                raise ConfigurationError(f"{name} must be in [0, 1), found {value}")
        for name in ("warmup", "weight_decay", "penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name} must not be negative, found {getattr(self, name)}")
        if self.chains == "persistent" and self.chain.proposals > 1:
            raise ConfigurationError("persistent chains go on from their last step: chain proposals must be 1")
        if not 0 <= self.refresh <= 1:
            raise ConfigurationError(f"refresh must be in [0, 1], found {self.refresh}")
        require_choices(self)
        require_seed(self)
        if self.target == "published" and self.regime == "calibrated":
            raise ConfigurationError("the published target is not the density that f describes: regime must be refiner")

    @property
    def recorded_sampler(self) -> SamplerConfig:
        """The sampler of the prior file: the exact default for a density; for a refiner the chains of training."""
        return self.sampler or (SamplerConfig() if self.regime == "calibrated" else self.chain)


def paper_preset() -> FitConfig:
    """The published second stage (NVAE on CIFAR-10, Gaussian decoder; references in README): a short-run refiner.

    Adam(0.99, 0.999) at 1e-4 with weight decay 3e-5, batch 32, 5,000 iterations; K = 20 steps in training and 40 in
    sampling with s = 2e-5 in the units of Eq. 12 (the published code's 4e-5 is 2s), on the published ε-target. What is
    not as published: the heads' last layer starts at zero, some images are held out to measure the gain (no result
    depends on it), and divergence is noticed earlier than at |mean f| > 1e9.
    """
    chain = SamplerConfig(proposals=1, kernel="langevin", steps=20, step_size=2e-5)
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
        chain=chain,
        penalty=0.0,
        sampler=replace(chain, steps=40),
        target="published",
        regime="refiner",
    )


PRESETS = {"default": FitConfig, "paper": paper_preset}


class HeldOut(NamedTuple):
    """Latents that training never sees, as the heads see them: posterior draws of held-out images, and more of p_β."""

    posterior: list[Tensor]
    prior: list[Tensor]

    def gains(self, energy: JointEnergy, ess_floor: float) -> tuple[Gain, Gain]:
        """The gain of f as it stands, and tempered."""
        device = next(energy.parameters()).device
        f_q, f_p = values(energy, self.posterior, device), values(energy, self.prior, device)
        return gain(f_q, f_p), temper(f_q, f_p, ess_floor=ess_floor)


def fit(
    backbone: Backbone,
    images: Images,
    config: FitConfig | None = None,
    *,
    run: Recorder | None = None,
    on_step: Callback | None = None,
    on_evaluate: Callback | None = None,
) -> EBMPrior:
    """Train an energy-based prior for a frozen `backbone` on `images`.

    With a `run`, state and metrics are written every `evaluate_every` iterations and the run goes on from its last
    state. `on_evaluate` gets {"iteration", "prior"}: the moving average as a prior. When a loss or chain is not finite,
    chains leave the typical set, or the held-out gain collapses, training returns to the last good state at half the
    rate; the second time it raises DivergenceError, whose `prior` is the best one so far.
    """
    config = config or FitConfig()
    return _Fit(backbone, images, config).train(run, on_step, on_evaluate)


class _Fit:
    """One second stage under way: everything that changes is in `state`, so that it can be saved and rolled back."""

    def __init__(self, backbone: Backbone, images: Images, config: FitConfig) -> None:
        self.backbone, self.images, self.config = backbone, images, config
        like = next(backbone.parameters())
        self.device, self.dtype = like.device, like.dtype
        if backbone.training:
            raise ConfigurationError("expected a backbone in eval mode, found it in train mode: call .eval() first")
        dimensions = sum(math.prod(group.shape) for group in backbone.groups)
        bytes_each = dimensions * (1 + config.energy.conditional) * self.dtype.itemsize
        most = max(1, HELD_OUT_BYTES // (bytes_each * (1 + PRIOR_DRAWS)))
        with seeded(self.device, config.seed, 10):
            self.energy = JointEnergy(backbone.groups, config.energy).to(self.device, self.dtype)
        self.training, held_out = _split(len(images), replace(config, held_out=min(config.held_out, most)))
        self.held_out = self._held_out_latents(held_out)
        if config.energy.standardize:
            self.energy.standardize(self._latents(self.training[:2_000], 15))
        with torch.no_grad():
            generator = derived_generator(config.seed, 17, device=self.device)
            observed = self._observed(self.training[: config.batch_size], generator)
            typical = norm(backbone.infer(observed, generator=generator).eps).mean()
        self.norm_limit = NORM_LIMIT * max(1.0, float(typical)) + 4 / math.sqrt(2 * dimensions * config.batch_size)
        self.average = copy.deepcopy(self.energy).eval().requires_grad_(False)
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        self.optimizer = kind(
            self.energy.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self.iteration = 0
        self.rate = 1.0  # falls by half at a roll-back
        self.rollbacks = 0
        self.chains: list[Tensor] = []
        self.best: dict[str, Any] = {
            "gain": -math.inf,
            "iteration": 0,
            "energy": copy.deepcopy(self.average.state_dict()),
        }

    # -- the loop

    def train(self, run: Recorder | None, on_step: Callback | None, on_evaluate: Callback | None) -> EBMPrior:
        config = self.config
        state = run.load_state() if run else None
        if state is not None:
            self._restore(state)
        good = self._state()
        while self.iteration < config.iterations and not self._out_of_patience():
            try:
                shown = self._step()
                if self.iteration % config.evaluate_every == 0 or self.iteration == config.iterations:
                    metrics = self._evaluate(shown)
                    good = self._state()
                    if on_evaluate:
                        on_evaluate({"iteration": self.iteration, "prior": self._prior()})
                    if run:
                        run.log(metrics)
                        run.save_state(good)
                    shown |= metrics
                if on_step:
                    on_step({"iterations": config.iterations, **shown})
            except DivergenceError as reason:
                if self.rollbacks:
                    raise DivergenceError(
                        f"training diverged again after a roll-back at half the rate: {reason}. Kept: the prior of "
                        f"iteration {self.best['iteration']}. Lower the learning rate (now {config.learning_rate:g}) "
                        "or the step size",
                        prior=self._finish(),
                    ) from reason
                rate, rollbacks = self.rate * 0.5, self.rollbacks + 1
                self._restore(good)
                self.rate, self.rollbacks = rate, rollbacks
                good = self._state()
                if run:
                    run.save_state(good)
                    run.log({"iteration": self.iteration, "rolled_back": str(reason), "rate": rate})
        return self._finish()

    def _step(self) -> dict[str, Any]:
        config, t = self.config, self.iteration
        generator = derived_generator(config.seed, 11, t, device=self.device)
        indices = self.training[batch_indices(len(self.training), config.batch_size, t, config.seed)]
        positive = self._posterior(indices, generator)
        negative, chain_norm = self._negatives(generator)
        rate = self.rate * config.learning_rate * min(1.0, (t + 1) / max(1, config.warmup))
        if config.decay:
            rate *= 0.5 * (1 + math.cos(math.pi * t / config.iterations))
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        self.energy.train()
        with seeded(self.device, config.seed, 12, t), torch.enable_grad():  # dropout draws from the global generator
            f_q, f_p = self.energy([torch.cat(pair) for pair in zip(positive, negative, strict=True)]).chunk(2)
            loss = nce_loss(f_q, f_p) if config.objective == "nce" else mle_loss(f_q, f_p, penalty=config.penalty)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = torch.nn.utils.get_total_norm([p.grad for p in self.energy.parameters() if p.grad is not None])
        if not bool(torch.isfinite(loss) & torch.isfinite(gradient)):
            raise DivergenceError(f"the loss or its gradient is not finite at iteration {t}")
        if config.objective == "mle" and chain_norm > self.norm_limit:
            raise DivergenceError(
                f"chains left the typical set at iteration {t}: ‖ε‖/√D {chain_norm:.3g}, limit {self.norm_limit:.3g}"
            )
        self.optimizer.step()
        self.iteration += 1
        update_average(self.average, self.energy, config.ema, t)
        gap = float((f_q.mean() - f_p.mean()).detach())
        if abs(gap) > GAP_LIMIT:
            raise DivergenceError(f"the energy's gap between posterior and prior latents is {gap:.3g} nats")
        return {"iteration": self.iteration, "loss": float(loss.detach()), "f_gap": gap, "chain_norm": chain_norm}

    def _evaluate(self, shown: Mapping[str, Any]) -> dict[str, Any]:
        plain, tempered = self.held_out.gains(self.average, self.config.ess_floor)
        calibrated = self.config.regime == "calibrated"
        if not math.isfinite(plain.nats) or (
            calibrated and plain.nats < self.best["gain"] - GAIN_DROP_LIMIT and tempered.nats < 0.5 * self.best["gain"]
        ):
            raise DivergenceError(f"the held-out gain fell to {plain.nats:.3g} nats at iteration {self.iteration}")
        if not calibrated or tempered.nats > self.best["gain"] + GAIN_STEP:
            self.best = {
                "gain": tempered.nats,
                "iteration": self.iteration,
                "energy": copy.deepcopy(self.average.state_dict()),
            }
        return {
            **shown,
            "gain": plain.nats,
            "ess_fraction": plain.ess_fraction,
            "tempered_gain": tempered.nats,
            "tempered_ess_fraction": tempered.ess_fraction,
            "tau": tempered.tau,
        }

    def _out_of_patience(self) -> bool:
        stale = self.iteration - self.best["iteration"]
        return self.config.regime == "calibrated" and stale >= self.config.patience * self.config.evaluate_every

    def _finish(self) -> EBMPrior:
        """The best prior so far, tempered on the held-out latents."""
        self.average.load_state_dict(self.best["energy"])
        plain, tempered = self.held_out.gains(self.average, self.config.ess_floor)
        calibrated = self.config.regime == "calibrated"
        record = {
            "config": asdict(self.config),
            "data": {
                "name": self.images.name,
                "training": len(self.training),
                "held_out": len(self.images) - len(self.training),
            },
            "iterations": self.iteration,
            "best_iteration": self.best["iteration"],
            "rollbacks": self.rollbacks,
            "held_out": {"plain": plain._asdict(), "tempered": tempered._asdict()},
        }
        return self._prior(tau=tempered.tau if calibrated else 1.0, record=record)

    # -- its parts

    def _observed(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        images = self.images.batch(indices).to(self.device, self.dtype)
        return self.backbone.observe(images, generator=generator)

    def _posterior(self, indices: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Posterior draws of images, as the heads see them; fresh each time, since heads overfit to cached ones."""
        with torch.no_grad():
            observed = self._observed(indices, generator)
            if not self.config.energy.conditional:  # where the encoder can, no top-down pass
                return self.backbone.draw_posterior(observed, generator=generator)
            posterior = self.backbone.infer(observed, generator=generator)
            return self.energy.inputs(posterior.z, posterior.eps)

    def _negatives(self, generator: torch.Generator) -> tuple[list[Tensor], float]:
        """Draws of p_β (nce) or of the current p_α by Langevin (mle), and the mean ‖ε‖/√D of the chains."""
        config = self.config

        def propose() -> list[Tensor]:
            return self.backbone.standard_normal(config.batch_size, generator=generator)

        if config.objective == "nce":
            eps = propose()
        else:
            current = EBMPrior(self.backbone, copy.deepcopy(self.energy), regime=config.regime, target=config.target)
            initial = self._initial_chains(propose(), generator) if config.chains == "persistent" else None
            eps = draw(current.potential, propose if initial is None else lambda: initial, config.chain, generator).eps
            self.chains = eps if initial is not None else []
        return self._seen(eps), float(norm(eps).mean())

    def _seen(self, eps: list[Tensor]) -> list[Tensor]:
        """T_β(ε) as the heads see it."""
        with torch.no_grad():
            return self.energy.inputs(self.backbone.reparameterize(eps), eps)

    def _initial_chains(self, fresh: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        """The chains of the last step, a share of them restarted."""
        if not self.chains:
            return fresh
        restart = torch.rand(len(fresh[0]), generator=generator, device=self.device) < self.config.refresh
        return where(restart, fresh, self.chains)

    def _held_out_latents(self, indices: Tensor) -> HeldOut:
        prior = []
        for number, part in enumerate(torch.split(indices, self.config.batch_size)):
            generator = derived_generator(self.config.seed, 16, number, device=self.device)
            for _ in range(PRIOR_DRAWS):
                eps = self.backbone.standard_normal(len(part), generator=generator)
                prior.append([seen.cpu() for seen in self._seen(eps)])
        return HeldOut(self._latents(indices, 13), [torch.cat(group) for group in zip(*prior, strict=True)])

    def _latents(self, indices: Tensor, stream: int) -> list[Tensor]:
        """A posterior draw of each image, as the heads see it, on the CPU; in batches, as the memory allows."""
        parts = []
        for number, part in enumerate(torch.split(indices, self.config.batch_size)):
            generator = derived_generator(self.config.seed, stream, number, device=self.device)
            parts.append([z.cpu() for z in self._posterior(part, generator)])
        return [torch.cat(group) for group in zip(*parts, strict=True)]

    def _prior(self, *, tau: float = 1.0, record: Mapping[str, Any] | None = None) -> EBMPrior:
        config = self.config
        return EBMPrior(
            self.backbone,
            copy.deepcopy(self.average),
            tau=tau,
            regime=config.regime,
            target=config.target,
            sampler=config.recorded_sampler,
            record=record,
        )

    def _state(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "iteration": self.iteration,
                "rate": self.rate,
                "rollbacks": self.rollbacks,
                "energy": self.energy.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "chains": self.chains,
                "best": self.best,
            }
        )

    def _restore(self, state: Mapping[str, Any]) -> None:
        state = copy.deepcopy(dict(state))
        self.iteration, self.rate, self.rollbacks = state["iteration"], state["rate"], state["rollbacks"]
        self.energy.load_state_dict(state["energy"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.chains, self.best = [c.to(self.device) for c in state["chains"]], state["best"]


def _split(n: int, config: FitConfig) -> tuple[Tensor, Tensor]:
    """Indices of training and held-out images, fixed by the seed."""
    held_out = min(config.held_out, n // 10)
    if held_out < 1:
        raise ConfigurationError(f"expected at least 10 images to fit a prior, found {n}")
    order = torch.randperm(n, generator=derived_generator(config.seed, 14))
    return order[held_out:], order[:held_out]
