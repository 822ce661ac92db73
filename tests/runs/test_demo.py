"""The demo: it writes what it says, overwrites nothing but its own files, and shows a gain."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import content
from workshop import Workshop

from ebm_prior.runs import demo


@pytest.fixture
def short_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo in seconds: everything is done, too little of it to gain anything."""
    config, measured = replace(demo.demo_config(), iterations=1, held_out=50), demo.demo_eval_config(20)
    monkeypatch.setattr(demo, "demo_config", lambda: config)
    monkeypatch.setattr(demo, "demo_eval_config", lambda samples: replace(measured, auc=False))


@pytest.mark.usefixtures("short_demo")
def test_the_demo_writes_what_it_says_and_may_be_repeated(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    said = workshop.run("demo", "--out", out)
    bars = re.findall(r"measuring: (\d+)/(\d+)", said.stderr)
    assert bars
    assert all(int(done) <= int(total) for done, total in bars)
    text = said.stdout
    names = {"prior.safetensors", "before-after.png", "result.json"}
    assert {p.name for p in out.iterdir()} == names
    assert all(str(out / name) in text for name in names)
    assert "mean f (nats" in text
    assert "NOT held out" not in text
    shown = json.loads((out / "result.json").read_text())
    assert (shown["command"], shown["samples"], shown["held_out"]) == ("demo", 20, True)
    monkeypatch.setattr(demo, "fit", lambda *_, **__: pytest.fail("began to work"))
    with pytest.raises(pytest.fail.Exception, match="began to work"):
        workshop.run("demo", "--out", out)


def test_the_demo_overwrites_nothing_else(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "fit", lambda *_, **__: pytest.fail("began to work"))
    out, file = tmp_path / "mine", tmp_path / "file"
    out.mkdir()
    file.write_text("x")
    (out / "prior.safetensors").write_text("precious")
    (out / "config.json").write_text("{}")  # a run of `fit` has one
    before = content(out)
    assert "--overwrite" in workshop.error("demo", "--out", out)
    assert content(out) == before
    assert "is a file" in workshop.error("demo", "--out", file, "--overwrite")
    assert "cannot write" in workshop.error("demo", "--out", file / "below")
    with pytest.raises(pytest.fail.Exception, match="began to work"):
        workshop.run("demo", "--out", out, "--overwrite")


@pytest.mark.parametrize("left", [(), ("prior.safetensors",), ("prior.safetensors", ".before-after.png.x1")])
def test_an_interrupted_demo_can_be_repeated(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: tuple[str, ...]
) -> None:
    monkeypatch.setattr(demo, "fit", lambda *_, **__: pytest.fail("began to work"))
    for name in left:
        (tmp_path / name).write_text("x")
    with pytest.raises(pytest.fail.Exception, match="began to work"):
        workshop.run("demo", "--out", tmp_path)


@pytest.mark.long
def test_the_demo_shows_a_gain(workshop: Workshop, tmp_path: Path) -> None:
    """What the README promises of its first command, on real images: a picture that convinces, with numbers to match.

    Of other seeds: tests/benchmarks/demo_seeds.py.
    """
    result = json.loads(workshop.run("demo", "--out", tmp_path / "demo", "--json").stdout)
    assert result["gain_nats"] > 0
    assert result["gap_closed"] >= 0.60
    assert result["gap_closed_rec"] >= 0.80
    assert result["cpu_seconds"] <= 480  # four minutes on two cores
    assert result["kid_prior"] < result["kid_backbone"]
    assert result["f_posterior"] > result["f_backbone"]
    assert result["f_prior"] > result["f_backbone"]
    assert result["auc_after"] < result["auc_before"]
