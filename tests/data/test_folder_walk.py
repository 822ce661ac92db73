"""Walking a folder: each real file once, regular files only, whatever links there are, and what is left out is said."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_writers import GREY, LABELS, everything, write_idx, write_npy, write_npz, write_pictures

from ebm_prior.data.folders import find_pictures
from ebm_prior.data.images import from_array, open_images
from ebm_prior.errors import ConfigurationError, DataError


def link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target, target_is_directory=target.is_dir())


def a_socket(path: Path) -> None:
    place = os.getcwd()
    os.chdir(path.parent)  # an address has about 100 characters
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(place)


def in_a_ring(d: Path) -> None:
    link(d / "a" / "to b", d / "b")
    link(d / "b" / "to a", d / "a")


# What is put beside six pictures, and what is said of it (None: nothing). The six are read, each once, in any case.
BESIDE: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "nothing": (lambda d: None, None),
    "a link to the folder": (lambda d: link(d / "self", d), "1 links to folders that are read already"),
    "three links to the folder": (
        lambda d: [link(d / f"self{i}", d) for i in range(3)],
        "3 links to folders that are read already",
    ),
    "a link to the folder above": (lambda d: link(d / "sub" / "up", d), "1 links to folders"),
    "a link up from the outside": (lambda d: link(d / "s" / "o", d.parent), None),
    "a ring of links": (in_a_ring, "2 links to folders"),
    "a link to one of them": (lambda d: link(d / "again.png", d / "000.png"), "1 further names"),
    "a link that comes first": (lambda d: link(d / "!.png", d / "000.png"), "1 further names"),
    "a chain of links": (
        lambda d: (link(d / "x.png", d / "000.png"), link(d / "y.png", d / "x.png")),
        "2 further names",
    ),
    "a hard link": (lambda d: os.link(d / "000.png", d / "zz.png"), "1 further names"),
    "hard links below": (
        lambda d: ((d / "s").mkdir(), [os.link(d / f"00{i}.png", d / "s" / f"{i}.png") for i in range(6)]),
        "6 further names",
    ),
    "a broken link": (lambda d: link(d / "gone.png", d / "nowhere.png"), "1 links that lead nowhere"),
    "a broken link to a folder": (lambda d: link(d / "class", d / "nowhere"), "1 links that lead nowhere"),
    "a link to itself": (lambda d: link(d / "me.png", d / "me.png"), "1 links that lead nowhere"),
    "a named pipe": (lambda d: os.mkfifo(d / "a.png"), r"1 that are no regular files \(named pipe\)"),
    "a link to a named pipe": (
        lambda d: (os.mkfifo(d.parent / "p"), link(d / "a.png", d.parent / "p")),
        "no regular files",
    ),
    "a socket": (lambda d: a_socket(d / "a.png"), r"no regular files \(socket\)"),
    "a device": (lambda d: link(d / "a.png", Path("/dev/zero")), r"no regular files \(device\)"),
    "a folder named as a picture": (lambda d: (d / "a.png").mkdir(), None),
    "hidden files": (lambda d: [(d / n).write_bytes(b"") for n in (".a.png", "._b.png", ".DS_Store")], "2 hidden"),
    "a hidden folder": (lambda d: write_pictures(d / ".cache", GREY), "1 hidden"),
    "other files": (
        lambda d: [(d / n).write_bytes(b"") for n in ("a.txt", "b.txt", "c.gif", "LICENSE")],
        r"4 files of other endings \(\.txt, ",
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_each_real_file_is_read_once_and_the_rest_is_said(case: str, tmp_path: Path) -> None:
    put, said = BESIDE[case]
    folder = write_pictures(tmp_path / "p" / "q", GREY)
    alone = open_images(folder)
    before = alone.fingerprint()
    assert alone.remarks == ()
    put(folder)
    source = open_images(folder)
    assert len(source) == 6
    assert source.fingerprint() == before  # the same files in the same order: not under the names of links
    assert torch.equal(everything(source), everything(from_array(GREY)))
    assert bool(source.remarks) is (said is not None)
    if said:
        (remark,) = source.remarks
        assert re.match("left out: ", remark)
        assert re.search(said, remark), remark
        assert source.subset([0]).remarks == source.remarks


def test_links_to_what_lies_elsewhere_are_followed(tmp_path: Path) -> None:
    """A folder of links is a choice among the images of a larger folder."""
    store = write_pictures(tmp_path / "store", GREY)
    for index in (4, 1):
        link(tmp_path / "chosen" / "one" / f"{index}.png", store / f"00{index}.png")
    link(tmp_path / "chosen" / "two", write_pictures(tmp_path / "other", GREY[:1]))
    source = open_images(tmp_path / "chosen")
    assert torch.equal(everything(source), everything(from_array(GREY[[1, 4, 0]])))
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1]
    assert source.remarks == ()


def test_two_links_to_one_folder_are_one_class(tmp_path: Path) -> None:
    store = write_pictures(tmp_path / "store", GREY)
    for name in "b", "a":
        link(tmp_path / "classes" / name, store)
    source = open_images(tmp_path / "classes")
    assert len(source) == 6
    assert [path.parent.name for path in find_pictures(tmp_path / "classes").paths] == ["a"] * 6
    assert "1 links to folders that are read already" in source.remarks[0]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["hard", "soft", "folder"]), st.integers(0, 3)), max_size=8)
)
def test_any_tangle_of_links_reads_each_file_once(
    tmp_path_factory: pytest.TempPathFactory, tangle: list[tuple[int, str, int]]
) -> None:
    root = tmp_path_factory.mktemp("tangle")
    folders = [root, root / "a", root / "a" / "b", root / "c"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    for index in range(6):
        write_pictures(folders[index % 4], GREY[index : index + 1]).joinpath("000.png").rename(
            folders[index % 4] / f"{index}.png"
        )
    real = {(folders[index % 4] / f"{index}.png").stat().st_ino for index in range(6)}
    for number, (index, kind, place) in enumerate(tangle):
        target = folders[index % 4] / f"{index}.png"
        if kind == "hard":
            os.link(target, folders[place] / f"z{number}.png")
        else:
            (folders[place] / f"{kind}{number}.png").symlink_to(target if kind == "soft" else target.parent)
    found = find_pictures(root)
    assert {path.stat().st_ino for path in found.paths} == real
    assert len(found.paths) == 6
    assert all(path.resolve() == path for path in found.paths), "the name of a link, where there is one without"
    assert found.paths == sorted(found.paths, key=lambda path: path.relative_to(root).parts)
    assert bool(found.left_out) is bool(tangle)


def test_what_may_not_be_read_is_an_error() -> None:
    """Half of the images would be read. root may read everything, so that this is tried as somebody else."""
    code = """
        import os, sys
        from ebm_prior.data.images import open_images
        from ebm_prior.errors import DataError
        folder, closed = sys.argv[1:]
        open_images(folder)  # imports what Pillow needs
        if os.geteuid() == 0:
            os.seteuid(65534)
        for place, rights in ((closed, 0o000), (closed, 0o444), (closed + "/000.png", 0o000)):
            own = os.geteuid()
            os.seteuid(os.getuid())
            before = os.stat(place).st_mode
            os.chmod(place, rights)
            os.seteuid(own)
            try:
                open_images(folder)
            except DataError as error:
                print(error)
            os.seteuid(os.getuid())
            os.chmod(place, before)
            os.seteuid(own)
    """
    with tempfile.TemporaryDirectory() as place:  # pytest's own folder is closed to others
        Path(place).chmod(0o755)
        folder = write_pictures(Path(place, "p"), GREY)
        closed = write_pictures(folder / "closed", GREY[:1])
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        command = [sys.executable, "-c", textwrap.dedent(code), str(folder), str(closed)]
        done = subprocess.run(command, capture_output=True, text=True)
        listed, looked, read = done.stdout.splitlines()
        assert listed.startswith(f"{closed}: this folder cannot be listed (Permission denied)"), done.stderr
        assert looked.startswith(f"{closed / '000.png'}: cannot be looked at (Permission denied)")
        assert read.startswith(f"{closed / '000.png'}: cannot be read as an image (PermissionError: Permission denied)")


def test_a_folder_without_pictures_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"")
    link(tmp_path / "b.png", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no images.*left out: 1 links that lead nowhere; 1 files.*\.tif"):
        open_images(tmp_path)


def test_what_lies_beside_the_splits_is_said(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", GREY[:4])
    write_pictures(tmp_path / "test", GREY[4:])
    assert open_images(tmp_path).remarks == ()
    write_pictures(tmp_path / "unlabelled", GREY)
    (tmp_path / "README").write_text("")
    for split in "train", "test":
        assert open_images(tmp_path, split=split).remarks == (  # type: ignore[arg-type]
            f"left out: 2 beside {split}/ (README, unlabelled)",
        )


def test_test_images_that_are_training_images_are_said(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", GREY[:4])
    write_pictures(tmp_path / "test", GREY[4:])
    os.link(tmp_path / "train" / "000.png", tmp_path / "test" / "hard.png")
    link(tmp_path / "test" / "soft.png", tmp_path / "train" / "001.png")
    assert open_images(tmp_path, split="test").remarks == (
        f"not held out: 2 of 4 images are the same files as in {tmp_path / 'train'}",
    )
    assert open_images(tmp_path).remarks == ()


def test_classes_are_sorted_by_name_as_torchvision_sorts_them(tmp_path: Path) -> None:
    for name in ("b", "10", "2", "B", "a b", "é"):
        write_pictures(tmp_path / name, GREY[:2])
    labels = open_images(tmp_path).labels
    assert labels is not None
    assert sorted(["b", "10", "2", "B", "a b", "é"]) == ["10", "2", "B", "a b", "b", "é"]
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [path.parent.name for path in find_pictures(tmp_path).paths[::2]] == ["10", "2", "B", "a b", "b", "é"]


def test_the_other_arrays_of_an_archive_are_said(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", images=GREY, labels=LABELS, means=GREY, ids=LABELS)
    assert open_images(path).remarks == ("left out: 2 other arrays of the file (means, ids)",)
    both = write_npz(tmp_path / "b.npz", x_train=GREY, y_train=LABELS, x_test=GREY, y_test=LABELS)
    assert open_images(both).remarks == ()


# Files of other kinds in place of data.


@pytest.mark.parametrize(
    "name", ["a.npy", "a.npz", "a.mat", "a.mdb", "some-images-idx3-ubyte", "a-idx3.gz", "a", "a.png"]
)
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_a_special_file_as_data_is_refused_at_once(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    {
        "pipe": lambda: os.mkfifo(path),
        "socket": lambda: a_socket(path),
        "device": lambda: path.symlink_to("/dev/zero"),
    }[kind]()
    with pytest.raises(DataError, match=f"expected a .*regular file, found a .*{kind}") as caught:
        open_images(path)
    assert str(path) in str(caught.value)


def test_a_pipe_under_a_data_sets_name_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mnist.npz")
    os.mkfifo(tmp_path / "train_32x32.mat")
    for name in "mnist", "svhn":
        with pytest.raises(DataError, match="found a named pipe"):
            open_images(name, data_root=tmp_path)
    write_idx(tmp_path / "some-images-idx3-ubyte", GREY)
    os.mkfifo(tmp_path / "some-labels-idx1-ubyte")
    assert open_images(tmp_path / "some-images-idx3-ubyte").labels is None


def test_a_picture_that_became_a_pipe_is_refused(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "p", GREY)
    source = open_images(folder)
    (folder / "002.png").unlink()
    os.mkfifo(folder / "002.png")
    for act in (lambda: source.batch([2]), source.fingerprint):
        with pytest.raises(DataError, match=r"002.png: .*found a named pipe"):
            act()


@pytest.mark.parametrize("empty", ["", " ", "\t"])
def test_an_empty_string_is_not_the_current_folder(empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_pictures(tmp_path / "p", GREY))
    with pytest.raises(ConfigurationError, match=r"--data: .*found an empty string"):
        open_images(empty)
    with pytest.raises(ConfigurationError, match=r"--data-root .*found an empty string"):
        open_images("mnist", data_root=empty)
    assert len(open_images(".")) == 6


def test_links_as_data(tmp_path: Path) -> None:
    path = write_npy(tmp_path / "a.npy", GREY)
    link(tmp_path / "good.npy", path)
    link(tmp_path / "broken.npy", tmp_path / "nowhere")
    link(tmp_path / "self.npy", tmp_path / "self.npy")
    assert len(open_images(tmp_path / "good.npy")) == 6
    for name in "broken", "self":
        with pytest.raises(DataError, match="a link that leads nowhere"):
            open_images(tmp_path / f"{name}.npy")
    with pytest.raises(DataError, match="no such file or folder"):
        open_images(str(tmp_path / "null\0character"))
    assert np.array_equal(np.load(path), GREY)
