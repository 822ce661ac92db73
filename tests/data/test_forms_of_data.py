"""Forms of data that people have: LMDB, archives of several arrays, SVHN, any channels, dictionaries; free memory."""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_writers import COLOUR, GREY, LABELS, Items, everything, write_idx, write_npy, write_npz, write_pictures
from PIL import Image
from torch.utils.data import TensorDataset

from ebm_prior.data import arrays
from ebm_prior.data.images import from_array, from_dataset, open_images
from ebm_prior.errors import ConfigurationError, DataError, MemoryLimitError

SQUARE = np.random.default_rng(5).integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **({"lossless": True} if form == "WEBP" else {}))
    return buffer.getvalue()


def write_lmdb(path: Path, values: dict[str, bytes], **how: Any) -> Path:
    lmdb = pytest.importorskip("lmdb")
    path.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=2**24, **how) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)
    return path


# LMDB.


@pytest.mark.parametrize("form", ["pixels", "PNG", "WEBP"])
def test_an_lmdb_as_nvaes_recipes_write_it(form: str, tmp_path: Path) -> None:
    """Twelve images: "10" comes after "9", not after "1"."""
    values = {str(i): x.tobytes() if form == "pixels" else encoded(x, form) for i, x in enumerate(SQUARE)}
    source = open_images(write_lmdb(tmp_path / "train.lmdb", values))
    expected = from_array(SQUARE)
    assert (source.shape, len(source), source.labels) == ((3, 6, 6), 12, None)
    assert torch.equal(everything(source), everything(expected))
    assert torch.equal(source.subset([11, 2]).batch([0, 1]), expected.batch([11, 2]))
    again = open_images(tmp_path / "train.lmdb")
    assert source.fingerprint() == again.fingerprint() != source.subset(range(11)).fingerprint()
    assert torch.equal(pickle.loads(pickle.dumps(source)).batch([3]), expected.batch([3]))


def test_jpeg_values_are_read(tmp_path: Path) -> None:
    source = open_images(write_lmdb(tmp_path / "a.lmdb", {"0": encoded(np.full((6, 6, 3), 99, np.uint8), "JPEG")}))
    torch.testing.assert_close(source.batch([0]), torch.full((1, 3, 6, 6), 99 / 255), atol=0.02, rtol=0)


def test_the_split_chooses_among_lmdbs(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "train.lmdb", {str(i): x.tobytes() for i, x in enumerate(SQUARE[:8])})
    with pytest.raises(DataError, match=r"no LMDB of the test split \(test.lmdb or validation.lmdb"):
        open_images(tmp_path, split="test")
    write_lmdb(tmp_path / "validation.lmdb", {str(i): x.tobytes() for i, x in enumerate(SQUARE[8:])})
    assert torch.equal(everything(open_images(tmp_path)), everything(from_array(SQUARE[:8])))
    assert torch.equal(everything(open_images(tmp_path, split="test")), everything(from_array(SQUARE[8:])))


def test_one_file_and_other_keys(tmp_path: Path) -> None:
    values = {f"{letter}{number}": encoded(SQUARE[number]) for number, letter in enumerate("cab")}
    source = open_images(write_lmdb(tmp_path / "a.lmdb", values, subdir=False))
    assert torch.equal(everything(source), everything(from_array(SQUARE[[1, 2, 0]])))


def test_pixels_of_other_shapes_and_colours(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "a", {str(i): x.tobytes() for i, x in enumerate(GREY)})
    assert torch.equal(everything(open_images(path, image_shape=(1, 5, 4))), everything(from_array(GREY)))
    both = open_images(path, image_shape=(3, 5, 4), mode="rgb")
    assert torch.equal(everything(both), everything(from_array(GREY)).expand(-1, 3, -1, -1))
    with pytest.raises(DataError, match=r"expected images of shape \(1, 5, 4\).*found \(3, 5, 4\)"):
        open_images(path, image_shape=(1, 5, 4), mode="rgb")
    five = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    path = write_lmdb(tmp_path / "b", {str(i): x.tobytes() for i, x in enumerate(five)})
    source = open_images(path, image_shape=(5, 3, 4))
    assert torch.equal(everything(source), torch.from_numpy(five).permute(0, 3, 1, 2) / 255)
    with pytest.raises(DataError, match=r"found 60 bytes"):
        open_images(path, image_shape=(5, 3, 4), mode="grey")
    with pytest.raises(DataError, match=r"expected images of 1 or 3 channels.*found \(5, 3, 4\)"):
        source.recoloured("grey")


