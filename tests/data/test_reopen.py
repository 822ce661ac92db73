"""Images that were recorded are found again: where they were, beside the run, under the data root; or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_writers import COLOUR, GREY, LABELS, everything, write_idx, write_npy, write_npz, write_pictures

from ebm_prior.data.images import from_array, open_images
from ebm_prior.data.reopen import origin_record, recorded_origin, reopen
from ebm_prior.data.source import ImageSource, Origin
from ebm_prior.errors import ConfigurationError, DataError

FORMS: dict[str, Callable[[Path], ImageSource]] = {
    "npy": lambda d: open_images(write_npy(d / "a.npy", GREY)),
    "npz": lambda d: open_images(write_npz(d / "a.npz", x_train=GREY, x_test=GREY[:2]), split="test"),
    "array": lambda d: open_images(write_npz(d / "a.npz", day=GREY, night=GREY ^ 1), array="night"),
    "marked array": lambda d: open_images(f"{write_npz(d / 'a.npz', day=GREY, night=GREY ^ 1)}:night"),
    "two readings": lambda d: open_images(
        write_npy(d / "a.npy", np.zeros((2, 3, 8, 1), np.uint8)), image_shape=(1, 3, 8)
    ),
    "five channels": lambda d: open_images(
        write_npy(d / "a.npy", np.zeros((2, 5, 8, 8), np.uint8)), image_shape=(5, 8, 8)
    ),
    "idx": lambda d: open_images(write_idx(d / "a-idx3-ubyte", GREY)),
    "folder": lambda d: open_images(write_pictures(d / "pictures", COLOUR, LABELS)),
    "folder in grey": lambda d: open_images(write_pictures(d / "pictures", COLOUR), mode="grey"),
    "named": lambda d: open_images(
        "mnist", data_root=write_npz(d / "root" / "mnist.npz", x_train=GREY, x_test=GREY[:3]).parent, split="test"
    ),
    "bundled": lambda d: open_images("fashion-mnist-subset", split="test"),
}


def same(one: ImageSource, other: ImageSource) -> bool:
    return (one.shape, one.fingerprint()) == (other.shape, other.fingerprint())


@pytest.mark.parametrize("form", FORMS)
def test_a_record_in_json_reopens_every_form(form: str, tmp_path: Path) -> None:
    source = FORMS[form](tmp_path)
    assert source.origin is not None
    record = json.loads(json.dumps(origin_record(source.origin)))
    assert recorded_origin(record) == source.origin
    assert recorded_origin(record | {"of a later version": 1}) == source.origin
    again = reopen(record, source.fingerprint())
    assert same(again, source)
    assert again.origin is not None
    assert again.origin.spec == source.origin.spec


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("named", "bundled")])
def test_moved_beside_the_run(form: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    source = FORMS[form](tmp_path / "here")
    fingerprint, origin = source.fingerprint(), source.origin
    assert origin is not None
    shutil.move(tmp_path / "here", tmp_path / "there")
    with pytest.raises(DataError, match=r"found them in none of 2 places.*Tried: \(1\) .*no such file.*\(2\) "):
        reopen(origin, fingerprint)
    found = reopen(origin, fingerprint, beside=tmp_path / "there")
    assert found.fingerprint() == fingerprint
    assert found.origin is not None
    assert Path(found.origin.spec).parent == tmp_path / "there"
    assert reopen(origin, fingerprint, data_root=tmp_path / "there").fingerprint() == fingerprint


def test_a_relative_path_is_looked_for_above_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole project moves: data/a.npy and runs/fit-001 of it."""
    (tmp_path / "old" / "data").mkdir(parents=True)
    write_npy(tmp_path / "old" / "data" / "a.npy", GREY)
    monkeypatch.chdir(tmp_path / "old")
    source = open_images("data/a.npy")
    assert source.origin is not None
    assert (source.origin.given, source.origin.spec) == ("data/a.npy", str(tmp_path / "old" / "data" / "a.npy"))
    monkeypatch.chdir(tmp_path)
    assert same(reopen(source.origin, source.fingerprint()), source)  # not relative to where one is now
    shutil.move(tmp_path / "old", tmp_path / "new")
    run = tmp_path / "new" / "runs" / "fit-001"
    run.mkdir(parents=True)
    assert same(reopen(source.origin, source.fingerprint(), beside=run), source)
    with pytest.raises(DataError, match="found them in none"):  # nothing says that those are the images
        reopen(source.origin, beside=run)
    write_npy(run / "a.npy", GREY ^ 1)
    assert same(reopen(source.origin, source.fingerprint(), beside=run), source)


