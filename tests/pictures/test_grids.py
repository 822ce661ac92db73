"""Pictures for people: pixels are shown as they are, text is readable, files are written whole or not at all."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from ebm_prior.errors import ConfigurationError, OutputError
from ebm_prior.pictures import grids
from ebm_prior.pictures.grids import grid, in_bytes, save_png, titled_grids


def image_batch(n: int, channels: int = 3, height: int = 6, width: int = 4) -> torch.Tensor:
    pixels = torch.randint(0, 256, (n, channels, height, width), generator=torch.Generator().manual_seed(n))
    return pixels / 255


def as_array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 3]))
def test_every_pixel_is_in_its_place_unchanged(n: int, columns: int, scale: int, channels: int) -> None:
    images = image_batch(n, channels)
    page = as_array(grid(images, columns=columns, scale=scale))
    width = min(n, columns)
    assert page.shape == (-(-n // width) * (6 * scale + 2) - 2, width * (4 * scale + 2) - 2, 3)
    seen = np.zeros(page.shape[:2], bool)
    for index, image in enumerate(images):
        top, left = index // width * (6 * scale + 2), index % width * (4 * scale + 2)
        place = (slice(top, top + 6 * scale), slice(left, left + 4 * scale))
        expected = (image.expand(3, -1, -1) * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(page[place], expected.repeat(scale, 0).repeat(scale, 1))
        seen[place] = True
    assert (page[~seen] == 255).all()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_one_image_is_written_with_its_own_channels(channels: int, mode: str) -> None:
    image = image_batch(1, channels)[0]
    shown = grids.picture(image)
    assert (shown.mode, shown.size) == (mode, (4, 6))
    assert np.array_equal(as_array(shown).reshape(6, 4, channels), (image * 255).round().byte().permute(1, 2, 0))


def test_a_faint_image_stays_faint() -> None:
    """No contrast stretching: 0.1 to 0.2 is not shown as 0 to 1, whatever else is in the grid."""
    faint = torch.linspace(0.1, 0.2, 16).reshape(1, 1, 4, 4)
    page = as_array(grid(faint, columns=1, scale=1))
    assert (page.min(), page.max()) == (26, 51)


def test_images_in_bytes_make_the_same_grid() -> None:
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(as_array(grid(in_bytes(images), columns=2)), as_array(grid(images, columns=2)))


def test_small_images_are_enlarged_until_a_person_can_see_them() -> None:
    for side, shown in {28: 84, 32: 64, 64: 64, 256: 256, 5: 65}.items():
        assert grid(torch.zeros(1, 1, side, side), columns=1).size == (shown, shown)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 1, 4, 4), r"\(N, C, H, W\)"),
        (torch.zeros(1, 4, 4), r"shape \(1, 4, 4\)"),
        (torch.zeros(1, 2, 4, 4), "C = 1 or 3"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int64), "torch.int64"),
        (torch.zeros(1, 4, 4, dtype=torch.uint8), r"shape \(1, 4, 4\)"),
        (torch.full((1, 1, 4, 4), torch.nan), "without NaN"),
        (torch.full((1, 1, 4, 4), 1.01), "values from 1.01"),
        (torch.full((1, 1, 4, 4), -0.01), "values from -0.01"),
    ],
)
def test_what_is_not_an_image_is_refused(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        grid(images, columns=2)


def test_rounding_beyond_the_interval_does_not_wrap_around() -> None:
    page = as_array(grid(torch.tensor([-5e-5, 1 + 5e-5]).reshape(1, 1, 1, 2), columns=1, scale=1))
    assert page[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("arguments", [{"columns": 0}, {"columns": 2, "scale": 0}])
def test_no_columns_and_no_scale_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="columns and scale"):
        grid(image_batch(2), **arguments)  # type: ignore[arg-type]


def test_panels_stand_side_by_side_on_one_line_and_text_overlaps_nothing() -> None:
    """Drawn once in black and once with blank images: what differs is the images, all else is text or paper."""
    titles = ["Prior", "With the energy-based prior and a long explanation that must wrap"]
    caption = ["FD 55.8 against the test images, N = 2,000, and so on until the line must be wrapped.", "Second line."]
    black, blank = (
        as_array(titled_grids([(t, torch.full((4, 1, 28, 28), v)) for t in titles], columns=2, caption=caption))
        for v in (0.0, 1.0)
    )
    assert black.shape[1] == 2 * 170 + 3 * 20  # text is wrapped to the width of the images
    painted = (black != blank).any(-1)
    rows, columns = painted.any(1).nonzero()[0], painted.any(0).nonzero()[0]
    assert rows[-1] - rows[0] + 1 == 2 * 84 + 2  # both grids at the same height
    assert (np.diff(columns) > 3).sum() == 1  # two panels; images are 2 apart
    text = (blank != 255).any(-1)
    assert text[: rows[0]].any()
    assert text[rows[-1] + 1 :].any()
    assert not text[rows[0] : rows[-1] + 1].any()
    for edge in (black[:12], black[-12:], black[:, :12], black[:, -12:]):
        assert (edge == 255).all()


def test_captions_and_long_words_widen_the_page_rather_than_being_cut() -> None:
    word = "un" * 60
    for page in (
        titled_grids([(word, image_batch(1))], columns=1),
        titled_grids([("", image_batch(1))], columns=1, caption=word),
    ):
        dark = (as_array(page).min(-1) < 128).any(0).nonzero()[0]
        assert page.width > 500
        assert dark[-1] < page.width - 12
    assert titled_grids([("", image_batch(1))], columns=1, caption="").height < page.height


def test_no_panels_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="panels"):
        titled_grids([], columns=1)


def test_text_is_spelled_so_that_the_font_has_every_character() -> None:
    assert grids.spelled("δ = ½, Fréchet, ‖ε‖² ≤ 3 ± 1 → β") == "delta = 1/2, Frechet, ||epsilon||^2 <= 3 ± 1 -> beta"
    font = ImageFont.load_default(18)

    def drawn(char: str) -> bytes:
        page = Image.new("L", (40, 40))
        ImageDraw.Draw(page).text((5, 5), char, 255, font)
        return page.tobytes()

    box = drawn("\uffff")
    characters = [chr(code) for code in range(33, 127)] + ["±"]
    assert [char for char in characters if drawn(char) == box] == []
    assert grids.spelled("图") == "?"


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "samples.png"
    path.write_text("old")
    picture = grid(image_batch(5), columns=3)
    save_png(picture, path)
    assert np.array_equal(as_array(Image.open(path)), as_array(picture))
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "samples.png"
    save_png(grid(image_batch(1), columns=1), path)
    before = path.read_bytes()

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OutputError, match=f"{re.escape(str(path))}.*No space left"):
        save_png(grid(image_batch(2), columns=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["file/a.png", "folder"])
def test_unwritable_places_are_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write") as caught:
        save_png(grid(image_batch(1), columns=1), tmp_path / place)
    assert str(tmp_path / place) in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]
