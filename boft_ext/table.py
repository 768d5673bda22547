"""Plain text tables for what this package prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Lines with aligned columns: text to the left, numbers to the right, integers with thousands separators.

    Every row has as many entries as `header`; None gives an empty cell. Pure.
    """
    rows = [list(row) for row in rows]
    right = [any(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    lines = [list(header), *([_cell(entry) for entry in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(map(_aligned, line, widths, right)).rstrip() for line in lines)


def percent(share: float) -> str:
    """``0.00123`` -> ``0.12 %``, with enough digits for small shares."""
    return f"{100 * share:.3g} %"


def _cell(entry: Any) -> str:
    if entry is None:
        return ""
    if isinstance(entry, int):
        return f"{entry:,}"
    return f"{entry:.4g}" if isinstance(entry, float) else str(entry)


def _aligned(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)
