"""A `Progress` that remembers what it was told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class Listener:
    """Keeps every step, stage, count and remark. `on_step` and `on_remark` are called with each, and may raise."""

    def __init__(
        self,
        on_step: Callable[[Mapping[str, Any]], object] = lambda shown: None,
        on_remark: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.begun: list[tuple[str, int]] = []
        self.steps: list[dict[str, Any]] = []
        self.stages: list[str] = []
        self.counts: list[int] = []
        self.remarks: list[str] = []
        self._on_step, self._on_remark = on_step, on_remark

    def begin(self, name: str, total: int) -> None:
        self.begun.append((name, total))

    def step(self, shown: Mapping[str, Any]) -> None:
        self.steps.append(dict(shown))
        self._on_step(shown)

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def advance(self, count: int) -> None:
        self.counts.append(count)

    def remark(self, text: str) -> None:
        self.remarks.append(text)
        self._on_remark(text)
