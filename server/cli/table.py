"""How a listing is shown: a table for a person, tab-separated lines for a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

_DAY = 86_400.0


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their column names; None is an empty cell. A pipe gets every cell in full."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for line in (columns, *cells):
            print("\t".join(" ".join(cell.split()) for cell in line))
        return
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for line in cells:
        table.add_row(*line)
    Console(markup=False, highlight=False).print(table)


def ago(moment: float | None) -> str:
    """A Unix time as a person says it: `12 min ago`; `never` for None."""
    if moment is None:
        return "never"
    seconds = max(time.time() - moment, 0.0)
    for unit, name in ((_DAY, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} ago"
    return "just now"
