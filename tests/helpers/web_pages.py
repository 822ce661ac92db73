"""What is on a page, and how it looks in a real browser."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
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


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def browser() -> str:
    """The browser that $EBM_PRIOR_BROWSER names, else one that is found. Skips where there is none."""
    named = os.environ.get("EBM_PRIOR_BROWSER")
    found = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(BROWSERS)}, and $EBM_PRIOR_BROWSER names none")
    return found


def run_browser(page: Path, *options: str, dark: bool = False, width: int = 1200, height: int = 1500) -> str:
    """What headless Chromium prints of a page, which must not make it complain: no error, no warning of the console."""
    profile = page.parent / "profile"
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *quiet]
    command += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--hide-scrollbars"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width},{height}"]
    done = subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return done.stdout


def screenshot(page: Path, **how: bool | int) -> np.ndarray:
    """(height, width, 3) of a page as it is seen first."""
    path = page.with_suffix(".png")
    run_browser(page, f"--screenshot={path}", **how)  # type: ignore[arg-type]
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# All that is folded is unfolded first. `cut`: what ends right of the page, outside of the boxes that scroll by
# themselves, and cells whose text is wider than they are.
_MEASURE = """
onload = () => {
  const page = document.querySelector('iframe').contentDocument, root = page.documentElement;
  const all = (what) => [...page.querySelectorAll(what)];
  all('details').forEach((each) => { each.open = true; });
  const right = (each) => each.getBoundingClientRect().right;
  document.title = JSON.stringify({
    content: root.scrollWidth, window: root.clientWidth,
    images: all('img').map((each) => [each.complete ? each.naturalWidth : 0, each.clientWidth]),
    tables: all('table').map((each) => [each.clientWidth, each.parentElement.scrollWidth,
      each.parentElement.clientWidth, getComputedStyle(each.parentElement).overflowX]),
    cut: [...all('body *').filter((each) => !each.closest('.scroll > *') && right(each) > root.clientWidth + 1),
      ...all('td, th').filter((each) => each.scrollWidth > each.clientWidth + 1)].map((each) => each.outerHTML),
  });
};
"""


def in_frame(text: str, width: int, folder: Path, script: str = "") -> Path:
    """A page in a frame of this width: windows are no narrower than 500 pixels, a telephone is."""
    frame = f'<iframe srcdoc="{escape(text)}" width="{width}" height="900" style="border:0"></iframe>'
    path = folder / "frame.html"
    path.write_text(f'<!doctype html><body style="margin:0">{frame}<script>{script}</script>')
    return path


def require_fits(text: str, width: int, folder: Path) -> None:
    """Long words break and wide tables scroll in their own box; nothing is cut; every picture is drawn."""
    printed = run_browser(in_frame(text, width, folder, _MEASURE), "--dump-dom", width=max(width, 500) + 100)
    title = re.search(r"<title>({.*?})</title>", printed, re.DOTALL)
    assert title, printed[-500:]
    found = json.loads(unescape(title[1]))
    assert found["window"] == width
    assert found["content"] <= width, "it scrolls sideways"
    assert found["cut"] == [], "these are cut"
    assert len(found["images"]) == text.count("<img ")
    assert all(own > 0 and shown > 0 for own, shown in found["images"]), "a picture is not drawn"
    assert len(found["tables"]) == text.count("<table>") > 0
    for table, scrolled, box, overflow in found["tables"]:
        assert 0 < table <= scrolled
        assert box <= width
        assert overflow == "auto"
