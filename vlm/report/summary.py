"""What the terminal shows at the end of the miniature recipe: scores before and after, and what to open."""

from __future__ import annotations

from pathlib import Path

from vlm.report.rows import ACCURACY, CIDER, COLUMNS, SHUFFLED, Row, read

HEADS = {CIDER: "CIDEr", SHUFFLED: "shuffled", ACCURACY: "MMMU"}
"""Short names of columns; the others are short already."""
WIDTH = 10


def show(table: Path, report: Path, gallery: Path) -> None:
    """Print the scores of models and controls, and the paths of the report and the gallery.

    Args:
        table: `scores/table.csv`.
        report, gallery: pages to open.

    Raises:
        ValueError: a file is missing, or the table is broken.
    """
    rows = read(table)
    for page in (report, gallery):
        if not page.is_file():
            raise ValueError(f"{page}: there is no such file; the workflow's target `all` makes it")
    print(text(rows))
    print(f"  report   {report}\n  gallery  {gallery}\n")


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
