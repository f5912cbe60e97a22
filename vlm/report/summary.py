"""What the terminal shows at the end of the miniature recipe: scores before and after, and what to open."""

from __future__ import annotations

import sys
from pathlib import Path

from vlm.report.rows import ACCURACY, CIDER, COLUMNS, SHUFFLED, Row, read

HEADS = {CIDER: "CIDEr", SHUFFLED: "shuffled", ACCURACY: "MMMU"}
"""Short names of columns; the others are short already."""
WIDTH = 10
BEATEN = ("random training caption", "caption of the nearest training picture")
"""Controls that a model which looks at its pictures beats; a human reference is no such control."""


def show(table: Path, report: Path, gallery: Path) -> int:
    """Print the scores of models and controls, and the paths of the report and the gallery.

    Args:
        table: `scores/table.csv`.
        report, gallery: pages to open.

    Returns:
        0, or 1 where the last model does not see: see `doubts`.

    Raises:
        ValueError: a file is missing, or the table is broken.
    """
    rows = read(table)
    for page in (report, gallery):
        if not page.is_file():
            raise ValueError(f"{page}: there is no such file; the workflow's target `all` makes it")
    print(text(rows))
    print(f"  report   {report}\n  gallery  {gallery}\n")
    for doubt in (found := doubts(rows)):
        print(f"  {doubt}", file=sys.stderr)
    return int(bool(found))


def doubts(rows: list[Row]) -> list[str]:
    """Why the last model's captions may not come from its pictures; empty for one that looks at them."""
    last = [row for row in rows if not row.control][-1]
    own, shuffled = last.scores[CIDER] or 0.0, last.scores[SHUFFLED] or 0.0
    found = [
        f"{last.label}: CIDEr {own:.3f} is no better than that of a control, {row.label} ({row.scores[CIDER]:.3f})"
        for row in rows
        if row.control and row.label in BEATEN and own <= (row.scores[CIDER] or 0.0)
    ]
    if shuffled > own / 2:
        found.append(f"{last.label}: CIDEr {own:.3f} falls only to {shuffled:.3f} when the pictures are shuffled")
    return found


def text(rows: list[Row]) -> str:
    """The table in fixed width, models first, then the controls under a line."""
    first = max(len(row.label) for row in rows) + 2
    heads = "".join(f"{HEADS.get(name, name):>{WIDTH}}" for name in COLUMNS)
    lines = ["", f"  {'':{first}}{heads}"]
    for control, title in ((False, None), (True, "without a model")):
        chosen = [row for row in rows if row.control == control]
        if title and chosen:
            lines.append(f"  {title + ' ':-<{first + len(heads)}}")
        for row in chosen:
            lines.append(f"  {row.label:{first}}" + "".join(_cell(row.scores[name]) for name in COLUMNS))
    lines.append(f"\n  {HEADS[SHUFFLED]}: CIDEr when each picture is swapped for another; what is left is not seen\n")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return f"{'' if value is None else format(value, '.3f'):>{WIDTH}}"
