"""Pictures for people: grids of images under titles, as PNG."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ebm_prior.errors import ConfigurationError
from ebm_prior.storage.atomic import write_atomically

_GAP, _MARGIN = 2, 20  # pixels between images; around the page and between panels
_READABLE = 64  # pixels: smaller images are enlarged to at least this
_TITLE_SIZE, _CAPTION_SIZE = 18, 14
_INK, _CAPTION_INK, _PAPER = (25, 25, 25), (95, 95, 95), (255, 255, 255)
_SPELLED = {
    "→": "->",
    "×": "x",
    "‖": "||",
    "−": "-",
    "–": "-",
    "—": "-",
    "½": "1/2",
    "²": "^2",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
}
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def grid(images: Tensor, *, columns: int, scale: int | None = None) -> Image.Image:
    """Images (N, C, H, W) in [0, 1], or of `in_bytes`, C = 1 or 3, row by row on white.

    A pixel value v becomes round(255·v) in every image. Contrast is never stretched per image, because that makes faint
    samples look strong, hides a shift of brightness, and shows another picture than the one that was scored. `scale`
    enlarges by nearest neighbour, so that every pixel stays visible; by default small images get at least 64 pixels.

    Raises ConfigurationError for another shape, NaN, or values outside [0, 1].
    """
    pixels = _pixels(images)
    if columns < 1 or (scale is not None and scale < 1):
        raise ConfigurationError(f"columns and scale: expected 1 or more, found {columns} and {scale}")
    count, height, width, _ = pixels.shape
    scale = scale or max(1, math.ceil(_READABLE / max(height, width)))
    columns, rows = min(columns, count), math.ceil(count / columns)
    step_x, step_y = width * scale + _GAP, height * scale + _GAP
    page = Image.new("RGB", (columns * step_x - _GAP, rows * step_y - _GAP), _PAPER)
    for index, image in enumerate(pixels):
        cell = Image.fromarray(image.numpy()).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        page.paste(cell, (index % columns * step_x, index // columns * step_y))
    return page


def titled_grids(
    panels: Sequence[tuple[str, Tensor]],
    *,
    columns: int,
    scale: int | None = None,
    caption: str | Sequence[str] = (),
) -> Image.Image:
    """Grids side by side, each under its title, for comparison; caption lines below.

    panels: (title, images (N, C, H, W) in [0, 1]), each drawn by `grid`. Titles and captions are wrapped, and spelled
    in ASCII where the font has no sign (δ becomes delta).
    Raises ConfigurationError if there is nothing to draw, and as `grid` does.
    """
    if not panels:
        raise ConfigurationError("panels: expected one or more (title, images), found none")
    title_font, caption_font = ImageFont.load_default(_TITLE_SIZE), ImageFont.load_default(_CAPTION_SIZE)
    grids = [grid(images, columns=columns, scale=scale) for _, images in panels]
    titles = [wrap(title, title_font, picture.width) for (title, _), picture in zip(panels, grids, strict=True)]
    # A word longer than the grid is not broken: the panel becomes as wide as the word.
    widths = [
        max(picture.width, *(math.ceil(title_font.getlength(line)) for line in lines))
        for picture, lines in zip(grids, titles, strict=True)
    ]
    page_width = sum(widths) + _MARGIN * (len(grids) + 1)
    paragraphs = [caption] if isinstance(caption, str) else caption
    captions = [line for text in paragraphs if text for line in wrap(text, caption_font, page_width - 2 * _MARGIN)]
    page_width = max([page_width, *(math.ceil(caption_font.getlength(line)) + 2 * _MARGIN for line in captions)])

    title_step, caption_step = round(1.3 * _TITLE_SIZE), round(1.4 * _CAPTION_SIZE)
    grids_top = _MARGIN + max(map(len, titles)) * title_step + _MARGIN // 4
    grids_bottom = grids_top + max(picture.height for picture in grids)
    caption_top = grids_bottom + _MARGIN * 3 // 4
    page_height = (caption_top + len(captions) * caption_step if captions else grids_bottom) + _MARGIN
    page = Image.new("RGB", (page_width, page_height), _PAPER)
    pen = ImageDraw.Draw(page)
    left = _MARGIN
    for picture, lines, width in zip(grids, titles, widths, strict=True):
        for row, line in enumerate(reversed(lines)):  # titles stand on their grid, whatever their number of lines
            pen.text((left, grids_top - _MARGIN // 4 - (row + 1) * title_step), line, _INK, title_font)
        page.paste(picture, (left, grids_top))
        left += width + _MARGIN
    for row, line in enumerate(captions):
        pen.text((_MARGIN, caption_top + row * caption_step), line, _CAPTION_INK, caption_font)
    return page


def picture(image: Tensor) -> Image.Image:
    """One image (C, H, W) as `grid` takes them, as it is: mode L for C = 1, RGB for C = 3. Raises as `grid` does."""
    pixels = _pixels(image[None])[0].numpy()
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0]) if len(image) == 1 else pixels)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically; a file of that name is replaced. Raises OutputError where that cannot be done."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def in_bytes(images: Tensor) -> Tensor:
    """Images (N, C, H, W) in [0, 1] with C = 1 or 3 as uint8 on the CPU: a value v becomes round(255·v).

    Images that are uint8 already stay as they are. Raises ConfigurationError for another shape, NaN, or values outside
    [0, 1].
    """
    known = images.is_floating_point() or images.dtype == torch.uint8
    if images.ndim != 4 or not len(images) or images.shape[1] not in (1, 3) or not known:
        raise ConfigurationError(
            f"expected float images (N, C, H, W) with C = 1 or 3, found {images.dtype} of shape {tuple(images.shape)}"
        )
    if images.dtype == torch.uint8:
        return images.cpu()
    images = images.detach().to("cpu", torch.float32)
    low, high = float(images.amin()), float(images.amax())
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # false for NaN; a decoder may be off by rounding
        raise ConfigurationError(f"expected images in [0, 1] without NaN, found values from {low:g} to {high:g}")
    return images.mul(255).round().to(torch.uint8)


def _pixels(images: Tensor) -> Tensor:
    """Images for `grid` as uint8 (N, H, W, 3)."""
    return in_bytes(images).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()


def wrap(text: str, font: _Font, width: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels, at spaces; at least one line."""
    lines: list[str] = []
    for word in spelled(text).split() or [""]:
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def spelled(text: str) -> str:
    """`text` in the characters of Pillow's own font, little more than ASCII: it draws all others as empty boxes."""
    text = "".join(_SPELLED.get(char, char) for char in text)
    spelled = ""
    for char in unicodedata.normalize("NFKD", text):
        if char.isascii() or char == "±":
            spelled += char
        elif unicodedata.name(char, "").startswith("GREEK"):
            spelled += unicodedata.name(char).split()[-1].lower()
        elif not unicodedata.combining(char):
            spelled += "?"
    return spelled


