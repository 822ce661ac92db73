"""Ctrl-C, SIGTERM and kill -9 in the midst of a run: it is saved, says how to go on, and ends in the same bytes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from run_folders import metrics
from workshop import HELPERS, Workshop

from ebm_prior.cli.group import resume_command
from ebm_prior.training import loop

NEVER = 1e6  # seconds
FIT = ("--iterations", 60, "--evaluate-every", 25, "--patience", 100, "--seed", 5)
PRETRAIN = ("--backbone", "toy", "--iterations", 40, "--batch-size", 16, "--checkpoint-every", 1_000, "--seed", 5)
TRAIN = (
    *("--set", "width=4", "--set", "hidden=6", "--set", "latents=[4,3]", "--iterations", 30, "--batch-size", 8),
    *("--evaluate-every", 20, "--energy-from", 0, "--energy-hidden", 6, "--prior-chain-steps", 2, "--warmup", 0),
)


@pytest.fixture(scope="module")
def commands(workshop: Workshop, small_options: list[str]) -> dict[str, tuple[list[object], str]]:
    """A run of each kind, with evaluations far apart, and the file that it makes."""
    data = ["--data", workshop.images]
    return {
        "fit": (["fit", "--ckpt", workshop.backbone, *data, *small_options, *FIT], "prior.safetensors"),
        "pretrain": (["pretrain", *data, *PRETRAIN], "backbone.safetensors"),
        "train": (["train", *data, *TRAIN], "prior.safetensors"),
    }


@pytest.fixture(scope="module")
def uncut(workshop: Workshop, commands: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a whole run of a kind."""

    @cache
    def run(kind: str) -> Path:
        out = tmp_path_factory.mktemp(kind) / "whole"
        workshop.run(*commands[kind][0], "--out", out)
        return out

    return run


def noted(out: Path) -> int:
    """The number of steps that a run has noted."""
    path = out / "progress.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def started(
    workshop: Workshop, words: list[object], out: Path, seconds: float, ready: Callable[[Path], bool]
) -> Forked:
    """A run in a process of its own, which saves its state every `seconds`, as soon as it is `ready`."""
    process = workshop.fork(HELPERS / "stopped_commands.py", seconds, *words, "--out", out)
    deadline = time.monotonic() + 240
    while not ready(out):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def stopped(process: Forked, *signals: signal.Signals) -> str:
    for number in signals:
        process.send_signal(number)
    return process.communicate(timeout=240)[1].decode()


@pytest.mark.parametrize(
    ("kind", "number", "code"),
    [
        ("fit", signal.SIGINT, 130),
        ("fit", signal.SIGTERM, 143),
        ("pretrain", signal.SIGINT, 130),
        ("train", signal.SIGTERM, 143),
    ],
)
def test_a_signal_saves_the_step_and_says_how_to_go_on(
    workshop: Workshop,
    commands: Any,
    uncut: Callable[[str], Path],
    tmp_path: Path,
    kind: str,
    number: signal.Signals,
    code: int,
) -> None:
    """Also before the first evaluation, which a pretraining has after its first thousand iterations."""
    (words, result), whole, cut = commands[kind], uncut(kind), tmp_path / "cut"
    process = started(workshop, words, cut, NEVER, lambda out: noted(out) >= 3)
    said = stopped(process, number)
    assert process.returncode == code, said
    state = torch.load(cut / "state.pt", weights_only=True)
    lines = [line for line in said.splitlines() if line.startswith("ebm-prior: stopped")]
    assert len(lines) == 1, said
    assert lines[0] == said.splitlines()[-1]
    assert f"after iteration {state['iteration']}, which is saved" in lines[0]
    assert state["iteration"] >= 3
    assert not (cut / result).exists()
    command = shlex.split(lines[0].partition("Go on with: ")[2])
    assert command[:2] == ["OMP_NUM_THREADS=1", "ebm-prior"]
    assert command[-3:] == ["--resume", "--out", str(cut)]
    again = workshop.run(*command[2:])
    assert (cut / result).read_bytes() == (whole / result).read_bytes()
    assert metrics(cut) == metrics(whole)
    assert again.exit_code == 0


def test_a_second_signal_stops_at_once(workshop: Workshop, commands: Any, tmp_path: Path) -> None:
    words, _ = commands["fit"]
    out = tmp_path / "out"
    slow = [*words, "--iterations", 10**6, "--held-out", 12, "--evaluate-every", 10**5, "--batch-size", 64_000]
    process = started(workshop, slow, out, NEVER, lambda out: (out / "config.json").exists())
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    said = stopped(process, signal.SIGINT)
    assert process.returncode == 130, said
    assert "stopped" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("kind", ["fit", "pretrain", "train"])
def test_a_kill_between_two_states_of_the_clock_loses_nothing(
    workshop: Workshop,
    commands: Any,
    uncut: Callable[[str], Path],
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The state is one between evaluations, and nothing before it is computed again."""
    (words, result), whole, cut = commands[kind], uncut(kind), tmp_path / "cut"
    process = started(workshop, words, cut, 0.0, lambda out: noted(out) >= 4)
    process.kill()
    process.communicate(timeout=240)
    reached = torch.load(cut / "state.pt", weights_only=True)["iteration"]
    assert reached >= 3
    evaluated = [line["iteration"] for line in metrics(whole)]
    monkeypatch.setattr(loop, "NOTE_SECONDS", 0.0)
    workshop.run(*words, "--out", cut, "--resume")
    steps = [json.loads(line)["iteration"] for line in (cut / "progress.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)), "a step was noted twice"
    assert set(steps) | {reached} | set(evaluated) >= set(range(1, evaluated[-1]))
    assert (cut / result).read_bytes() == (whole / result).read_bytes()
    assert metrics(cut) == metrics(whole)


def test_the_command_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = ["fit", "--ckpt", "my net.pt", "--out=a", "--overwrite", "--seed", "3", "--resume", "--out", "b"]
    assert resume_command(words, Path("b")) == "ebm-prior fit --ckpt 'my net.pt' --seed 3 --resume --out b"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    several = "OMP_NUM_THREADS=2 torchrun --standalone --nproc-per-node 2 -m ebm_prior fit --resume --out c"
    assert resume_command(["fit"], Path("c"), 2) == several


def test_a_command_without_a_run_is_stopped_at_once(workshop: Workshop, tmp_path: Path) -> None:
    process = workshop.fork(HELPERS / "stopped_commands.py", NEVER, "demo", "--out", tmp_path / "demo")
    assert b"fitting" in process.stderr.readline()
    assert any(b"held-out latents" in line for line in process.stderr)  # its fit has begun
    said = stopped(process, signal.SIGINT)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "ebm-prior: stopped"
    assert os.listdir(tmp_path) == []
