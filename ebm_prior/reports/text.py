"""Aligned text: rows, tables and blocks for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Row = Sequence[str]


class Table(NamedTuple):
    """Cells under their heads; the first column names the row."""

    head: Row
    rows: Sequence[Row]


Block = Table | str  # a string is a line; an empty one sets apart what follows


def text(blocks: Sequence[Block]) -> str:
    """Blocks as text for the terminal."""
    return "\n".join(table(*block) if isinstance(block, Table) else block for block in blocks)


def table(head: Row, rows: Sequence[Row]) -> str:
    """Columns aligned, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Row) -> str:
        cells = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])
