"""The page needs nothing else, is well-formed, says what it was given, and looks right in a real browser."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from web_pages import Page, browser, require_fits, screenshot

from ebm_prior.reports.html import Code, Figure, Figures, Folded, Picture, Pictures, Statement, web_page
from ebm_prior.reports.text import Table


def png(colour: str, size: tuple[int, int] = (300, 200)) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


NASTY = "<script>alert(\"x\")</script> & 'quotes' ‖ε‖"
WIDE = Table(["name", *(f"a long head {i}" for i in range(20))], [["row", *(f"{i}.00" for i in range(20))]] * 3)
SECTIONS = [
    ("Pictures", [Picture(png("red", (1600, 300)), "a red one"), Pictures([Picture(png("blue"), "b")] * 2)]),
    (NASTY, [NASTY, Statement(NASTY), Code(NASTY), Table(["", NASTY], [["x", NASTY]])]),
    ("Tables", [WIDE, Folded("more", WIDE), "a-word-without-a-space" * 30, Code("another" * 60)]),
]
LEAD = [Figures([Figure("gain", "+0.750 nats", "ESS 24 %"), Figure("FD", "32.1 → 28.5", "")])]


@pytest.fixture(scope="module")
def text() -> str:
    return web_page(NASTY, LEAD, SECTIONS, "the end")


def test_it_is_one_file_that_says_what_it_was_given(text: str) -> None:
    page = Page(text)
    page.require_self_contained()
    assert page.images == [png("red", (1600, 300)), *[png("blue")] * 2]
    assert page.cells == ["", NASTY, "x", NASTY, *[c for row in (WIDE.head, *WIDE.rows) for c in row] * 2]
    for words in ("+0.750 nats", "a red one", "more", "the end"):
        assert words in page.words
    assert (
        page.words.count(NASTY) == 9
    )  # the page's and the section's title, heading and link; four parts, one of them twice
    assert text.count("<h2>") == 3


def test_a_browser_shows_it_light_and_dark(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(text)
    light, dark = screenshot(page), screenshot(page, dark=True)
    assert light.shape == dark.shape == (1500, 1200, 3)
    assert light[2, 2].min() > 240
    assert dark[2, 2].max() < 40
    for shot in (light, dark):
        red, blue = ((shot == colour).all(2) for colour in ((255, 0, 0), (0, 0, 255)))
        assert np.ptp(np.nonzero(red)[1]) == pytest.approx(1600 / 300 * np.ptp(np.nonzero(red)[0]), rel=0.02)
        assert blue.sum() == pytest.approx(2 * 300 * 200, rel=0.02)  # side by side, at their size
        assert len(np.unique(np.nonzero(blue)[0])) == pytest.approx(200, abs=3)
        assert (abs(shot - shot[2, 2]).sum(2) > 300).mean() > 0.01  # text can be told from the paper


@pytest.mark.parametrize(
    ("mistake", "seen"),
    [
        ('<div style="width: 1500px">wide</div>', "sideways"),
        ('<div style="overflow: hidden"><div style="width: 1500px">cut</div></div>', "are cut"),
        ('<img src="data:image/png;base64,AAAA" alt="broken">', "not drawn"),
        ("<script>nowhere.nothing()</script>", "CONSOLE"),
    ],
)
def test_a_browser_sees_mistakes(text: str, mistake: str, seen: str, tmp_path: Path) -> None:
    browser()  # skips where there is none, for the failures below are meant
    with pytest.raises(AssertionError, match=seen):
        require_fits(text.replace("</main>", mistake + "</main>"), 390, tmp_path)


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_nothing_is_wider_than_the_window(text: str, width: int, tmp_path: Path) -> None:
    require_fits(text, width, tmp_path)
