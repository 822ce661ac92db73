"""The interface between the loop of a fit (`fit`) and a course of training; the courses themselves are in `courses`.

A course provides the negatives, the loss, and the rule by which the best f is chosen. The loop takes the steps and
calls the evaluations. A course hands over to another one by returning it.
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
    """The objects that all courses of a fit share."""

    energy: JointEnergy  # the heads that learn
    average: JointEnergy  # the moving average of the weights, which is evaluated and saved
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
        """Load these weights into the heads and into their average."""
        self.energy.load_state_dict(weights)
        self.average.load_state_dict(weights)

    def squash(self, bound: float) -> None:
        """Squash the inputs of the heads and of their average to ± `bound`; 0: leave the inputs as they are."""
        self.energy.squash(bound)
        self.average.squash(bound)


class Pairs(NamedTuple):
    """Positive and negative latents of a part of the batch, in the form that the heads take: lists of (B, *shape)."""

    positive: list[Tensor]
    negative: list[Tensor]
    norm: Tensor  # mean ‖ε‖/√D of the negatives; 1 where they are no chains
    kept: Any = None  # what `Course.after` needs of the drawing of the negatives


class Best(NamedTuple):
    """The best f so far."""

    gain: float  # nats, held-out; −∞ as long as nothing has been learned
    iteration: int
    energy: Mapping[str, Any]  # its weights


class Finished(NamedTuple):
    """The result of a course: gains and ceiling of the best f, whose weights the average has by then, and a record."""

    plain: Gain  # of f
    tempered: Gain  # of τ f
    ceiling: float = math.inf  # nats, above which f is clipped
    narrow: bool = False  # whether a few held-out draws hold nearly all importance weight
    clipped: Mapping[str, float] = {}  # the change of gain and log Z by the clipping, in nats
    stages: list[dict[str, float]] | None = None
    groups: list[dict[str, Any]] | None = None  # of each group: its own gain, log Z and τ


class Course(ABC):
    """A way to train the heads, and to say how good they are."""

    norm_limit = math.inf  # ‖ε‖/√D above which chains have left the typical set
    saturated: dict[str, Any] | None = None  # iteration and ESS at which an earlier single ratio saturated

    def __init__(self, bench: Workbench, config: FitConfig, iteration: int = 0) -> None:
        """Begin at `iteration` with the present weights of the heads of `bench`, under the settings `config`."""
        self.bench, self.config = bench, config
        self.best = Best(-math.inf, iteration, bench.untrained)

    @property
    def since(self) -> int:
        """Iteration at which the current learning-rate schedule started: 0, or where stages took over."""
        return int(self.saturated["iteration"]) if self.saturated else 0

    @property
    def rate(self) -> float:
        """Factor on the learning rate, which rejected stages lower."""
        return 1.0

    @property
    def sampler(self) -> SamplerConfig:
        """The sampler that the prior is recorded with."""
        return self.config.recorded_sampler

    @abstractmethod
    def pairs(self, indices: Tensor, part: int, generator: torch.Generator) -> Pairs:
        """Posterior latents of the images at `indices`, which are part `part` of the batch, with as many negatives."""

    def logits(self, inputs: list[Tensor]) -> Tensor:
        """The logits in the loss, (B,), from the heads' inputs: f, or the difference of f and a reference."""
        return self.bench.energy(inputs)  # type: ignore[no-any-return]

    def loss(self, f_q: Tensor, f_p: Tensor) -> Tensor:
        """The loss, a scalar, from the logits of positives f_q and of negatives f_p."""
        return nce_loss(f_q, f_p, self.config.noise_weight)

    def after(self, kept: Sequence[Any], iteration: int) -> Course:
        """Called after each step, when `iteration` steps are done; returns the course that takes the next step.

        `kept`: the field `kept` of the `Pairs` of each part.
        """
        return self

    @abstractmethod
    def evaluate(self, iteration: int) -> tuple[dict[str, Any], Course]:
        """Held-out metrics after `iteration` steps, and the course that takes the next step. Raises DivergenceError."""

    @abstractmethod
    def finish(self) -> Finished:
        """Load the weights of the best f into the average, and return its gains."""

    def out_of_patience(self, iteration: int) -> bool:
        """Whether the held-out gain has not risen for `patience` evaluations. A refiner has no gain: False."""
        waited = iteration - self.waiting_since()
        return self.config.regime == "calibrated" and waited >= self.config.patience * self.config.evaluate_every

    def waiting_since(self) -> int:
        """The iteration at which the held-out gain last rose."""
        return self.best.iteration

    def state(self) -> dict[str, Any]:
        """Everything that changes apart from the weights: tensors and plain values, not copied."""
        return {"chains": [], "best": self.best._asdict(), "saturated": self.saturated, "stages": None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self.best = Best(**state["best"])


class JointDraws(Course):
    """Base of the courses whose negatives are draws of all groups together."""

    def pairs(self, indices: Tensor, part: int, generator: torch.Generator) -> Pairs:
        positive = self.bench.draws.posterior(indices, generator)
        eps, kept = self.negatives(len(indices), part, generator)
        return Pairs(positive, self.bench.draws.of_prior(eps), norm(eps).mean(), kept)

    @abstractmethod
    def negatives(self, n: int, part: int, generator: torch.Generator) -> tuple[list[Tensor], Any]:
        """At most n negatives in ε-space for part `part` of the batch, and the value that `after` gets of this part."""
