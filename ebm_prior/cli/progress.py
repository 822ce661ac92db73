"""A progress bar on stderr: what the command line shows while something runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from ebm_prior.interfaces import Progress
from ebm_prior.plain import printable

LINE_SECONDS = 10.0  # between two lines, where stderr is no terminal


class Bar(Progress):
    """Progress of a piece of work: a bar on a terminal, elsewhere (in a log file, say) a line every few seconds."""

    def __init__(self, name: str, total: int) -> None:
        """Begin to show the work called `name`, of `total` steps; 0 where the total is not known yet."""
        self._bar = _new(name, total)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, name: str, total: int) -> None:
        """End this bar, if it has moved at all, and begin another one."""
        self._bar.leave = self._bar.n > 0
        self._bar.close()
        self._bar = _new(name, total)

    def step(self, shown: Mapping[str, Any]) -> None:
        """Move to an iteration and show its numbers."""
        numbers = {k: f"{v:.3g}" for k, v in shown.items() if isinstance(v, float)}
        if self._bar.n == 0:  # in a resumed run, the remaining time is estimated from here on
            self._bar.n = self._bar.initial = shown["iteration"] - 1
        self._bar.total = shown["iterations"]
        self._bar.set_postfix(numbers, refresh=False)
        self._bar.update(shown["iteration"] - self._bar.n)

    def stage(self, name: str) -> None:
        """Move on by one and show the name of the part of the work that begins."""
        self._bar.set_postfix_str(name)
        self._bar.update(1)

    def advance(self, count: int) -> None:
        """Move on by `count`."""
        self._bar.update(count)

    def remark(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(printable(text), file=sys.stderr)


class Lines:
    """A replacement for tqdm's bar that prints whole lines: one every `LINE_SECONDS`, and one at the end."""

    def __init__(self, name: str, total: int) -> None:
        self.n, self.initial, self.total, self.leave = 0, 0, total, True
        self._name, self._shown = name, ""
        self._began = self._last = time.monotonic()

    def set_postfix(self, numbers: Mapping[str, str], *, refresh: bool) -> None:
        """The numbers to show on the next line."""
        self._shown = ", ".join(f"{key} {value}" for key, value in numbers.items())

    def set_postfix_str(self, text: str) -> None:
        """The words to show on the next line."""
        self._shown = text

    def update(self, count: int) -> None:
        """Move on by `count`, and print a line if it is time."""
        self.n += count
        if time.monotonic() - self._last >= LINE_SECONDS:
            self._print()

    def write(self, text: str, *, file: Any) -> None:
        """Print a remark."""
        print(text, file=file, flush=True)

    def close(self) -> None:
        """Print the last line, if anything has changed since the line before."""
        if self.n and self.leave:
            self._print()

    def _print(self) -> None:
        self._last = time.monotonic()
        seconds = self._last - self._began
        known = f"/{self.total}" if self.total else ""
        left = seconds * max(0, self.total - self.n) / max(1, self.n - self.initial)
        after = f", about {_duration(left)} left" if left else ""
        shown = f", {self._shown}" if self._shown else ""
        print(f"{self._name}: {self.n}{known} in {_duration(seconds)}{after}{shown}", file=sys.stderr, flush=True)


def _new(name: str, total: int) -> Any:
    if sys.stderr.isatty():
        return tqdm(desc=name, total=total or None, file=sys.stderr, dynamic_ncols=True, mininterval=1.0)
    return Lines(name, total)


def _duration(seconds: float) -> str:
    """Seconds, minutes or hours: 45 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
