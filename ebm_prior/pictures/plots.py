"""Plots for people: lines, points and histograms between axes with titles, ticks and units.

Drawn with Pillow, as all pictures here are: lines at `_OVERSAMPLING` times the size, then reduced, which makes them
smooth; text at its own size, which keeps it sharp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ebm_prior.errors import ConfigurationError
from ebm_prior.pictures.grids import spelled, wrap

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#17becf", "#7f7f7f")
_OVERSAMPLING = 3
_MOST_LARGE_POINTS = 20  # points of a longer series are drawn small
_TITLE, _LABEL, _TICK = 17, 14, 12  # font sizes
_INK, _GRID, _PAPER = (40, 40, 40), (226, 226, 226), (255, 255, 255)

Range = tuple[float, float]
Array = NDArray[np.float64]


class Series(NamedTuple):
    """One set of data: x and y (N,), as a line, as points, or as an area down to 0."""

    label: str  # in the legend; "" is not listed
    x: ArrayLike
    y: ArrayLike
    kind: Literal["line", "points", "area"] = "line"
    colour: str = COLOURS[0]
    opacity: float = 1.0


def plot(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    size: tuple[int, int] = (480, 340),
    x_range: Range | None = None,
    y_range: Range | None = None,
) -> Image.Image:
    """Series between axes. Labels say the unit. Data that are not finite, or outside a range given, are not drawn.

    Raises ConfigurationError where there is nothing finite to draw.
    """
    data = [_finite(entry) for entry in series]
    if not sum(len(x) for x, _ in data):
        raise ConfigurationError(f"{title}: expected finite data to plot, found none")
    x_range = x_range or _around([x for x, _ in data], zero=False)
    y_range = y_range or _around([y for _, y in data], zero=any(entry.kind == "area" for entry in series))
    x_ticks, y_ticks = ticks(*x_range), ticks(*y_range)
    fonts = {points: ImageFont.load_default(points) for points in (_TITLE, _LABEL, _TICK)}
    left = 40 + max(math.ceil(fonts[_TICK].getlength(text)) for _, text in y_ticks)
    titles = wrap(title, fonts[_TITLE], size[0] - left - 8)
    right, bottom = size[0] - 18, size[1] - 50
    legend = _legend(series, fonts[_TICK], right - left)
    legend_top = 14 + round(1.3 * _TITLE) * len(titles)
    top = legend_top + (legend.height + 4 if legend else 0)

    def across(value: float) -> float:
        return left + (value - x_range[0]) / (x_range[1] - x_range[0]) * (right - left)

    def down(value: float) -> float:
        return bottom - (value - y_range[0]) / (y_range[1] - y_range[0]) * (bottom - top)

    page = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(page)
    for value, _ in x_ticks:
        pen.line([(across(value), top), (across(value), bottom)], _GRID)
    for value, _ in y_ticks:
        pen.line([(left, down(value)), (right, down(value))], _GRID)
    box = (left, top, right, bottom)
    for entry, (x, y) in zip(series, data, strict=True):
        points = [(across(a) - left, down(b) - top) for a, b in zip(x, y, strict=True)]
        _draw(page, box, entry, points, down(max(0.0, y_range[0])) - top)
    pen.rectangle(box, outline=_INK)
    for row, line in enumerate(titles):
        pen.text((left, 8 + row * round(1.3 * _TITLE)), line, _INK, fonts[_TITLE])
    for value, text in x_ticks:
        pen.text((across(value), bottom + 5), text, _INK, fonts[_TICK], anchor="ma")
    for value, text in y_ticks:
        pen.text((left - 6, down(value)), text, _INK, fonts[_TICK], anchor="rm")
    pen.text(((left + right) / 2, size[1] - 8), spelled(x_label), _INK, fonts[_LABEL], anchor="ms")
    _upright(page, spelled(y_label), fonts[_LABEL], (top + bottom) // 2)
    if legend:
        page.paste(legend, (left, legend_top))
    return page


def histogram(
    values: Mapping[str, ArrayLike],
    *,
    title: str,
    x_label: str,
    y_label: str = "density",
    bins: int = 60,
    size: tuple[int, int] = (480, 340),
) -> Image.Image:
    """Densities of several samples {label: (N,)} over common bins, each of area 1.

    The bins span the 0.5 to 99.5 % quantiles of all; what lies outside counts in the outermost bins.
    """
    samples = {label: np.asarray(sample, dtype=float).ravel() for label, sample in values.items()}
    everything = np.concatenate([sample[np.isfinite(sample)] for sample in samples.values()])
    if not len(everything):
        raise ConfigurationError(f"{title}: expected finite values for a histogram, found none")
    low, high = np.quantile(everything, [0.005, 0.995])
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    series = []
    for (label, sample), colour in zip(samples.items(), COLOURS, strict=False):
        clipped = sample[np.isfinite(sample)].clip(edges[0], edges[-1])
        density = np.histogram(clipped, edges)[0] / max(1, len(clipped)) / (edges[1] - edges[0])
        x, y = np.repeat(edges, 2)[1:-1], np.repeat(density, 2)
        series += [Series("", x, y, "area", colour, 0.35), Series(label, x, y, "line", colour)]
    return plot(series, title=title, x_label=x_label, y_label=y_label, size=size)


def ticks(low: float, high: float, about: int = 6) -> list[tuple[float, str]]:
    """Round positions in [low, high], in steps of 1, 2 or 5 times a power of ten, and how they are written."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(index * step, f"{index * step:.{digits}f}") for index in range(first, last + 1)]


