"""The progress bar: a remark stands on a line of its own."""

from __future__ import annotations

import pytest

from ebm_prior.cli.progress import Bar


def test_a_remark_is_printed_and_the_total_follows(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("fit", 2_400) as bar:
        bar.remark("now in stages")
        bar.step({"iteration": 100, "iterations": 400, "loss": 0.5})
    shown = capsys.readouterr().err
    assert "now in stages\n" in shown
    assert "100/400" in shown
