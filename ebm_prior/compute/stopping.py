"""Orderly stopping: after Ctrl-C (SIGINT) or SIGTERM the present step is finished and saved; a second stops at once.

A program asks for this by `stoppable`, as the command line does. Elsewhere (in a notebook, say) signals work as usual,
because a library must not change how its caller is stopped.
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
    """The request to stop: `signal` is the first signal that arrived, or None."""

    signal: int | None = None


_granted: list[Wish] = []  # requests that running work will check, the innermost last


@contextlib.contextmanager
def stoppable(on_wish: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Inside the block, SIGINT and SIGTERM raise Stopped: at once, or after the present step inside `wish_granted`.

    `on_wish` is called in the signal handler if the work will stop later. Signals that were ignored stay ignored. This
    works only in the main thread; in another one the block changes nothing.
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
    """Inside the block, the first signal is stored in the yielded Wish, which the work checks after each step.

    `able`: False if stopping later would save nothing; signals then act at once.
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
