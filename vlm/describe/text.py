"""Aligned columns. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Columns two spaces apart.

    Args:
        right: per column `r` for numbers, anything else for text; shorter than the rows where the rest is text.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    sides = right.ljust(len(widths))
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
