"""Stopping in good order: Ctrl-C (SIGINT) and SIGTERM wait until the step at work is done and saved; a second does not.

A program that wants this says so by `stoppable`, as the command line does. Elsewhere (in a notebook, say) signals do
what they always do: a library does not change how its caller is stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ebm_prior.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Wish:
    """Somebody's wish that the work should stop: the first signal that came, None as long as none has."""

    signal: int | None = None


_granted: list[Wish] = []  # wishes that the work at hand will look at, the innermost last


@contextlib.contextmanager
def stoppable(on_wish: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise Stopped, at once or where the work at hand grants the wish (`wish_granted`).

    `on_wish` is called, within the signal's handler, when the work is going to stop later. A signal that is ignored
    stays ignored. Only the main thread can be stopped so; in another one nothing changes.
    """

    def handle(number: int, _: Any) -> None:
        if _granted and _granted[-1].signal is None:
            _granted[-1].signal = number
            on_wish()
        else:
            raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    changed = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in changed:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not Python's


@contextlib.contextmanager
def wish_granted(able: bool = True) -> Iterator[Wish]:
    """Inside, the first signal is kept in the Wish that is returned: the work looks at it, and stops when it can.

    `able`: False where stopping later would save nothing; signals then act at once.
    """
    wish = Wish()
    if not able:
        yield wish
        return
    _granted.append(wish)
    try:
        yield wish
    finally:
        _granted.remove(wish)


def ignore_signals_at_exit() -> None:
    """For a program that has stopped: a further signal does not end the interpreter with a traceback."""
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in SIGNALS])
