"""Pages: images land in their row and column, and everything has its title."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ebm_prior.errors import ConfigurationError
from ebm_prior.pictures.sheets import matrix, page


def test_images_lie_in_their_row_and_column() -> None:
    values = (torch.arange(6).reshape(2, 3) * 25 + 50) / 255
    rows = [(f"row {i}", values[i].reshape(3, 1, 1, 1).expand(3, 1, 32, 32)) for i in range(2)]
    grey = np.asarray(matrix(rows, ["a", "b", "c"]).convert("L"), dtype=int)
    centres = []
    for value in values.flatten():
        y, x = np.nonzero(grey == round(255 * float(value)))
        assert len(y) >= 64 * 64  # enlarged to a readable size; text may have such a grey, too
        centres.append((np.median(x), np.median(y)))
    x, y = np.array(centres).reshape(2, 3, 2).transpose(2, 0, 1)
    assert (np.diff(x, axis=1) > 60).all()
    assert (np.diff(y, axis=0) > 60).all()
    np.testing.assert_allclose(np.diff(x, axis=0), 0, atol=1)


def test_titles_take_room_of_their_own() -> None:
    images = torch.zeros(2, 1, 8, 8)
    bare = matrix([("", images)])
    titled = matrix([("a row", images)], ["step 0", "step 1"])
    assert titled.width > bare.width
    assert titled.height > bare.height
    picture = Image.new("RGB", (600, 100), "red")
    sheet = page("title", [[picture], [picture, picture]], ["A caption of many words. " * 20])
    assert sheet.width >= 1200
    red = (np.asarray(sheet) == (255, 0, 0)).all(2).sum()
    assert red == 3 * 600 * 100  # nothing is cut, nothing overlaps
    assert sheet.height > 260


def test_rows_must_be_of_one_length() -> None:
    with pytest.raises(ConfigurationError, match="equally many"):
        matrix([("a", torch.zeros(2, 1, 8, 8)), ("b", torch.zeros(3, 1, 8, 8))])
    with pytest.raises(ConfigurationError, match="1 titles"):
        matrix([("a", torch.zeros(2, 1, 8, 8))], ["one"])


def test_long_titles_do_not_run_into_each_other() -> None:
    """A column is as wide as the longest word of its titles; its images stay as they are, in its middle."""
    images = torch.ones(3, 1, 64, 64) * 0.5
    name = "a-group-with-a-long-name"
    grey = np.asarray(matrix([("row", images)], [name, name, name]).convert("L"), dtype=int)
    dark = (grey < 120).any(0)  # the title alone is so dark
    columns = np.flatnonzero((grey == 128).sum(0) >= 64)
    assert len(columns) == 3 * 64
    gaps = np.flatnonzero(np.diff(columns) > 1)
    assert len(gaps) == 2
    for gap in gaps:  # there is white between neighbouring titles
        assert not dark[columns[gap] + 1 : columns[gap + 1]].all()
