"""The training loop shared by pretraining, fitting and joint training: evaluation, resume, roll-back after divergence.

Randomness of iteration t comes from (seed, t) alone, so a resume state holds no generators, and a resumed run repeats
the very numbers of an uninterrupted one.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.errors import DivergenceError
from ebm_prior.interfaces import SILENT, Callback, Progress, Recorder
from ebm_prior.training.resume import resume


class Training(ABC):
    """A training under way, which can be killed, resumed, and rolled back: whatever changes is in its state.

    A training sets `network` (what learns), `average` (the moving average of its weights) and `optimizer`.
    """

    learns: ClassVar[str]  # the name of the network's weights in the state
    network: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(
        self, progress: Progress = SILENT, on_evaluate: Callback | None = None, processes: Processes = ALONE
    ) -> None:
        """`on_evaluate` gets "iteration" and the `product` of every evaluation. The `processes` share one state."""
        self.progress, self.on_evaluate, self.processes = progress, on_evaluate, processes
        self.iteration = 0
        self.rate = 1.0  # factor on every learning rate; halved by a roll-back
        self.rollbacks = 0

    @property
    @abstractmethod
    def iterations(self) -> int:
        """The number of iterations after which training ends."""

    @property
    @abstractmethod
    def every(self) -> int:
        """The number of iterations from one evaluation to the next. A state that has been evaluated is good."""

    @abstractmethod
    def step(self) -> dict[str, Any]:
        """Take one gradient step, which adds 1 to `iteration`; returns numbers to show. Raises DivergenceError."""

    @abstractmethod
    def evaluate(self, shown: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics of the state reached, `shown` among them. Raises DivergenceError."""

    @abstractmethod
    def product(self) -> dict[str, Any]:
        """What `on_evaluate` gets beside the iteration: the current prior or backbone."""

    @abstractmethod
    def given_up(self, reason: DivergenceError) -> DivergenceError:
        """The error of a second divergence, with advice and the result to keep. The last good state is restored."""

    def finished(self) -> bool:
        """Whether training ends here."""
        return self.iteration >= self.iterations

    def state(self) -> dict[str, Any]:
        """A copy of everything that changes: tensors and plain values."""
        return copy.deepcopy(
            {
                "iteration": self.iteration,
                "rate": self.rate,
                "rollbacks": self.rollbacks,
                self.learns: self.network.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                **self.own_state(),
            }
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; `state` itself is left as it is."""
        state = copy.deepcopy(dict(state))
        self.iteration, self.rate, self.rollbacks = state["iteration"], state["rate"], state["rollbacks"]
        self.network.load_state_dict(state[self.learns])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.restore_own(state)

    def translated(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A saved state with the names of this version; an earlier one may have had others."""
        return state

    def own_state(self) -> dict[str, Any]:
        """What changes in this kind of training beside weights, optimizer and counters."""
        return {}

    def restore_own(self, state: Mapping[str, Any]) -> None:  # noqa: B027 (some have nothing)
        """Take over what `own_state` returned, from the whole state."""

    def run(self, recorder: Recorder | None) -> None:
        """Step until `finished`, from the recorder's last state on. Every evaluation is recorded, and the state then.

        At a DivergenceError training returns to the last good state at half the rate; the second one ends it with the
        error of `given_up`. The `progress` sees "iterations" and the numbers of each step and evaluation.
        """
        saved = self.processes.of_first(lambda: recorder.load_state() if recorder else None)
        if saved is not None:
            resume(self, saved)
        good = self.state()
        while not self.finished():
            try:
                shown = self.step()
                if self.iteration % self.every == 0 or self.iteration == self.iterations:
                    shown = self.evaluate(shown)
                    good = self.state()
                    self._record(recorder, shown, good)
            except DivergenceError as reason:
                if self.rollbacks:
                    self.restore(good)
                    raise self.given_up(reason) from reason
                self.restore(good | {"rate": self.rate * 0.5, "rollbacks": self.rollbacks + 1})
                good = self.state()
                if recorder:
                    recorder.save_state(good)
                    recorder.log({"iteration": self.iteration, "rolled_back": str(reason), "rate": self.rate})
                continue
            if remark := shown.pop("remark", None):
                self.progress.remark(remark)
            self.progress.step({"iterations": self.iterations, **shown})

    def _record(self, recorder: Recorder | None, shown: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        if recorder:
            recorder.log(shown)
        if self.on_evaluate:  # before the state, which once written is not evaluated again
            self.on_evaluate({"iteration": self.iteration, **self.product()})
        if recorder:
            recorder.save_state(state)
