"""What a fit asks of a course: negatives, a loss, and what counts as better. The courses are in `courses`.

The loop (`fit`) steps and evaluates; it knows no course by name. A course may hand over to another one by returning it.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_prior.interfaces import Progress
from ebm_prior.model.energy import JointEnergy
from ebm_prior.model.samplers import SamplerConfig, norm
from ebm_prior.training.fit_config import FitConfig
from ebm_prior.training.latents import Draws, HeldOut
from ebm_prior.training.objectives import Gain, nce_loss


@dataclass
class Workbench:
    """What all courses of a fit work with."""

    energy: JointEnergy  # the heads that learn
    average: JointEnergy  # the moving average of their weights, which is measured and kept
    draws: Draws
    training: Tensor  # (N,) int64: the images to learn from
    held_out: HeldOut
    progress: Progress
    untrained: dict[str, Any] = field(init=False)  # the weights of f = 0

    def __post_init__(self) -> None:
        self.untrained = copy.deepcopy(self.average.state_dict())

    @property
    def device(self) -> torch.device:
        """The device of backbone and heads."""
        return self.draws.like.device

    def load(self, weights: Mapping[str, Any]) -> None:
        """Let the heads and their average have these weights."""
        self.energy.load_state_dict(weights)
        self.average.load_state_dict(weights)

    def squash(self, bound: float) -> None:
        """Let the heads and their average see inputs within ± `bound`; 0: as they are."""
        self.energy.squash(bound)
        self.average.squash(bound)


class Pairs(NamedTuple):
    """Latents of a part of the batch, as the heads see them, lists of (B, *shape)."""

    positive: list[Tensor]
    negative: list[Tensor]
    norm: Tensor  # mean ‖ε‖/√D of the negatives; 1 where it says nothing
    kept: Any = None  # of drawing the negatives, for `Course.after`


class Best(NamedTuple):
    """The best f so far."""

    gain: float  # nats, held-out; −∞ as long as nothing has been learned
    iteration: int
    energy: Mapping[str, Any]  # its weights


class Finished(NamedTuple):
    """The best f of a course, whose weights the average has then: gains, ceiling, and what its record says."""

    plain: Gain  # of f
    tempered: Gain  # of τ f
    ceiling: float = math.inf  # nats, above which f is clipped
    narrow: bool = False  # few held-out draws hold all the weight
    clipped: Mapping[str, float] = {}  # what the clipping adds to gain and log Z
    stages: list[dict[str, float]] | None = None


class Course(ABC):
    """A way to train the heads, and to say how good they are."""

    norm_limit = math.inf  # ‖ε‖/√D above which chains have left the typical set
    saturated: dict[str, Any] | None = None  # iteration and ESS at which one ratio gave up, before this course

    def __init__(self, bench: Workbench, config: FitConfig, iteration: int = 0) -> None:
        """Begin at `iteration`, from where the heads of the `bench` are. `config`: the settings of this course."""
        self.bench, self.config = bench, config
        self.best = Best(-math.inf, iteration, bench.untrained)

    @property
    def since(self) -> int:
        """Iteration at which the current learning-rate schedule started: 0, or where stages took over."""
        return int(self.saturated["iteration"]) if self.saturated else 0

    @property
    def rate(self) -> float:
        """Factor on the learning rate: stages that were rejected go on more slowly."""
        return 1.0

    @property
    def sampler(self) -> SamplerConfig:
        """The sampler that the prior is recorded with."""
        return self.config.recorded_sampler

    def pairs(self, indices: Tensor, part: int, generator: torch.Generator) -> Pairs:
        """Posterior latents of the images at `indices`, part `part` of the batch, and negatives beside them."""
        positive = self.bench.draws.posterior(indices, generator)
        eps, kept = self.negatives(len(indices), part, generator)
        return Pairs(positive, self.bench.draws.of_prior(eps), norm(eps).mean(), kept)

    @abstractmethod
    def negatives(self, n: int, part: int, generator: torch.Generator) -> tuple[list[Tensor], Any]:
        """At most n negatives in ε-space for part `part` of the batch, and what `after` needs to know of them."""

    def logits(self, inputs: list[Tensor]) -> Tensor:
        """The logits that the loss compares, from latents as the heads see them: f, (B,), or f relative to another."""
        return self.bench.energy(inputs)  # type: ignore[no-any-return]

    def loss(self, f_q: Tensor, f_p: Tensor) -> Tensor:
        """The loss of logits of positives and of negatives."""
        return nce_loss(f_q, f_p)

    def after(self, kept: Sequence[Any], iteration: int) -> Course:
        """Take note of a step, after which there have been `iteration`; returns the course of the next one.

        `kept`: what each part's `Pairs` kept.
        """
        return self

    @abstractmethod
    def evaluate(self, iteration: int) -> tuple[dict[str, Any], Course]:
        """Held-out metrics after `iteration` steps, and the course of the next step. Raises DivergenceError."""

    @abstractmethod
    def finish(self) -> Finished:
        """Give the average the weights of the best f, and say how good it is."""

    def out_of_patience(self, iteration: int) -> bool:
        """Whether the held-out gain has not risen for `patience` evaluations. A refiner is no density, and goes on."""
        waited = iteration - self.waiting_since()
        return self.config.regime == "calibrated" and waited >= self.config.patience * self.config.evaluate_every

    def waiting_since(self) -> int:
        """The iteration of the last progress."""
        return self.best.iteration

    def state(self) -> dict[str, Any]:
        """Everything that changes beside the weights: tensors and plain values, not copied."""
        return {"chains": [], "best": self.best._asdict(), "saturated": self.saturated, "stages": None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self.best = Best(**state["best"])
