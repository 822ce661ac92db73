"""What training needs of the rest of the world, the order in which it sees the images, and how it goes on after a fall.

Randomness of iteration t comes from (seed, t) alone, so a resume state holds no generators, and a resumed run repeats
the very numbers of an uninterrupted one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.errors import DivergenceError
from ebm_prior.interfaces import Callback, Recorder
from ebm_prior.training.resume import resume


class Training(ABC):
    """A training under way, which can be killed, resumed, and rolled back: whatever changes is in `state`."""

    iteration = 0
    rate = 1.0  # factor on every learning rate; falls by half at a roll-back
    rollbacks = 0

    @property
    @abstractmethod
    def iterations(self) -> int:
        """How many there are to be."""

    @property
    @abstractmethod
    def every(self) -> int:
        """Iterations between evaluations, after which the state is good."""

    @abstractmethod
    def step(self) -> dict[str, Any]:
        """One gradient step, which adds 1 to `iteration`; numbers to show. Raises DivergenceError."""

    @abstractmethod
    def evaluate(self, shown: Mapping[str, Any]) -> dict[str, Any]:
        """Metrics of the state reached, `shown` among them. Raises DivergenceError."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """A copy of everything that changes: tensors and plain values, with "iteration", "rate", "rollbacks"."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""

    @abstractmethod
    def given_up(self, reason: DivergenceError) -> DivergenceError:
        """What to raise at the second divergence, with advice; what changes is as in the last good state."""

    def finished(self) -> bool:
        """Whether to stop."""
        return self.iteration >= self.iterations

    @abstractmethod
    def evaluated(self) -> None:
        """After the metrics of an evaluation have been recorded."""

    def run(self, recorder: Recorder | None, on_step: Callback | None, processes: Processes = ALONE) -> None:
        """Step until `finished`; state and metrics `every` so often. Goes on from the recorder's last state.

        At a DivergenceError training returns to the last good state at half the rate; the second one is raised, as
        `given_up` has it. `on_step` gets "iterations" beside what a step and an evaluation show.
        """
        saved = processes.of_first(lambda: recorder.load_state() if recorder else None)
        if saved is not None:
            resume(self, saved)
        good = self.state()
        while not self.finished():
            try:
                shown = self.step()
                if self.iteration % self.every == 0 or self.iteration == self.iterations:
                    shown = self.evaluate(shown)
                    good = self.state()
                    if recorder:
                        recorder.log(shown)
                    self.evaluated()  # before the state, which once written is not evaluated again
                    if recorder:
                        recorder.save_state(good)
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
            if on_step:
                on_step({"iterations": self.iterations, **shown})
