"""Pages of pictures for people: images in titled rows and columns, plots put together over a caption, their files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ebm_prior.errors import ConfigurationError
from ebm_prior.pictures.grids import grid, save_png, wrap
from ebm_prior.storage.atomic import write_atomically

_GAP, _MARGIN = 2, 20
_TITLE, _TEXT = 18, 14
_INK, _SOFT, _PAPER = (25, 25, 25), (95, 95, 95), (255, 255, 255)


def matrix(rows: Sequence[tuple[str, Tensor]], columns: Sequence[str] = ()) -> Image.Image:
    """Images in titled rows (title, (N, C, H, W) in [0, 1]), one image per column, under the titles of the columns.

    Raises ConfigurationError for rows of unequal length or another number of titles, and as `grids.grid` does.
    """
    counts = {len(images) for _, images in rows}
    if len(counts) != 1 or counts == {0} or (columns and {len(columns)} != counts):
        raise ConfigurationError(
            f"expected rows of equally many images, one per column title; found {sorted(counts)} and {len(columns)} "
            "titles"
        )
    count = counts.pop()
    font = ImageFont.load_default(_TEXT)
    strips = [[grid(image[None], columns=1) for image in images] for _, images in rows]
    cell = strips[0][0]
    heads = [wrap(title, font, cell.width - 4) for title in columns]
    longest = max((font.getlength(line) for lines in heads for line in lines), default=0)
    step_x, step_y = max(cell.width + _GAP, math.ceil(longest) + 8), cell.height + _GAP  # long names are not cut
    names = [wrap(title, font, 150) for title, _ in rows]
    left = max(math.ceil(font.getlength(line)) for lines in names for line in lines) + 10
    line_height = round(1.25 * _TEXT)
    top = line_height * max(map(len, heads), default=0) + 6
    page = Image.new("RGB", (left + step_x * count - _GAP, top + step_y * len(rows) - _GAP), _PAPER)
    pen = ImageDraw.Draw(page)
    for column, lines in enumerate(heads):
        for row, line in enumerate(reversed(lines)):  # titles stand on their column, whatever their number of lines
            place = (left + column * step_x + step_x // 2, top - 6 - row * line_height)
            pen.text(place, line, _INK, font, anchor="ms")
    for row, (lines, strip) in enumerate(zip(names, strips, strict=True)):
        for column, image in enumerate(strip):
            page.paste(image, (left + column * step_x + (step_x - _GAP - cell.width) // 2, top + row * step_y))
        middle = top + row * step_y + cell.height // 2 - (len(lines) - 1) * line_height // 2
        for index, line in enumerate(lines):
            pen.text((left - 8, middle + index * line_height), line, _INK, font, anchor="rm")
    return page


def page(title: str, rows: Sequence[Sequence[Image.Image]], caption: str | Sequence[str] = ()) -> Image.Image:
    """Pictures in rows, under a title and over caption lines, which say what is seen and how it was made."""
    width = max(sum(cell.width for cell in row) + _MARGIN * (len(row) - 1) for row in rows)
    width = max(width, 480)
    title_font, font = ImageFont.load_default(_TITLE), ImageFont.load_default(_TEXT)
    titles = wrap(title, title_font, width)
    paragraphs = [caption] if isinstance(caption, str) else caption
    lines = [line for text in paragraphs if text for line in wrap(text, font, width)]
    heights = [max(cell.height for cell in row) for row in rows]
    title_step, step = round(1.3 * _TITLE), round(1.4 * _TEXT)
    height = 2 * _MARGIN + title_step * len(titles) + 8 + sum(heights) + _MARGIN * (len(rows) - 1)
    height += (_MARGIN // 2 + step * len(lines)) if lines else 0
    sheet = Image.new("RGB", (width + 2 * _MARGIN, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, line in enumerate(titles):
        pen.text((_MARGIN, _MARGIN + index * title_step), line, _INK, title_font)
    top = _MARGIN + title_step * len(titles) + 8
    for row, row_height in zip(rows, heights, strict=True):
        left = _MARGIN
        for cell in row:
            sheet.paste(cell, (left, top))
            left += cell.width + _MARGIN
        top += row_height + _MARGIN
    top -= _MARGIN // 2
    for index, line in enumerate(lines):
        pen.text((_MARGIN, top + index * step), line, _SOFT, font)
    return sheet


def save_page(image: Image.Image, arrays: Mapping[str, NDArray[Any]], out: Path) -> list[Path]:
    """Write a page as PNG to `out` and, beside it as .npz, the arrays behind it; returns both paths."""
    beside = save_arrays(arrays, out)
    save_png(image, out)
    return [out, beside]


def save_arrays(arrays: Mapping[str, NDArray[Any]], out: Path) -> Path:
    """Write the arrays behind a picture `out` beside it, as .npz; returns where."""
    beside = out.with_suffix(".npz")
    buffer = BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(beside, buffer.getvalue())
    return beside
