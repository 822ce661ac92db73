"""A progress bar on stderr: what the command line shows while something runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from ebm_prior.interfaces import Progress
from ebm_prior.plain import printable


class Bar(Progress):
    """A progress bar that shows the latest numbers. `total` 0: not known yet."""

    def __init__(self, name: str, total: int) -> None:
        self._bar: tqdm[Any] = tqdm(
            desc=name, total=total or None, file=sys.stderr, dynamic_ncols=True, mininterval=1.0
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, shown: Mapping[str, Any]) -> None:
        """Move to an iteration and show its numbers."""
        numbers = {k: f"{v:.3g}" for k, v in shown.items() if isinstance(v, float)}
        self._bar.total = shown["iterations"]
        self._bar.set_postfix(numbers, refresh=False)
        self._bar.update(shown["iteration"] - self._bar.n)

    def stage(self, name: str) -> None:
        """Move on by one and say what is being done."""
        self._bar.set_postfix_str(name)
        self._bar.update(1)

    def advance(self, count: int) -> None:
        """Move on by `count`."""
        self._bar.update(count)

    def remark(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(printable(text), file=sys.stderr)
