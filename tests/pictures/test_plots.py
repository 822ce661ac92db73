"""Plots: round ticks, data where the axes say they are, and densities of area 1."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ebm_prior.errors import ConfigurationError
from ebm_prior.pictures.plots import COLOURS, Series, histogram, plot, ticks


@pytest.mark.parametrize(
    ("low", "high", "first", "second", "last"),
    [(0, 1, "0.0", "0.2", "1.0"), (-3.2, 41, "0", "10", "40"), (1e-4, 9e-4, "0.0002", "0.0004", "0.0008")],
)
def test_ticks_are_round_and_inside(low: float, high: float, first: str, second: str, last: str) -> None:
    found = ticks(low, high)
    assert [found[0][1], found[1][1], found[-1][1]] == [first, second, last]
    assert all(low <= value <= high for value, _ in found)


def ink(image: Image.Image, colour: str) -> np.ndarray:
    """(N, 2) positions (x, y) of pixels near a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    rows, columns = np.nonzero(np.abs(np.asarray(image, dtype=int) - wanted).max(2) < 12)
    return np.stack([columns, rows], axis=1)


def test_points_lie_where_the_axes_say() -> None:
    """Four corners and a centre: the centre is in their middle, the upper ones are above."""
    x, y = [0, 0, 1, 1, 0.5], [0, 2, 0, 2, 1]
    image = plot([Series("", x, y, "points", COLOURS[3])], title="t", x_label="x (s)", y_label="y (nats)")
    found = ink(image, COLOURS[3])
    low, high = found.min(0), found.max(0)
    middle = found[(np.abs(found - (low + high) / 2) < 8).all(1)]
    assert len(middle)
    np.testing.assert_allclose(middle.mean(0), (low + high) / 2, atol=1.5)
    single = plot([Series("", [0, 1], [0, 2], "line", COLOURS[3])], title="t", x_label="x (s)", y_label="y (nats)")
    line = ink(single, COLOURS[3])
    assert line[line[:, 0].argmin(), 1] > line[line[:, 0].argmax(), 1]  # upwards to the right


def test_what_is_not_finite_is_left_out_and_nothing_else() -> None:
    def drawn(x: list[float], y: list[float]) -> Image.Image:
        return plot([Series("a", x, y)], title="t", x_label="x", y_label="y")

    assert drawn([0, 1, np.nan, 2], [0, 1, 5, np.inf]).tobytes() == drawn([0, 1], [0, 1]).tobytes()
    with pytest.raises(ConfigurationError, match="found none"):
        drawn([np.nan], [1])


def test_a_constant_is_drawn() -> None:
    assert len(ink(plot([Series("", [0, 1], [3, 3])], title="", x_label="", y_label=""), COLOURS[0]))


def test_histograms_are_densities(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Series] = []

    def catch(series: list[Series], **_: object) -> Image.Image:
        kept.extend(series)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr("ebm_prior.pictures.plots.plot", catch)
    random = np.random.default_rng(0)
    samples = {"a": random.normal(0, 1, 500), "b": np.append(random.normal(3, 1, 90), [np.nan, 1e9])}
    histogram(samples, title="t", x_label="x")
    lines = [entry for entry in kept if entry.kind == "line"]
    assert [entry.label for entry in lines] == ["a", "b"]
    for entry in lines:
        assert np.trapezoid(np.asarray(entry.y), np.asarray(entry.x)) == pytest.approx(1)
    assert np.array_equal(np.asarray(lines[0].x), np.asarray(lines[1].x))
    with pytest.raises(ConfigurationError, match="found none"):
        histogram({"a": [np.nan]}, title="t", x_label="x")


def test_labels_stand_above_the_data() -> None:
    long = [Series(f"a rather long label {i}", [0, 1], [i, 1], colour=COLOURS[i]) for i in range(6)]
    assert plot(long, title="t", x_label="x", y_label="y", size=(300, 260)).size == (300, 260)