def _finite(series: Series) -> tuple[Array, Array]:
    x, y = (np.asarray(values, dtype=np.float64).ravel() for values in (series.x, series.y))
    keep = np.isfinite(x) & np.isfinite(y)
    return x[keep], y[keep]


def _around(columns: Sequence[Array], *, zero: bool) -> Range:
    """A range that holds all values, with a little room; from 0 where areas stand on it."""
    values = np.concatenate(columns)
    low, high = float(values.min()), float(values.max())
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (min(0.0, low) if zero else low - room), high + room


def _draw(
    page: Image.Image,
    box: tuple[int, int, int, int],
    entry: Series,
    points: Sequence[tuple[float, float]],
    floor: float,
) -> None:
    """Draw one series into the box: as a mask at `_OVERSAMPLING` times the size, which is reduced."""
    width, height = box[2] - box[0], box[3] - box[1]
    mask = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    pen = ImageDraw.Draw(mask)
    fine = [(x * _OVERSAMPLING, y * _OVERSAMPLING) for x, y in points]
    if entry.kind == "points":
        radius = (3.0 if len(fine) <= _MOST_LARGE_POINTS else 1.6) * _OVERSAMPLING
        for x, y in fine:
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    elif entry.kind == "area" and fine:
        pen.polygon([(fine[0][0], floor * _OVERSAMPLING), *fine, (fine[-1][0], floor * _OVERSAMPLING)], fill=255)
    elif len(fine) > 1:
        pen.line(fine, fill=255, width=round(1.5 * _OVERSAMPLING), joint="curve")
    mask = mask.reduce(_OVERSAMPLING).point(lambda value: round(value * entry.opacity))
    page.paste(ImageColor.getrgb(entry.colour), box, mask)


def _upright(page: Image.Image, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, centre: int) -> None:
    """The label of the vertical axis, read from below."""
    width, height = math.ceil(font.getlength(text)) + 2, round(1.3 * _LABEL)
    label = Image.new("RGB", (width, height), _PAPER)
    ImageDraw.Draw(label).text((1, 1), text, _INK, font)
    page.paste(label.rotate(90, expand=True), (6, max(0, centre - width // 2)))


def _legend(
    series: Sequence[Series], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> Image.Image | None:
    """Colours and labels side by side, in as many lines as that takes; None where nothing has a label."""
    x, row, places = 0, 0, []
    for entry in series:
        if entry.label:
            needed = 40 + math.ceil(font.getlength(spelled(entry.label)))
            if x and x + needed > width:
                x, row = 0, row + 1
            places.append((x, row, entry))
            x += needed
    if not places:
        return None
    step = round(1.4 * _TICK)
    image = Image.new("RGB", (width, step * (row + 1)), _PAPER)
    pen = ImageDraw.Draw(image)
    for x, row, entry in places:
        y = row * step + step // 2
        pen.line([(x, y), (x + 16, y)], entry.colour, 3)
        pen.text((x + 22, y), spelled(entry.label), _INK, font, anchor="lm")
    return image
