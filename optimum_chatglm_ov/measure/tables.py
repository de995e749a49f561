# SPDX-License-Identifier: Apache-2.0
"""Writes measurements as markdown tables."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table


def markdown_lines(rows: Iterable[Mapping[str, str]]) -> Iterator[str]:
    """Yields the lines of a markdown table: two of the header, then one for each row as soon as the row is there.

    Args:
        rows: cells by the names of the columns, the same in every row. A sequence is known in advance, and its columns
            are aligned; those of an iterator grow with their cells.
    """
    widths: dict[str, int] = {}
    if isinstance(rows, Sequence):
        for row in rows:
            _widen(widths, row)
    is_first = True
    for row in rows:
        _widen(widths, row)
        header, rule, line = _lines(widths, row)
        yield from (header, rule, line) if is_first else (line,)
        is_first = False


def _widen(widths: dict[str, int], row: Mapping[str, str]) -> None:
    for name, text in row.items():
        widths[name] = max(widths.get(name, 0), cell_len(name), cell_len(text))


def _lines(widths: Mapping[str, int], row: Mapping[str, str]) -> list[str]:
    """Renders header, rule and line of a table with one row."""
    table = Table(box=box.MARKDOWN)
    for name in row:
        table.add_column(name, min_width=widths[name], no_wrap=True)
    table.add_row(*row.values())
    written = io.StringIO()
    # so wide that no row is cut, and without a meaning of brackets and colons in the cells
    console = Console(file=written, width=10_000, markup=False, emoji=False, highlight=False, color_system=None)
    console.print(table)
    return [line.strip() for line in written.getvalue().splitlines() if line.strip()]
