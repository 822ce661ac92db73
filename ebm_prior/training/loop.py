"""The training loop shared by pretraining, fitting and joint training: evaluation, resume, roll-back after divergence.

Randomness of iteration t comes from (seed, t) alone, so a resume state holds no generators, and a resumed run repeats
the very numbers of an uninterrupted one.
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

STATE_SECONDS = 60.0  # between two states that are saved by the clock, at least
STATE_SHARE = 0.05  # of the time, at most, in which such states are written
NOTE_SECONDS = 5.0  # between two lines of numbers for somebody who watches


class Training(ABC):
    """A training under way, which can be killed, resumed, and rolled back: whatever changes is in its state.

    A training sets `network` (what learns), `average` (the moving average of its weights) and `optimizer`.
    """

    title: ClassVar[str]  # the name of the work, for whoever watches
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

        Between evaluations the state is saved by the clock, together with the last good one, to which a roll-back
        returns: so it replaces nothing, and a resume from it repeats no step. At a DivergenceError training returns to
        the last good state at half the rate; the second one ends it with the error of `given_up`. The `progress` sees
        "iterations" and the numbers of each step and evaluation. A wish to stop is granted at the end of a step, whose
        state is saved: raises Stopped.
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
        """Go on from the recorder's last state; returns the last good one."""
        saved = self.processes.of_first(lambda: recorder.load_state() if recorder else None)
        good: dict[str, Any] | None = None
        if saved is not None:
            good = saved.pop("good", None)  # beside a state that was saved by the clock: where a roll-back returns to
            if good is not None:
                fresh = self.state()
                resume(self, good)
                self.restore(fresh)
            resume(self, saved)
        return good or self.state()

    def _rolled_back(self, reason: DivergenceError, good: dict[str, Any], recorder: Recorder | None) -> dict[str, Any]:
        """Return to the last good state at half the rate, which is then the good one. Raises the second time."""
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
        """The signal by which any of the processes was asked to stop: all of them stop after the same step."""
        if self.processes.count == 1:
            return wish.signal
        wishes = self.processes.map(lambda _: wish.signal, range(self.processes.count))
        return next((signal for signal in wishes if signal is not None), None)

    def _record(self, recorder: Recorder | None, shown: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        if recorder:
            recorder.log(shown)
        if self.on_evaluate:  # before the state, which once written is not evaluated again
            self.on_evaluate({"iteration": self.iteration, **self.product()})
        if recorder:
            recorder.save_state(state)


class Clock:
    """Saves and notes by the clock, between evaluations, what would be lost if the process were killed."""

    def __init__(self, recorder: Recorder | None, state: Callable[[], Mapping[str, Any]]) -> None:
        """`state`: the state at the time, from which training can go on."""
        self._recorder, self._state = recorder, state
        self._began = self._saved = self._noted = time.monotonic()
        self._pause = STATE_SECONDS

    def tick(self, shown: Mapping[str, Any], *, evaluated: bool) -> None:
        """A step is done, with these numbers to show. `evaluated`: it has been recorded already."""
        now = time.monotonic()
        if evaluated:
            self._saved = now
        elif now - self._saved >= self._pause:
            self.save()
        if self._recorder and not evaluated and now - self._noted >= NOTE_SECONDS:
            self._recorder.note({**shown, "seconds": round(now - self._began, 1)})
            self._noted = now

    def save(self) -> bool:
        """Save the state; whether there is one that can be saved. Large ones are saved less often."""
        if self._recorder is None:
            return False
        began = time.monotonic()
        try:
            state = self._state()
        except DivergenceError:  # which the next evaluation finds, whenever the clock has looked
            return False
        self._recorder.save_state(state)
        self._saved = time.monotonic()
        self._pause = max(STATE_SECONDS, (self._saved - began) / STATE_SHARE)
        return True
