"""The training loop shared by pretraining, fitting and joint training: evaluation, resume, roll-back after divergence.

All randomness of iteration t comes from (seed, t). So a resume state holds no random generators, and a resumed run
gives exactly the numbers of an uninterrupted one.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.compute.stopping import Wish, wish_granted
from ebm_prior.errors import DivergenceError, Stopped
from ebm_prior.interfaces import SILENT, Callback, Progress, Recorder
from ebm_prior.training.resume import resume

STATE_SECONDS = 60.0  # least time between two states saved by the clock
STATE_SHARE = 0.05  # largest share of the time spent on writing such states
NOTE_SECONDS = 5.0  # time between two lines of numbers for a user who watches


class Training(ABC):
    """Base class of the trainings. All that changes is in `state()`, so that a training can resume and roll back.

    A subclass sets `network` (the module that learns), `average` (the moving average of its weights) and `optimizer`.
    """

    title: ClassVar[str]  # the name of the work, for the display of progress
    learns: ClassVar[str]  # the name of the network's weights in the state
    network: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(
        self, progress: Progress = SILENT, on_evaluate: Callback | None = None, processes: Processes = ALONE
    ) -> None:
        """`on_evaluate` gets "iteration" and the `product` at every evaluation. The `processes` keep equal states."""
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
        """The number of iterations between evaluations. A state evaluated without divergence counts as good."""

    @abstractmethod
    def step(self) -> dict[str, Any]:
        """Take one gradient step, which adds 1 to `iteration`; returns numbers to show. Raises DivergenceError."""

    @abstractmethod
    def evaluate(self, shown: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics of the present state, including the numbers `shown` of the last step. Raises DivergenceError."""

    @abstractmethod
    def product(self) -> dict[str, Any]:
        """The current prior or backbone, which `on_evaluate` gets together with the iteration."""

    @abstractmethod
    def given_up(self, reason: DivergenceError) -> DivergenceError:
        """The error of a second divergence, with advice and the result to keep. Called in the last good state."""

    def finished(self) -> bool:
        """Whether training is complete."""
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
        """Continue from a value that `state()` returned; it is not modified."""
        state = copy.deepcopy(dict(state))
        self.iteration, self.rate, self.rollbacks = state["iteration"], state["rate"], state["rollbacks"]
        self.network.load_state_dict(state[self.learns])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.restore_own(state)

    def translated(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A saved state with the key names of this version; states of earlier versions may have other names."""
        return state

    def own_state(self) -> dict[str, Any]:
        """The part of the state that is special to this kind of training: all but weights, optimizer and counters."""
        return {}

    def restore_own(self, state: Mapping[str, Any]) -> None:  # noqa: B027 (some have nothing)
        """Restore from the whole state the entries that `own_state` returned."""

    def run(self, recorder: Recorder | None) -> None:
        """Train from the recorder's last state until `finished`. Metrics and state are recorded at every evaluation.

        Between evaluations the state is also saved by the clock, together with the last good state, so that a resumed
        training can still roll back. At a DivergenceError training returns to the last good state at half the learning
        rate; at the second one it raises the error of `given_up`. The `progress` gets "iterations" and the numbers of
        each step and evaluation. When the user stops the work, the step at hand is finished, its state is saved, and
        Stopped is raised.
        """
        good = self._resumed(recorder)
        clock = Clock(recorder, lambda: self.state() | {"good": good})
        self.progress.begin(self.title, self.iterations)
        with wish_granted(recorder is not None or self.processes.count > 1) as wish:
            while not self.finished():
                try:
                    shown = self.step()
                    if evaluated := self.iteration % self.every == 0 or self.iteration == self.iterations:
                        shown = self.evaluate(shown)
                        good = self.state()
                        self._record(recorder, shown, good)
                except DivergenceError as reason:
                    good = self._rolled_back(reason, good, recorder)
                    continue
                clock.tick(shown, evaluated=evaluated)
                if remark := shown.pop("remark", None):
                    self.progress.remark(remark)
                self.progress.step({"iterations": self.iterations, **shown})
                if stopped := self._stopped_by(wish):
                    saved = evaluated or clock.save()
                    raise Stopped(stopped, self.iteration if saved else good["iteration"])

    def _resumed(self, recorder: Recorder | None) -> dict[str, Any]:
        """Continue from the recorder's last state; returns the last good state."""
        saved = self.processes.of_first(lambda: recorder.load_state() if recorder else None)
        good: dict[str, Any] | None = None
        if saved is not None:
            good = saved.pop("good", None)  # stored with states that the clock saved: the target of a roll-back
            if good is not None:
                fresh = self.state()
                resume(self, good)
                self.restore(fresh)
            resume(self, saved)
        return good or self.state()

    def _rolled_back(self, reason: DivergenceError, good: dict[str, Any], recorder: Recorder | None) -> dict[str, Any]:
        """Return to the last good state at half the learning rate. Raises the error of `given_up` the second time."""
        if self.rollbacks:
            self.restore(good)
            raise self.given_up(reason) from reason
        self.restore(good | {"rate": self.rate * 0.5, "rollbacks": self.rollbacks + 1})
        good = self.state()
        if recorder:
            recorder.save_state(good)
            recorder.log({"iteration": self.iteration, "rolled_back": str(reason), "rate": self.rate})
        return good

    def _stopped_by(self, wish: Wish) -> int | None:
        """The signal that asked any of the processes to stop, or None, so that all stop after the same step."""
        if self.processes.count == 1:
            return wish.signal
        wishes = self.processes.map(lambda _: wish.signal, range(self.processes.count))
        return next((signal for signal in wishes if signal is not None), None)

    def _record(self, recorder: Recorder | None, shown: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        if recorder:
            recorder.log(shown)
        if self.on_evaluate:  # before the state is saved: a resume from it would not evaluate again
            self.on_evaluate({"iteration": self.iteration, **self.product()})
        if recorder:
            recorder.save_state(state)


class Clock:
    """Saves the state and notes numbers at intervals of time, so that a killed process loses little work."""

    def __init__(self, recorder: Recorder | None, state: Callable[[], Mapping[str, Any]]) -> None:
        """`state`: returns the present state, from which training can be resumed."""
        self._recorder, self._state = recorder, state
        self._began = self._saved = self._noted = time.monotonic()
        self._pause = STATE_SECONDS

    def tick(self, shown: Mapping[str, Any], *, evaluated: bool) -> None:
        """Called after each step with its numbers. `evaluated`: whether this step has been recorded already."""
        now = time.monotonic()
        if evaluated:
            self._saved = now
        elif now - self._saved >= self._pause:
            self.save()
        if self._recorder and not evaluated and now - self._noted >= NOTE_SECONDS:
            self._recorder.note({**shown, "seconds": round(now - self._began, 1)})
            self._noted = now

    def save(self) -> bool:
        """Save the state, and return whether that was possible. States that take long to write are saved less often."""
        if self._recorder is None:
            return False
        began = time.monotonic()
        try:
            state = self._state()
        except DivergenceError:  # left to the next evaluation, so that results do not depend on the clock
            return False
        self._recorder.save_state(state)
        self._saved = time.monotonic()
        self._pause = max(STATE_SECONDS, (self._saved - began) / STATE_SHARE)
        return True
