"""What somebody who watches a training has of it: lines by the clock, pictures, TensorBoard, and a rehearsal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from listener import Listener
from run_folders import content, metrics
from small_fits import into, small
from workshop import Workshop

from ebm_prior.data.images import ImageSource
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Backbone
from ebm_prior.runs.watch import Watch
from ebm_prior.training import loop

TRAIN = (
    *("--set", "width=4", "--set", "hidden=6", "--set", "latents=[4,3]", "--iterations", 600, "--batch-size", 8),
    *("--energy-from", 0.9, "--energy-hidden", 6, "--prior-chain-steps", 2),
)


def test_steps_are_noted_by_the_clock_apart_from_the_metrics(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into(tmp_path / "quick", workshop, backbone, images, small())
    assert not (tmp_path / "quick" / "progress.jsonl").exists()
    monkeypatch.setattr(loop, "NOTE_SECONDS", 0.0)
    into(tmp_path / "slow", workshop, backbone, images, small())
    lines = [json.loads(line) for line in (tmp_path / "slow" / "progress.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 3, 5]
    assert set(lines[0]) == {"iteration", "loss", "f_gap", "chain_norm", "seconds", "crc32"}
    assert metrics(tmp_path / "slow") == metrics(tmp_path / "quick")


def test_a_preview_is_a_picture_at_each_evaluation(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path
) -> None:
    for preview, expected in ((True, [2, 4, 6]), (False, [])):
        out = tmp_path / str(preview)
        into(out, workshop, backbone, images, small(), watch=Watch(preview=preview))
        assert sorted(path.name for path in out.glob("samples-*")) == [f"samples-{k:06d}.png" for k in expected]


def test_the_board_has_scalars_and_pictures_and_changes_no_result(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(loop, "NOTE_SECONDS", 0.0)
    plain = into(tmp_path / "plain", workshop, backbone, images, small())
    out, watch = tmp_path / "shown", Watch(preview=True, tensorboard=True)
    assert into(out, workshop, backbone, images, small(), watch=watch) == plain
    board = accumulators.EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("gain")] == [2, 4, 6]
    assert [event.step for event in board.Scalars("step/loss")] == [1, 3, 5]
    assert [event.step for event in board.Images("samples")] == [2, 4, 6]
    assert board.Scalars("gain")[-1].value == pytest.approx(metrics(out)[-1]["gain"], rel=1e-5)
    again = into(out, workshop, backbone, images, small(), watch=watch, overwrite=True)
    assert again == plain
    assert len(list((out / "tensorboard").iterdir())) == 1  # the earlier run's went with its metrics


def test_without_tensorboard_it_is_said_before_anything_is_done(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigurationError, match=r"needs tensorboard; pip install tensorboard$"):
        into(tmp_path / "out", workshop, backbone, images, small(), watch=Watch(tensorboard=True))
    assert list(tmp_path.iterdir()) == []


def test_all_that_takes_long_is_told(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path
) -> None:
    told = Listener()
    into(tmp_path / "out", workshop, backbone, images, small(), progress=told)
    names = [name for name, _ in told.begun]
    assert names == ["held-out latents", "moments of the latents", "fit", "before and after"]
    items = [total for name, total in told.begun if name != "fit"]
    assert sum(told.counts) == sum(items)


def words(kind: str, workshop: Workshop, small_options: list[str]) -> list[object]:
    return {
        "fit": ["fit", "--ckpt", workshop.backbone, *small_options],
        "staged": ["fit", "--ckpt", workshop.backbone, *small_options, "--ratios", "staged", "--stage-particles", 16],
        "pretrain": ["pretrain", "--backbone", "toy", "--batch-size", 16],
        "train": ["train", *TRAIN],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "steps", "product"),
    [
        ("fit", 6, "prior.safetensors"),
        ("staged", 6, "prior.safetensors"),
        ("pretrain", 12_000, "backbone.safetensors"),
        ("train", 600, "prior.safetensors"),
    ],
)
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    workshop: Workshop,
    small_options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    steps: int,
    product: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    command: list[Any] = [*words(kind, workshop, small_options), "--data", workshop.images, "--dry-run"]
    before = content(workshop.folder)
    text = workshop.run(*command).stdout
    for part in ("nothing is written", f"steps: {steps:,}", "s per step", "memory on cpu: about", product, "runs/"):
        assert part in text
    plan = json.loads(workshop.run(*command, "--json").stdout)
    assert plan["iterations"] == steps
    assert plan["seconds"] == pytest.approx(steps * plan["seconds_per_iteration"])
    assert plan["memory_bytes"] > 4 * plan["parameters"]
    assert list(tmp_path.iterdir()) == []
    assert content(workshop.folder) == before
