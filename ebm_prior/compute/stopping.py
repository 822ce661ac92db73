"""Orderly stopping: after Ctrl-C (SIGINT) or SIGTERM the present step is finished and saved; a second stops at once.

A program asks for this by `stoppable`, as the command line does, and by `program`, which covers what lies before and
after: the imports, and the interpreter's own end. Elsewhere (in a notebook, say) signals work as usual, because a
library must not change how its caller is stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from ebm_prior.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = 0.02  # seconds after which a signal that came during an import comes again


class Wish:
    """The request to stop: `signal` is the first signal that arrived, or None."""

    signal: int | None = None


_granted: list[Wish] = []  # requests that running work will check, the innermost last
_heard_at_the_end = False  # whether a signal has come since the work of a `program` was done
_starting = False  # whether this is a `program` whose work has not begun


@contextlib.contextmanager
def program() -> Iterator[None]:
    """The whole of a program, in which SIGINT and SIGTERM never end in a traceback.

    Until its work has `begun` there is nothing to put in order, and the process ends there and then with one line:
    an exception would land in the midst of an import, of torch most often, which may take it for a failure of its own.
    Afterwards `stoppable` says what happens. When all is done, a first signal changes nothing, and a second one ends a
    process that does not come to its end.
    """
    global _starting
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    _starting = True
    # Registered first, so run last: from there on Python would let a signal kill the process, which has its exit code.
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in heard])
    for number in heard:
        signal.signal(number, _outside)
    try:
        yield
    finally:
        _starting = False


def begun() -> None:
    """Say that the program has something to put in order when it is stopped."""
    global _starting
    _starting = False


def _outside(number: int, _: FrameType | None) -> None:
    global _heard_at_the_end
    if _starting and os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
        with contextlib.suppress(OSError):
            os.write(2, b"ebm-prior: stopped\n")
    if _starting or _heard_at_the_end:
        os._exit(128 + number)
    _heard_at_the_end = True


@contextlib.contextmanager
def stoppable(on_wish: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Inside the block, SIGINT and SIGTERM raise Stopped: at once, or after the present step inside `wish_granted`.

    `on_wish` is called in the signal handler if the work will stop later. Signals that were ignored stay ignored. One
    that comes while a module is imported waits for the import's end: modules written in C turn what is raised there
    into an error of their own, or lose it. This works in the main thread; in another one the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deaf, alarm = _deaf_calls(sys._getframe()), list[Any]()

    def handle(number: int, frame: FrameType | None) -> None:
        if _starting:
            _outside(number, frame)
        elif _granted and _granted[-1].signal is None:
            _granted[-1].signal = number
            on_wish()
        elif _deaf_calls(frame) > deaf and hasattr(signal, "SIGALRM"):  # which Windows lacks
            before = signal.signal(signal.SIGALRM, lambda _, frame: handle(number, frame))
            alarm[:] = alarm or [before]
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            raise Stopped(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    changed = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in changed:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not Python's
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, alarm[0] or signal.SIG_DFL)


def _deaf_calls(frame: FrameType | None) -> int:
    """The number of calls under way in which nothing should be raised: imports, `__del__` and weakref's finalizers."""
    count = 0
    while frame is not None:
        code = frame.f_code
        importing, finalizing = code.co_filename.startswith("<frozen importlib"), code.co_filename == weakref.__file__
        count += importing or finalizing or code.co_name == "__del__"
        frame = frame.f_back
    return count


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
