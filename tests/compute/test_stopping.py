"""Signals that stop: at once, or when the work at hand is ready, but not twice; and none where nobody asked for it."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ebm_prior.compute.stopping import SIGNALS, stoppable, wish_granted
from ebm_prior.errors import EbmPriorError, Stopped


@pytest.fixture(autouse=True)
def as_in_the_foreground() -> Iterator[None]:
    """A shell lets its background processes ignore SIGINT, and the tests may run in one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("granted", [False, True])
def test_a_signal_stops_at_once_where_nothing_would_be_saved(number: signal.Signals, granted: bool) -> None:
    with pytest.raises(Stopped) as caught:
        stop(number, able=False if granted else None)
    assert (caught.value.signal, caught.value.saved) == (number, None)
    assert not isinstance(caught.value, (Exception, EbmPriorError))


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_is_kept_and_the_second_stops_at_once(number: signal.Signals) -> None:
    told: list[bool] = []
    before = [signal.getsignal(each) for each in SIGNALS]
    with stoppable(lambda: told.append(True)), wish_granted() as wish:
        assert wish.signal is None
        signal.raise_signal(number)
        assert wish.signal == number
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)
    assert told == [True]
    assert [signal.getsignal(each) for each in SIGNALS] == before


def stop(number: signal.Signals, able: bool | None) -> None:
    """Signal a program in work that may be stopped at its end if it is `able`; None: in no such work."""
    with stoppable():
        if able is None:
            signal.raise_signal(number)
        else:
            with wish_granted(able):
                signal.raise_signal(number)


def test_a_library_changes_nothing() -> None:
    with wish_granted() as wish, pytest.raises(KeyboardInterrupt) as caught:
        signal.raise_signal(signal.SIGINT)
    assert caught.type is KeyboardInterrupt
    assert wish.signal is None


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def stopped_after(work: Callable[[], object]) -> None:
    with stoppable():
        work()
        time.sleep(10)


def test_one_that_comes_during_an_import_waits_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a library in C would, the module takes whatever is raised in it for its own failure."""
    text = "import signal\ntry: signal.raise_signal(signal.SIGINT)\nexcept BaseException: raise ImportError('broken')"
    (tmp_path / "slow_import.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    alarm = signal.getsignal(signal.SIGALRM)
    with pytest.raises(Stopped) as caught:
        stopped_after(lambda: importlib.import_module("slow_import"))
    assert caught.value.signal == signal.SIGINT
    assert "slow_import" in sys.modules
    assert signal.getsignal(signal.SIGALRM) is alarm
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


class Ending:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


class Finalized:
    def __init__(self) -> None:
        weakref.finalize(self, signal.raise_signal, signal.SIGINT)


@pytest.mark.parametrize("kind", [Ending, Finalized])
def test_one_that_comes_while_an_object_ends_is_not_lost(kind: type[object]) -> None:
    with pytest.raises(Stopped):
        stopped_after(kind)


PROGRAM = """
import atexit, signal, sys
from ebm_prior.compute.stopping import begun, program, stoppable
from ebm_prior.errors import Stopped
moment, number, times = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def now(name):
    if moment == name:
        for _ in range(times):
            signal.raise_signal(number)
atexit.register(now, "the end")
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with program():
        now("the imports")
        with stoppable():
            now("the command's imports")
            begun()
            now("the work")
        now("the result")
except Stopped as stopped:
    sys.exit(f"stopped by {stopped.signal}")
now("the rest")
"""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("moments", "times", "said", "code"),
    [
        (("the imports", "the command's imports"), 2, b"ebm-prior: stopped\n", None),
        (("the work",), 2, b"stopped by %d\n", 1),
        (("the result", "the rest", "the end"), 1, b"", 0),
        (("the rest",), 2, b"", None),
        (("the end",), 2, b"", 0),
    ],
)
def test_a_program_is_stopped_at_any_moment(
    moments: tuple[str, ...], times: int, said: bytes, code: int | None, number: signal.Signals
) -> None:
    """Before its work has begun, within it, and when all is done, where a second signal ends what hangs."""
    for moment in moments:
        command = [sys.executable, "-c", PROGRAM, moment, str(int(number)), str(times)]
        done = subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[2], check=False)
        assert done.stderr == (said % number if b"%" in said else said), moment
        assert done.returncode == (128 + number if code is None else code)