MISTAKES: dict[str, tuple[dict[str, bytes], str]] = {
    "empty": ({}, "the LMDB is empty"),
    "a number lacks": ({"0": bytes(108), "2": bytes(108)}, "expected the keys 0 to 1, found none for 1"),
    "a pickle": ({"0": pickle.dumps(SQUARE[0])}, r"\[0\]: .*found a pickled object, which is never opened"),
    "no square": ({"0": bytes(107)}, r"\[0\]: expected a picture .* or bytes of a square RGB image .*found 107 bytes"),
    "an empty value": ({"0": b"", "1": bytes(108)}, r"\[0\]: .*found 0 bytes"),
    "another length": ({"0": bytes(108), "1": bytes(12)}, r"\[1\]: expected 108 bytes of pixels.*\(1 of 2 such\)"),
    "a damaged picture": ({"0": encoded(SQUARE[0]), "1": b"\x89PNG\r\n\x1a\n"}, r"\[1\]: cannot be read as an image"),
    "pixels among pictures": ({"0": encoded(SQUARE[0]), "1": bytes(108)}, r"\[1\]: cannot be read as an image"),
    "mixed sizes": ({"0": encoded(SQUARE[0]), "1": encoded(COLOUR[0])}, r"\[1\]: the images are of mixed sizes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_an_lmdb_name_the_key(mistake: str, tmp_path: Path) -> None:
    values, message = MISTAKES[mistake]
    path = write_lmdb(tmp_path / "a.lmdb", values)
    with pytest.raises(DataError, match=message) as caught:
        open_images(path)
    assert str(path) in str(caught.value)


def test_an_lmdb_of_another_shape_than_the_backbones(tmp_path: Path) -> None:
    for name, value in (("raw", SQUARE[0].tobytes()), ("encoded", encoded(SQUARE[0]))):
        path = write_lmdb(tmp_path / name, {"0": value})
        with pytest.raises(DataError, match=r"\[0\]: expected .*\(3, 4, 4\) \(channels, height, width\).*found"):
            open_images(path, image_shape=(3, 4, 4))


def test_damaged_lmdbs_are_refused(tmp_path: Path) -> None:
    """liblmdb would read past the end of a truncated file, which kills the process."""
    path = write_lmdb(tmp_path / "a.lmdb", {str(i): bytes(9000) for i in range(50)}, subdir=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"header promises \d+ bytes, found \d+; is the copy complete"):
        open_images(path)
    path.write_bytes(bytes(100_000))
    with pytest.raises(DataError, match="cannot be read as an LMDB"):
        open_images(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.lmdb: "):
        open_images(path)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lmdb(tmp_path / "a.lmdb", {"0": SQUARE[0].tobytes()})
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ConfigurationError, match=r"needs lmdb; pip install lmdb$"):
        open_images(path)
    assert len(open_images(write_npy(tmp_path / "a.npy", GREY))) == 6


# Archives of several arrays.


def test_one_of_several_arrays(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", x_valid=GREY[:4], y_valid=LABELS[:4], x_train=GREY, seeds=LABELS)
    for source in open_images(path, array="x_valid"), open_images(f"{path}:x_valid"):
        assert source.name == f"{path}:x_valid"
        assert torch.equal(everything(source), everything(from_array(GREY[:4])))
        assert source.labels is not None
        assert source.labels.tolist() == LABELS[:4].tolist()
    with pytest.raises(
        DataError, match="expected the array 'nothing', found the keys x_valid, y_valid, x_train, seeds"
    ):
        open_images(path, array="nothing")
    with pytest.raises(ConfigurationError, match="names the array x_valid"):
        open_images(f"{path}:x_valid", array="x_train")
    unclear = write_npz(tmp_path / "b.npz", day=GREY, night=GREY)
    with pytest.raises(DataError, match=r"found the keys day, night; choose one with --array KEY"):
        open_images(unclear)
    many = write_npz(tmp_path / "c.npz", **{f"day{number}": GREY for number in range(50)})
    with pytest.raises(DataError, match=r"found the keys day0, .*, day9 and 40 more; choose one with --array KEY"):
        open_images(many)


def test_an_array_of_what_has_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one array, without a name"):
        open_images(write_npy(tmp_path / "a.npy", GREY), array="x")
    for spec in (write_pictures(tmp_path / "p", GREY), "mnist", write_idx(tmp_path / "a-idx3-ubyte", GREY)):
        with pytest.raises(ConfigurationError, match="--array"):
            open_images(spec, array="x")


def test_modes_of_arrays(tmp_path: Path) -> None:
    grey, colour = write_npy(tmp_path / "g.npy", GREY), write_npy(tmp_path / "c.npy", COLOUR / 255)
    assert open_images(grey, mode="grey").shape == (1, 5, 4)
    raised = open_images(grey, mode="rgb", image_shape=(3, 5, 4))
    assert torch.equal(everything(raised), everything(from_array(GREY)).expand(-1, 3, -1, -1))
    assert raised.fingerprint() != open_images(grey).fingerprint()
    flat = everything(open_images(colour, mode="grey"))
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close(flat, (everything(open_images(colour)) * weights).sum(1, keepdim=True))
    assert torch.equal(raised.subset([2, 1]).batch([1]), raised.batch([1]))
    with pytest.raises(ConfigurationError, match="'rgb' or 'grey', found 'RGB'"):
        open_images(grey, mode="RGB")  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [2, 4, 5, 12])
def test_any_number_of_channels_for_a_backbone_that_has_it(channels: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).random((3, channels, 6, 7)).astype(np.float32)
    shape = (channels, 6, 7)
    for array in (pixels, pixels.transpose(0, 2, 3, 1)):
        path = write_npy(tmp_path / "a.npy", array)
        assert torch.equal(everything(open_images(path, image_shape=shape)), torch.from_numpy(pixels))
        dataset = TensorDataset(torch.from_numpy(np.ascontiguousarray(array)))
        for lazy in False, True:
            source = from_dataset(dataset, image_shape=shape, lazy=lazy)
            assert torch.equal(everything(source), torch.from_numpy(pixels))
        with pytest.raises(DataError, match=r"C = 1 or 3, found .*image_shape= allows other"):
            open_images(path)


# SVHN.


def test_svhn_as_people_have_it(tmp_path: Path) -> None:
    from scipy.io import savemat

    for name in "train_32x32.mat", "own.mat":
        savemat(tmp_path / name, {"X": COLOUR.transpose(1, 2, 3, 0), "y": np.array([[10, 1, 2, 10, 9, 3]]).T})
    for source in open_images(tmp_path / "own.mat"), open_images("svhn", data_root=tmp_path):
        assert torch.equal(everything(source), everything(from_array(COLOUR)))
        assert source.labels is not None
        assert source.labels.tolist() == [0, 1, 2, 0, 9, 3]
    for variables, found in (({"Y": GREY}, "Y .uint8"), ({"X": COLOUR / 255}, "X .double"), ({"X": GREY}, "X .uint8")):
        savemat(tmp_path / "other.mat", variables)
        with pytest.raises(DataError, match=rf"expected X \(height, width, channels, N\).*found {found}"):
            open_images(tmp_path / "other.mat")
    (tmp_path / "own.mat").write_bytes((tmp_path / "own.mat").read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read as a MATLAB file"):
        open_images(tmp_path / "own.mat")


# Data sets of others.


class HuggingFace(Items):
    """What `datasets.Dataset` offers: rows by number, columns by name."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.column_names = list(rows[0])
        self.read: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return [row[index] for row in self.items]
        self.read.append(index)
        return self.items[index]


def rows(key: str = "image", label: str = "label") -> list[dict[str, Any]]:
    return [{key: Image.fromarray(x), label: int(y), "id": "a"} for x, y in zip(COLOUR, LABELS, strict=True)]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("key", "label"), [("image", "label"), ("img", "labels"), ("pixel_values", "label")])
def test_dictionaries_as_hugging_face_gives_them(key: str, label: str, lazy: bool) -> None:
    source = from_dataset(HuggingFace(rows(key, label)), lazy=lazy)
    assert torch.equal(everything(source), everything(from_array(COLOUR)))
    assert source.labels is not None
    assert source.labels.tolist() == LABELS.tolist()
    assert source.fingerprint() == from_array(COLOUR).fingerprint()


def test_other_dictionaries() -> None:
    def read(*items: dict[str, Any]) -> torch.Tensor:
        return everything(from_dataset(Items(list(items))))

    expected = everything(from_array(COLOUR[:1]))
    assert torch.equal(read({"photo": Image.fromarray(COLOUR[0]), "n": 3, "text": "x"}), expected)
    assert torch.equal(read({"image": {"bytes": encoded(COLOUR[0]), "path": None}}), expected)
    assert torch.equal(read({"image": torch.from_numpy(COLOUR[0]).permute(2, 0, 1) / 255}), expected)
    with pytest.raises(DataError, match=r"dataset\[0\]: .*found the keys 'a', 'b'; rename"):
        read({"a": COLOUR[0], "b": COLOUR[0]})
    with pytest.raises(DataError, match=r"dataset\[0\]: cannot be read as an image"):
        read({"image": {"bytes": b"nothing", "path": None}})


def test_a_lazy_source_reads_what_is_asked_for() -> None:
    data = HuggingFace(rows())
    source = from_dataset(data, lazy=True, name="faces")
    data.read.clear()
    source.batch([4, 1])
    assert data.read == [4, 1]
    assert source.remarks == ()


class Listed(Items):
    targets = LABELS.tolist()


def test_labels_of_a_lazy_source_are_those_that_are_listed() -> None:
    pairs = [(x, int(y)) for x, y in zip(GREY, LABELS, strict=True)]
    labels = from_dataset(Listed(pairs), lazy=True).labels
    assert labels is not None
    assert labels.tolist() == LABELS.tolist()
    unlisted = from_dataset(Items(pairs), lazy=True)
    assert unlisted.labels is None
    assert "lists no labels" in unlisted.remarks[0]


def test_a_lazy_source_must_not_change() -> None:
    class Noisy(Items):
        def __getitem__(self, index: int) -> Any:
            return np.random.default_rng().random((5, 4)).astype(np.float32)

    with pytest.raises(DataError, match=r"dataset\[0\]: expected the same image at every read"):
        from_dataset(Noisy([0] * 3), lazy=True)
    frozen = from_dataset(Noisy([0] * 3))
    assert torch.equal(frozen.batch([1]), frozen.batch([1]))


def test_mistakes_of_a_lazy_source_name_the_image() -> None:
    images = [GREY[0] / 255, GREY[1] / 255, *[GREY[0] / 255] * 20]
    images[15] = np.full((5, 4), np.nan)
    images[16] = np.zeros((4, 5))
    source = from_dataset(Items(images), name="mine", lazy=True)
    with pytest.raises(DataError, match=r"mine: .*NaN or infinite values in image 15 "):
        source.batch([3, 15])
    with pytest.raises(DataError, match=r"mine\[16\]: expected images of shape \(1, 5, 4\).*found \(1, 4, 5\)"):
        source.batch([16])


# Free memory.


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "free_bytes", lambda device: 100_000)


def zeros(count: int, *shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.zeros((count, *shape), dtype)


@pytest.mark.usefixtures("little_memory")
def test_what_does_not_fit_in_memory_is_refused_before_it_is_inflated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scipy.io import savemat

    np.savez_compressed(tmp_path / "a.npz", images=zeros(200, 32, 32))
    np.savez_compressed(tmp_path / "labels.npz", images=zeros(2, 32, 32), labels=zeros(200_000))
    np.savez_compressed(tmp_path / "channels last.npz", images=zeros(20, 32, 32, 3))  # 61 kB, and as much as a copy
    np.savez_compressed(tmp_path / "doubles.npz", images=zeros(10, 32, 32, dtype=np.float64))
    write_npy(tmp_path / "a.npy", zeros(200, 32, 32))
    write_idx(tmp_path / "a-idx3-ubyte.gz", zeros(200, 32, 32))
    write_idx(tmp_path / "a-idx3-ubyte", zeros(200, 32, 32))
    savemat(tmp_path / "a.mat", {"X": zeros(32, 32, 3, 50)}, do_compression=True)
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", None)
    monkeypatch.setattr(np.lib.format, "read_array", None)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(MemoryLimitError, match=r"GiB where .* GiB are free; free some memory") as caught:
            open_images(path)
        assert str(path) in str(caught.value)
    with pytest.raises(MemoryLimitError, match="lazy=True"):
        from_dataset(Items([zeros(100, 100)] * 20))
    assert len(from_dataset(Items([zeros(100, 100)] * 20), lazy=True)) == 20


@pytest.mark.usefixtures("little_memory")
def test_what_fits_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x_train=zeros(50, 32, 32), x_test=zeros(90, 32, 32), more=zeros(99, 32, 32))
    assert len(open_images(tmp_path / "a.npz")) == 50
    assert len(open_images(write_npy(tmp_path / "a.npy", zeros(90, 32, 32)))) == 90


def test_unknown_free_memory_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "free_bytes", lambda device: None)
    assert len(open_images(write_npy(tmp_path / "a.npy", zeros(90, 32, 32)))) == 90


@pytest.mark.parametrize("promised", [(1 << 40, 28, 28), (5, 28, 28), (3, 28, 28), (-4, 28, 28), (4, 28)])
@pytest.mark.parametrize("packed", [True, False])
def test_headers_that_lie_are_refused(promised: tuple[int, ...], packed: bool, tmp_path: Path) -> None:
    """The array holds (4, 28, 28)."""
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": promised}
    np.lib.format.write_array_header_1_0(buffer, header)
    buffer.write(bytes(4 * 28 * 28))
    path = tmp_path / ("a.npz" if packed else "a.npy")
    if packed:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", buffer.getvalue())
    else:
        path.write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=rf"{path}: cannot be read as a numpy array file.*header of .* promises"):
        open_images(path)


def test_an_archive_whose_directory_lies_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=zeros(100, 32, 32))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    place = content.rindex(b"PK\x01\x02") + 24  # the size of the member in the central directory
    for size in 1000, 102_400, 2**31:
        content[place : place + 4] = size.to_bytes(4, "little")
        (tmp_path / "b.npz").write_bytes(content)
        with pytest.raises((DataError, MemoryLimitError), match=r"b\.npz"):
            open_images(tmp_path / "b.npz")
