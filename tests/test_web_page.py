"""The page needs nothing else, is well-formed, says what it was given, and looks right in a real browser."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ebm_prior.reports.html import Code, Figure, Figures, Folded, Picture, Pictures, Statement, web_page
from ebm_prior.reports.text import Table

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """What is on a page. Tags must nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.cells: list[str] = []
        self.images: list[bytes] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            if name in given:
                self.addresses.append(str(given[name]))
        if "id" in given:
            self.ids.append(str(given["id"]))
        if tag == "img":
            kind, _, content = str(given["src"]).partition(",")
            assert kind == "data:image/png;base64"
            assert given["alt"]
            self.images.append(base64.b64decode(content, validate=True))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data

    def require_self_contained(self) -> None:
        """Nothing is fetched, nothing is run."""
        assert not {"script", "link", "iframe", "object", "embed", "base"} & set(self.tags)
        assert all(each.startswith("data:image/png;base64,") or each[1:] in self.ids for each in self.addresses)
        assert not re.search(r"https?:|url\(|@import", self.words)


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


def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(names)}")
    return found


def run_browser(page: Path, *options: str, dark: bool = False, width: int = 1200) -> str:
    """What headless Chromium prints of a page."""
    profile = page.parent / "profile"
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={profile}"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width},1500"]
    done = subprocess.run(
        [*command, "--hide-scrollbars", *options, page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def screenshot(page: Path, **how: bool | int) -> np.ndarray:
    path = page.with_suffix(".png")
    run_browser(page, f"--screenshot={path}", **how)  # type: ignore[arg-type]
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


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


def require_no_sideways_scrolling(text: str, width: int, folder: Path) -> None:
    """Long words break and wide tables scroll in their own box: the page is as wide as the window."""
    frame = f'<iframe srcdoc="{escape(text)}" width="{width}" height="900" style="border:0"></iframe>'
    measure = (
        "onload = () => { const page = document.querySelector('iframe').contentDocument.documentElement;"
        " document.title = [page.scrollWidth, page.clientWidth, page.querySelector('.scroll').scrollWidth]; }"
    )
    page = folder / "frame.html"
    page.write_text(f"<!doctype html><body>{frame}<script>{measure}</script>")
    found = re.search(r"<title>(\d+),(\d+),(\d+)</title>", run_browser(page, "--dump-dom", width=width + 100))
    assert found
    content, window, table = map(int, found.groups())
    assert content <= window == width
    assert table > 100  # it was drawn


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(text: str, width: int, tmp_path: Path) -> None:
    require_no_sideways_scrolling(text, width, tmp_path)
