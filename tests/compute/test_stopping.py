"""Signals that stop: at once, or when the work at hand is ready, but not twice; and none where nobody asked for it."""

from __future__ import annotations

import signal
from collections.abc import Iterator

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
