"""The progress bar: a bar on a terminal, whole lines in a file, and a remark on a line of its own."""

from __future__ import annotations

import io
import sys

import pytest

from ebm_prior.cli import progress
from ebm_prior.cli.progress import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


KINDS = [io.StringIO, Terminal]


@pytest.mark.parametrize("kind", KINDS)
def test_a_remark_is_printed_and_the_total_follows(kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = kind()
    monkeypatch.setattr(sys, "stderr", stderr)
    with Bar("fit", 2_400) as bar:
        bar.remark("now in stages")
        bar.step({"iteration": 100, "iterations": 400, "loss": 0.5})
    assert "now in stages\n" in stderr.getvalue()
    assert "100/400" in stderr.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_each_piece_of_work_has_its_own_count(kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = kind()
    monkeypatch.setattr(sys, "stderr", stderr)
    with Bar("fit", 10) as bar:
        bar.begin("latents", 30)
        bar.advance(30)
        bar.begin("fit", 10)
        bar.step({"iteration": 10, "iterations": 10})
        bar.begin("before and after", 128)
        bar.advance(64)
    for shown in ("30/30", "10/10", "64/128"):
        assert shown in stderr.getvalue()


def test_a_file_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand steps of an eighth of a second: a line each ten seconds and the last one, with the time left."""
    shown, now = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Bar("fit", 1_000) as bar:
        for iteration in range(1, 1_001):
            now[0] += 0.125
            bar.step({"iteration": iteration, "iterations": 1_000, "loss": 1 / iteration})
    lines = shown.getvalue().splitlines()
    assert "\r" not in shown.getvalue()
    assert len(lines) == 13
    assert lines[0] == "fit: 80/1000 in 10 s, about 2 min left, loss 0.0125"
    assert lines[-1].startswith("fit: 1000/1000 in 2 min")


def test_a_run_that_goes_on_counts_the_time_that_is_left_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, now = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Bar("fit", 1_000) as bar:
        for iteration in range(901, 912):
            now[0] += 1.0
            bar.step({"iteration": iteration, "iterations": 1_000})
    assert shown.getvalue().splitlines()[0] == "fit: 910/1000 in 10 s, about 90 s left"
