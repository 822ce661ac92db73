"""A run directory: what a kill leaves behind is enough to go on, and nothing of anybody's is lost."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ebm_prior.errors import CheckpointError, ConfigurationError, OutputError
from ebm_prior.runs.folder import Run
from ebm_prior.storage.atomic import append_line, without_nan, write_atomically

CONFIG: dict[str, Any] = {"rate": 0.1, "energy": {"channels": 4, "hidden": 8}, "betas": (0.9, 0.99)}
INPUTS = {"backbone": "abc"}


def begun(folder: Path, **how: bool) -> Run:
    return Run(folder / "run", CONFIG, INPUTS, **how)


def test_state_and_metrics_come_back(tmp_path: Path) -> None:
    run = begun(tmp_path)
    assert run.load_state() is None
    run.log({"iteration": 1, "loss": 0.5})
    run.save_state({"iteration": 1, "z": [torch.arange(3)]})
    again = begun(tmp_path, resume=True)
    state = again.load_state()
    assert state is not None
    assert state["iteration"] == 1
    assert torch.equal(state["z"][0], torch.arange(3))
    assert again.metrics() == [{"iteration": 1, "loss": 0.5}]


def test_the_directory_tells_settings_and_versions(tmp_path: Path) -> None:
    begun(tmp_path)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"] == {**CONFIG, "betas": [0.9, 0.99]}
    assert record["inputs"] == INPUTS
    assert set(record["versions"]) == {"ebm_prior", "torch", "python"}


@pytest.mark.parametrize("state", [True, False])
def test_metrics_that_the_state_does_not_know_are_dropped(tmp_path: Path, state: bool) -> None:
    """A kill between metrics and state, before the first state too, and one in the middle of a line."""
    run = begun(tmp_path)
    if state:
        run.log({"iteration": 1})
        run.save_state({"iteration": 1})
    run.log({"iteration": 2})
    with (run.directory / "metrics.jsonl").open("a") as file:
        file.write('{"iterat')
    run.load_state()
    run.log({"iteration": 2})
    assert run.metrics() == [{"iteration": 1}] * state + [{"iteration": 2}]
    assert (run.directory / "metrics.jsonl").read_text().endswith('{"iteration": 2, "crc32": "cbeca53f"}\n')


def test_metrics_are_strict_json(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.log({"iteration": 1, "loss": float("nan"), "parts": [1.0, float("inf")]})
    assert run.metrics() == [{"iteration": 1, "loss": None, "parts": [1.0, None]}]
    assert without_nan({"a": (float("-inf"), True, "x")}) == {"a": [None, True, "x"]}


@pytest.mark.parametrize("kept", [0, 10, 300, -1])
def test_a_damaged_state_is_an_error_with_advice(tmp_path: Path, kept: int) -> None:
    run = begun(tmp_path)
    run.save_state({"iteration": 1, "z": torch.zeros(50)})
    path = run.directory / "state.pt"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged.*--overwrite"):
        run.load_state()


@pytest.mark.parametrize("content", [[1], {}, {"iteration": "x"}])
def test_a_state_of_another_kind_is_an_error(tmp_path: Path, content: Any) -> None:
    run = begun(tmp_path)
    torch.save(content, run.directory / "state.pt")
    with pytest.raises(CheckpointError, match="damaged"):
        run.load_state()


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_state_runs_no_code(tmp_path: Path) -> None:
    run, marker = begun(tmp_path), tmp_path / "marker"
    torch.save({"iteration": 1, "z": Attack(marker)}, run.directory / "state.pt")
    with pytest.raises(CheckpointError, match="damaged"):
        run.load_state()
    assert not marker.exists()
    pickle.loads(pickle.dumps(Attack(marker)))
    assert marker.exists()


def test_damaged_metrics_are_an_error(tmp_path: Path) -> None:
    run = begun(tmp_path)
    (run.directory / "metrics.jsonl").write_bytes(b"\0\0\0\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged"):
        run.load_state()


def test_resume_with_others_names_every_one(tmp_path: Path) -> None:
    begun(tmp_path)
    other = {**CONFIG, "rate": 0.2, "energy": {"channels": 4, "hidden": 9}}
    with pytest.raises(ConfigurationError) as caught:
        Run(tmp_path / "run", other, {"backbone": "xyz"}, resume=True)
    message = str(caught.value)
    for part in ("rate: 0.1 before, 0.2 now", "energy.hidden: 8 before, 9 now", "backbone: 'abc' before, 'xyz' now"):
        assert part in message
    assert "channels" not in message
    assert "betas" not in message  # a tuple is a list in JSON


def test_a_setting_that_came_later_keeps_no_run_from_going_on(tmp_path: Path) -> None:
    begun(tmp_path)
    later = {**CONFIG, "energy": {**CONFIG["energy"], "own_heads": 8}}
    Run(tmp_path / "run", later, {"backbone": "abc"}, resume=True)
    with pytest.raises(ConfigurationError, match="rate"):
        Run(tmp_path / "run", {**later, "rate": 0.2}, {"backbone": "abc"}, resume=True)
    with pytest.raises(ConfigurationError, match="threads"):
        Run(tmp_path / "run", later, {"backbone": "abc", "threads": 4}, resume=True)


def test_a_broken_record_of_the_run(tmp_path: Path) -> None:
    begun(tmp_path)
    for broken in ("{", "[]", '{"config": 1, "inputs": 2}'):
        (tmp_path / "run" / "config.json").write_text(broken)
        with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
            begun(tmp_path, resume=True)


def test_a_run_is_not_begun_over_another(tmp_path: Path) -> None:
    begun(tmp_path).save_state({"iteration": 3})
    with pytest.raises(OutputError, match=r"--resume.*--overwrite.*--out"):
        begun(tmp_path)
    state = begun(tmp_path, resume=True).load_state()
    assert state is not None
    assert state["iteration"] == 3


def test_overwriting_starts_anew_and_keeps_what_is_not_of_the_run(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.log({"iteration": 1})
    run.save_state({"iteration": 1})
    for name in ("prior.safetensors", "notes.txt", "samples-000100.png"):
        (run.directory / name).write_text("x")
    again = begun(tmp_path, overwrite=True)
    assert again.load_state() is None
    assert again.metrics() == []
    assert (run.directory / "notes.txt").exists()
    assert (run.directory / "prior.safetensors").exists()  # until the new one replaces it
    assert not (run.directory / "samples-000100.png").exists()


@pytest.mark.parametrize("content", [None, "{}", '{"model_type": "bert"}', "[", "3"])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    if content is not None:
        (folder / "config.json").write_text(content)  # as other programs call theirs
    before = sorted((p.name, p.read_text()) for p in folder.iterdir())
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises((OutputError, CheckpointError), match="another --out"):
            begun(tmp_path, **how)
        assert sorted((p.name, p.read_text()) for p in folder.iterdir()) == before


def test_what_a_kill_at_the_very_start_leaves_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.x7f3").write_text("{")  # the temporary file of an atomic write
    begun(tmp_path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputError, match=r"run is a file"):
            begun(tmp_path, **how)
    with pytest.raises(OutputError, match="cannot write"):
        Run(tmp_path / "run" / "under", CONFIG, INPUTS)


def test_a_folder_that_may_not_be_read_is_a_stated_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path)

    def forbidden(self: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for name in ("iterdir", "unlink"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, forbidden)
            with pytest.raises(OutputError, match="run: Permission denied; choose another --out"):
                begun(tmp_path, overwrite=True)


def test_writing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write_atomically(path, b"a")
    write_atomically(path, b"b")
    append_line(path, "c")
    assert path.read_bytes() == b"bc\n"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(OutputError, match="cannot write"):
        append_line(tmp_path, "x")
