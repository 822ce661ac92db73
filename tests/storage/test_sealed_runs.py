"""What a run reads back: a damaged file is noticed, one of another kind is one stated error, an old one goes on."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import Interrupted
from small_fits import into, small
from workshop import Workshop

from ebm_prior.data.images import ImageSource
from ebm_prior.errors import CheckpointError, EbmPriorError
from ebm_prior.model.backbone import Backbone
from ebm_prior.runs.folder import read_run_record
from ebm_prior.storage.sealed import _SEAL_LENGTH, read_lines, read_state, state_bytes

FLIPS = 300


def stop_at(iteration: int) -> Callable[[Any], None]:
    def stop(shown: Any) -> None:
        if shown["iteration"] == iteration:
            raise Interrupted

    return stop


@pytest.fixture
def cut(workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path) -> Path:
    """A real run, interrupted after its second state."""
    with pytest.raises(Interrupted):
        into(tmp_path / "cut", workshop, backbone, images, small(), on_step=stop_at(5))
    return tmp_path / "cut"


def as_by_version_0_1_0(run: Path) -> None:
    """The same run without checksums, byte for byte as version 0.1.0 wrote it."""
    state = (run / "state.pt").read_bytes()[:-_SEAL_LENGTH]
    (run / "state.pt").write_bytes(state[:-2] + b"\0\0")
    lines = [json.dumps(line) + "\n" for line in read_lines(run / "metrics.jsonl")]
    (run / "metrics.jsonl").write_text("".join(lines))
    record = json.loads((run / "config.json").read_text())
    record.pop("sha256")
    (run / "config.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("old", [False, True])
def test_no_flipped_bit_of_a_state_becomes_another_state(cut: Path, old: bool) -> None:
    """Of 300 flips all 300 are refused; in an old state those in padding change nothing and may pass."""
    if old:
        as_by_version_0_1_0(cut)
    path, choose = cut / "state.pt", random.Random(0)
    data, (true, sealed) = path.read_bytes(), read_state(path)
    assert sealed is not old
    refused = 0
    for _ in range(FLIPS):
        damaged = bytearray(data)
        damaged[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        try:
            found, _ = read_state(path)
        except CheckpointError:
            refused += 1
        else:
            assert old
            assert equal(found, true)
    assert refused == FLIPS if not old else refused > FLIPS // 2


def test_no_flipped_bit_of_metrics_or_settings_is_believed(cut: Path) -> None:
    choose = random.Random(1)
    for name, read in (("metrics.jsonl", read_lines), ("config.json", read_run_record)):
        path = cut / name
        data, true = path.read_bytes(), read(path)
        for _ in range(FLIPS):
            damaged = bytearray(data)
            damaged[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
            path.write_bytes(damaged)
            try:
                found = read(path)
            except CheckpointError:
                continue
            kept = {key: found[key] for key in true} if isinstance(found, dict) else found  # the checksum's own name
            # White space of config.json may be other white space; a line end that is none cuts the last line.
            assert kept == true or (isinstance(true, list) and kept == true[:-1])
        path.write_bytes(data)


def test_a_run_of_version_0_1_0_goes_on_to_the_same_bytes(
    workshop: Workshop, backbone: Backbone, images: ImageSource, cut: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = into(cut.parent / "whole", workshop, backbone, images, small())
    as_by_version_0_1_0(cut)
    assert into(cut, workshop, backbone, images, small(), resume=True) == whole
    assert "state.pt has no checksum of its own" in caplog.text
    assert (cut / "metrics.jsonl").read_bytes() == (cut.parent / "whole" / "metrics.jsonl").read_bytes()


def test_every_other_reader_still_reads_them(cut: Path) -> None:
    assert torch.load(cut / "state.pt", weights_only=True)["iteration"] == 4
    assert zipfile.ZipFile(cut / "state.pt").testzip() is None
    lines = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4]
    assert set(lines[0]) == {*read_lines(cut / "metrics.jsonl")[0], "crc32"}


def first_moment(state: dict[str, Any]) -> dict[str, Any]:
    moments: dict[str, Any] = state["optimizer"]["state"][0]
    return moments


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "no optimizer": lambda state: state.pop("optimizer"),
    "no weights": lambda state: state.pop("energy"),
    "another version's part": lambda state: state.update(course={}),
    "weights of another shape": lambda state: state["energy"].update({"joint.1.bias": torch.zeros(3)}),
    "weights without a name": lambda state: state["average"].pop("joint.1.bias"),
    "moments of another shape": lambda state: first_moment(state).update(exp_avg=torch.zeros(2)),
    "moments that are none": lambda state: state["optimizer"]["state"].update({0: 3}),
    "moments of no parameter": lambda state: state["optimizer"]["state"].update({999: {}}),
    "iteration -5": lambda state: state.update(iteration=-5),
    "iteration 10**9": lambda state: state.update(iteration=10**9),
    "iteration true": lambda state: state.update(iteration=True),
    "iteration of text": lambda state: state.update(iteration="4"),
    "rate nan": lambda state: state.update(rate=float("nan")),
    "rate 0": lambda state: state.update(rate=0.0),
    "rollbacks -1": lambda state: state.update(rollbacks=-1),
    "best of nothing": lambda state: state.update(best={}),
    "best is null": lambda state: state.update(best=None),
    "saturated without when": lambda state: state.update(saturated={"ess": 1}),
    "stages of nothing": lambda state: state.update(stages={"eps": []}),
    "weights are a list": lambda state: state.update(energy=[1]),
    "empty": lambda state: state.clear(),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_right_form_with_the_wrong_content_is_one_error(
    workshop: Workshop, backbone: Backbone, images: ImageSource, cut: Path, what: str
) -> None:
    state, _ = read_state(cut / "state.pt")
    WRONG[what](state)
    (cut / "state.pt").write_bytes(state_bytes(state))
    with pytest.raises(CheckpointError, match=r"state\.pt.*start anew with --overwrite"):
        into(cut, workshop, backbone, images, small(), resume=True)


def test_a_state_of_a_newer_format_says_so(cut: Path) -> None:
    data = (cut / "state.pt").read_bytes()
    (cut / "state.pt").write_bytes(data.replace(b"ebm-prior state 001", b"ebm-prior state 002"))
    with pytest.raises(CheckpointError, match="format 2, this version reads 1"):
        read_state(cut / "state.pt")


@pytest.mark.parametrize(
    "line",
    [
        *("{}", "[]", "3", "null", '{"loss": 1}', '{"iteration": -1}', '{"iteration": 1.5}', '{"iteration": true}'),
        *('{"iteration": 1, "iteration": 2}', '{"iteration": NaN}', "[" * 100_000, "\ufeff{}", '{"iteration": 1e999}'),
    ],
)
def test_a_line_of_metrics_of_another_kind_is_one_error(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"iteration": 1}}\n{line}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged in line 2"):
        read_lines(tmp_path / "metrics.jsonl")


def test_a_line_without_its_checksum_is_noticed(cut: Path) -> None:
    path = cut / "metrics.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n" + second.split(', "crc32"')[0] + "}\n")
    with pytest.raises(EbmPriorError, match=r"line 2 .*no checksum"):
        read_lines(path)
