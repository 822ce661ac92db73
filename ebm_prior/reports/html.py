"""A self-contained HTML page: pictures as data URIs, inline style, no script, nothing loaded from elsewhere.

Colours follow the light or dark mode of the browser, and the layout fits screens from a phone's to a desktop's.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from ebm_prior.reports.text import Block, Table


class Picture(NamedTuple):
    """A PNG and its caption."""

    png: bytes
    caption: str


class Pictures(NamedTuple):
    """Small pictures with titles of their own, side by side where there is room."""

    pictures: Sequence[Picture]


class Code(NamedTuple):
    """Text to copy into a terminal, as it is."""

    text: str


class Statement(NamedTuple):
    """The main finding of a section, in words."""

    text: str


class Figure(NamedTuple):
    """A number at the top of the page: its name, its value, and a note to compare it with."""

    name: str
    value: str
    note: str


class Figures(NamedTuple):
    """The few numbers that a reader looks for first."""

    figures: Sequence[Figure]


class Folded(NamedTuple):
    """Something long that a reader can unfold."""

    title: str
    part: Table | Picture


Part = Block | Picture | Pictures | Code | Statement | Figures | Folded

_WIDEST = 1600  # pixels; the text on wider pictures could not be read if these were shrunk to the page: they scroll
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #ffffff; --card: #f4f6f8; --rule: #d5dbe1;
  --shade: #aab4be; --accent: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa5b1; --paper: #14181d; --card: #1e242b; --rule: #353e48;
    --shade: #56626f; --accent: #74b3f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
header, main { max-width: 70rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0 0 .8rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .8rem 0 0; }
a { color: var(--accent); }
section { border-top: 1px solid var(--rule); margin-top: 1.8rem; padding-top: 1.3rem; }
p { margin: .55rem 0; overflow-wrap: anywhere; }
p.line, figcaption, .figure small { color: var(--soft); font-size: .9rem; }
p.statement { background: var(--card); border-left: .3rem solid var(--accent); padding: .8rem 1rem; }
.scroll { overflow-x: auto; margin: .9rem 0 .4rem; /* a shade at the right edge while there is more to scroll to */
  background: linear-gradient(to left, var(--paper) 45%, transparent) right / 3.5rem 100% no-repeat local,
  linear-gradient(to left, var(--shade), transparent) right / 1.6rem calc(100% - 2px) no-repeat scroll; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper); }
thead th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--rule); vertical-align: bottom; }
tbody th { font-weight: 500; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
figure { margin: .9rem 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--rule);
  border-radius: .4rem; padding: .4rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.2rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.figure { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.figure b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.figure small { display: block; }
pre { background: var(--card); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto; font-size: .88rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); margin: .6rem 0; }
.wide img { max-width: none; }
@media (max-width: 40rem) { header, main, footer { padding: 0 1rem; } .figure { padding: .6rem .7rem; }
  .figure b { font-size: 1.1rem; } table { font-size: .85rem; } th, td { padding: .3rem .45rem; } }
footer { max-width: 70rem; margin: 2rem auto; padding: 0 1.25rem; color: var(--soft); font-size: .85rem; }
@media print { body { background: #fff; color: #000; } nav { display: none; } }
"""


def web_page(title: str, lead: Sequence[Part], sections: Sequence[tuple[str, Sequence[Part]]], footer: str) -> str:
    """A page of titled sections, with links to them under the title and the `lead`."""
    names = [(f"s{number}", name) for number, (name, _) in enumerate(sections, start=1)]
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name in names)
    body = "\n".join(
        f'<section id="{key}">\n<h2>{escape(name)}</h2>\n{_parts(parts)}\n</section>'
        for (key, name), (_, parts) in zip(names, sections, strict=True)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{_parts(lead)}
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{body}
</main>
<footer>{escape(footer)}</footer>
</body>
</html>
"""


def _parts(parts: Sequence[Part]) -> str:
    return "\n".join(_part(part) for part in parts if part != "")


def _part(part: Part) -> str:
    match part:
        case str():
            return f'<p class="line">{escape(part)}</p>'
        case Table():
            return _table(part)
        case Picture():
            return f"<figure>{_image(part)}<figcaption>{escape(part.caption)}</figcaption></figure>"
        case Pictures():
            return f'<div class="pictures">{"".join(map(_image, part.pictures))}</div>'
        case Code():
            return f"<pre><code>{escape(part.text)}</code></pre>"
        case Statement():
            return f'<p class="statement">{escape(part.text)}</p>'
        case Figures():
            cells = (
                f'<div class="figure">{escape(name)}<b>{escape(value)}</b><small>{escape(note)}</small></div>'
                for name, value, note in part.figures
            )
            return f'<div class="figures">{"".join(cells)}</div>'
        case Folded():
            return f"<details><summary>{escape(part.title)}</summary>{_part(part.part)}</details>"


def _image(picture: Picture) -> str:
    source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
    image = f'<img src="{source}" alt="{escape(picture.caption)}">'
    width = int.from_bytes(picture.png[16:20], "big")  # where PNG has it
    return f'<div class="scroll wide">{image}</div>' if width > _WIDEST else image


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'