def scatters(
    panels: Sequence[tuple[str, Sequence[tuple[str, Tensor]]]], *, columns: int, side: int = 190
) -> Image.Image:
    """Point clouds, row by row; the panels of a row show one square of the plane, which holds all of their points.

    panels: (title, clouds), each cloud (colour, points (N, 2)), the later ones on top.
    """
    if not panels or columns < 1:
        raise ConfigurationError(f"expected one or more panels and columns, found {len(panels)} and {columns}")
    step_x, step_y = side + _MARGIN, side + 2 * _MARGIN
    rows = math.ceil(len(panels) / columns)
    page = Image.new("RGB", (min(columns, len(panels)) * step_x + _MARGIN, rows * step_y + _MARGIN), _PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(_CAPTION_SIZE)
    for index, (title, clouds) in enumerate(panels):
        if index % columns == 0:
            row = torch.cat([cloud for _, shown in panels[index : index + columns] for _, cloud in shown])
            centre = row.mean(0)
            reach = 1.05 * max(float((row - centre).abs().max()), 1e-6)
        left, top = _MARGIN + index % columns * step_x, _MARGIN + index // columns * step_y + _MARGIN
        pen.text((left, top - _MARGIN), spelled(title), _INK, font)
        pen.rectangle((left, top, left + side, top + side), outline=_CAPTION_INK)
        for colour, points in clouds:
            placed = ((points - centre) * points.new_tensor([1.0, -1.0]) / reach + 1) * side / 2
            for x, y in placed.tolist():
                pen.ellipse((left + x - 1, top + y - 1, left + x + 1, top + y + 1), fill=colour)
    return page