def test_other_images_at_the_place_are_refused(tmp_path: Path) -> None:
    source = open_images(write_npy(tmp_path / "a.npy", GREY))
    assert source.origin is not None
    recorded = source.fingerprint()
    write_npy(tmp_path / "a.npy", GREY ^ 1)
    with pytest.raises(DataError, match=r"\(1\) .*a\.npy: other images \(their fingerprint differs\)"):
        reopen(source.origin, recorded)
    assert same(reopen(source.origin), open_images(tmp_path / "a.npy"))  # nothing was recorded to compare with
    write_npy(tmp_path / "a.npy", COLOUR)
    with pytest.raises(DataError, match=r"\(1\) .*a\.npy: expected images of shape \(1, 5, 4\)"):
        reopen(source.origin)


def test_another_split_of_the_same_place(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", x_train=GREY, x_test=GREY[:2])
    source = open_images(path)
    assert source.origin is not None
    assert len(reopen(source.origin, source.fingerprint(), split="test")) == 2
    assert len(reopen(source.origin, source.fingerprint(), split="train")) == 6
    write_npz(path, x_train=GREY ^ 1, x_test=GREY[:2])
    with pytest.raises(DataError, match="fingerprint differs"):
        reopen(source.origin, source.fingerprint(), split="test")


def test_the_roots_of_a_named_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EBM_PRIOR_DATA", str(tmp_path / "default"))
    source = FORMS["named"](tmp_path)
    assert source.origin is not None
    assert (source.origin.spec, source.origin.root) == ("mnist", str(tmp_path / "root"))
    recorded = source.fingerprint()
    (tmp_path / "mnist").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder of the name is not meant
    assert same(reopen(source.origin, recorded), source)
    for place, how in (("chosen", {"data_root": "chosen"}), ("default", {}), ("run", {"beside": "run"})):
        shutil.move(tmp_path / "root", tmp_path / place)
        found = reopen(source.origin, recorded, **how)  # type: ignore[arg-type]
        assert same(found, source)
        assert found.origin is not None
        assert found.origin.root == str(tmp_path / place)
        shutil.move(tmp_path / place, tmp_path / "root")
    write_npz(tmp_path / "chosen" / "mnist.npz", x_test=COLOUR)
    assert same(reopen(source.origin, recorded, data_root="chosen"), source)  # the wrong ones are passed over
    shutil.rmtree(tmp_path / "root")
    with pytest.raises(DataError, match=r"none of 3 places.*\(1\) mnist under .*chosen.*\(2\) .*root.*\(3\) .*default"):
        reopen(source.origin, recorded, data_root="chosen")


def test_what_lies_in_memory_has_no_origin(tmp_path: Path) -> None:
    source = open_images(write_npy(tmp_path / "a.npy", GREY))
    assert from_array(GREY).origin is None
    assert source.subset([0]).origin is None
    assert torch.equal(everything(source), everything(from_array(GREY)))


@pytest.mark.parametrize(
    "change",
    [
        {"spec": None},
        {"spec": ""},
        {"spec": 3},
        {"split": "valid"},
        {"shape": [1, 2]},
        {"shape": [1, 2, -3]},
        {"shape": [1, 2, 3.0]},
        {"shape": [True, 2, 3]},
        {"root": 3},
        {"mode": "RGB"},
        {"array": ["x"]},
        {"given": None},
    ],
)
def test_nonsense_in_a_record_is_refused(change: dict[str, object]) -> None:
    record = origin_record(Origin("/a.npy", "a.npy", "train", (1, 2, 3)))
    assert recorded_origin(record).shape == (1, 2, 3)
    with pytest.raises(ConfigurationError, match=r"expected the record of where images came from.*pass --data"):
        recorded_origin(record | change)
