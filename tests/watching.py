"""A `Progress` for tests: it passes on what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ebm_prior.interfaces import Silent


class Watch(Silent):
    """Calls `step` with what every step shows, and `remark` with every remark."""

    def __init__(
        self, step: Callable[[Mapping[str, Any]], object] | None = None, remark: Callable[[str], object] | None = None
    ) -> None:
        self._step, self._remark = step, remark

    def step(self, shown: Mapping[str, Any]) -> None:
        if self._step:
            self._step(shown)

    def remark(self, text: str) -> None:
        if self._remark:
            self._remark(text)
