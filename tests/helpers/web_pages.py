"""What is on a page, and how it looks in a real browser."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
