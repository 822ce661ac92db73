"""Signs of life between the processes of a run, which tell slow work from a process that has ended.

A process may work for hours before it meets the others, so the time that it takes says nothing. Each process therefore
has a thread that sends a sign of life to the first process several times a second, and gets one back. A process that
is killed breaks its connection, which its neighbours see at once. A machine that is cut off only falls silent.

Where a process is lost, the others end by the ProcessError of their next exchange. One that does not come to an
exchange within `GRACE` seconds says the same in one line and ends there and then, as if it had been killed: files are
written in such a way that a kill at any moment leaves them whole.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from enum import IntEnum
from typing import cast

import torch
import torch.distributed as dist

BEAT = 0.2  # seconds between two signs of life of a process
SILENCE = 120.0  # seconds without a sign of life after which a process counts as lost
GRACE = 2.0  # seconds that a process has to end by itself when another one is lost


class State(IntEnum):
    """What a process says of itself, or what the first one finds out about it."""

    WORKING = 0
    DONE = 1  # it leaves the run, with its work done
    STOPPED = 2  # it leaves the run because a user has stopped it
    FAILED = 3  # it leaves the run because of an error
    GONE = 4  # its connection is broken, and it has said nothing
    SILENT = 5  # it has sent no sign of life for `SILENCE` seconds
    TOLD = 6  # of the first process: it says which process was lost


HAPPENED = {
    State.STOPPED: "was stopped",
    State.FAILED: "has ended because of an error, which it has printed",
    State.GONE: "has ended without a word (killed, or out of memory)",
    State.SILENT: "has given no sign of life for {SILENCE:.0f} s",
    State.TOLD: "has lost another process, which it names",
}


class Heartbeat:
    """The signs of life of process `rank` of `count`, from now until it leaves the run."""

    def __init__(self, rank: int, count: int) -> None:
        """All processes must call it together. torch.distributed must be connected."""
        self.rank, self.count = rank, count
        # The first process alone judges silence. It tells the others by ending, so they wait for longer.
        found = dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * SILENCE))
        self._group = cast(dist.ProcessGroup, found)  # the type also has a number for processes outside of a group
        self._own = State.WORKING
        self._lost: tuple[int, State] | None = None
        self._leaving, self._known = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._first if rank == 0 else self._other, daemon=True)
        self._thread.start()

    @property
    def lost(self) -> str | None:
        """What has happened to a process that is lost, as a line for the user; None as long as there is none."""
        if self._lost is None:
            return None
        rank, state = self._lost
        happened = HAPPENED[state].format(SILENCE=SILENCE)
        return (
            f"process {rank} of {self.count} {happened}, so all end; a training goes on from its last state by --resume"
        )

    @property
    def killed(self) -> bool:
        """Whether a process was lost that could say nothing."""
        return self._lost is not None and self._lost[1] in (State.GONE, State.SILENT, State.TOLD)

    @property
    def speaks(self) -> bool:
        """Whether it is this process that tells the user of the loss: the first one, or the second if that is lost."""
        told = self._lost is not None and self._lost[1] is State.TOLD
        return not told and self.rank == int(self._lost is not None and self._lost[0] == 0)

    def found(self) -> str | None:
        """`lost`, after the time that it can take to find that out when an exchange has failed."""
        self._known.wait(GRACE)
        return self.lost

    def leave(self, state: State) -> None:
        """Leave the run, and tell the others of the `state` in which that is."""
        self._own = state
        self._leaving.set()
        self._thread.join(GRACE)

    def _first(self) -> None:
        """The thread of the first process: it hears all others, and answers."""
        present = list(range(1, self.count))
        while present and self._lost is None:
            own = self._own
            heard = {rank: self._hear(rank) for rank in present}
            for rank, state in heard.items():
                if state is not State.WORKING:
                    present.remove(rank)
                if state not in (State.WORKING, State.DONE) and self._lost is None:
                    self._lost = rank, state
            for rank in present:
                self._say(State.TOLD if self._lost else own, rank)
            if own is not State.WORKING:
                return
        self._end_if_lost()

    def _other(self) -> None:
        """The thread of another process: it speaks to the first one, and hears what that answers."""
        while self._lost is None:
            self._leaving.wait(BEAT)
            own = self._own
            state = State.WORKING if self._say(own, 0) else State.GONE
            if own is not State.WORKING:
                return
            state = self._hear(0) if state is State.WORKING else state
            if state is State.DONE:
                return
            if state is not State.WORKING:
                self._lost = 0, state
        self._end_if_lost()

    def _hear(self, rank: int) -> State:
        """The state that a process sends, or GONE or SILENT."""
        said = torch.zeros(1, dtype=torch.int64)
        try:
            patience = timedelta(seconds=SILENCE if self.rank == 0 else 2 * SILENCE)
            self._group.recv([said], rank, 0).wait(patience)
        except RuntimeError as error:
            return State.SILENT if "imed out" in str(error) else State.GONE
        return State(int(said))

    def _say(self, state: State, rank: int) -> bool:
        """Send a state to a process; returns whether that was possible."""
        try:
            self._group.send([torch.tensor([state], dtype=torch.int64)], rank, 0).wait()
        except RuntimeError:
            return False
        return True

    def _end_if_lost(self) -> None:
        """After a loss, let the process end by itself, or else end it."""
        self._known.set()
        if self._lost is None or self._leaving.wait(GRACE):
            return
        if self.speaks:
            os.write(2, f"\nebm-prior: error: {self.lost}\n".encode())
        os._exit(1)
