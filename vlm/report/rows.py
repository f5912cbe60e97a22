"""The table of scores as the charts and the summary read it; standard library only."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

CIDER, SHUFFLED, ACCURACY = "CIDEr", "CIDEr, pictures shuffled", "MMMU accuracy"
COLUMNS = (CIDER, SHUFFLED, "BLEU-4", "METEOR", "ROUGE-L", ACCURACY)
CONTROL_PREFIX = "control: "


@dataclass(frozen=True)
class Row:
    """A model, or a control that needs none."""

    label: str
    scores: dict[str, float | None]
    """By column, as fractions; None where there is no such score."""
    control: bool


def read(table: Path) -> list[Row]:
    """Rows of `scores/table.csv` in its order.

    Raises:
        ValueError: the file is missing, has no rows, lacks a column, or holds something that is not a number.
    """
    if not table.is_file():
        raise ValueError(f"{table}: there is no such file; `vlm score table` writes it")
    entries = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))
    if not entries:
        raise ValueError(f"{table}: has no rows")
    if missing := [name for name in ("label", *COLUMNS) if name not in entries[0]]:
        raise ValueError(f"{table}: columns {', '.join(missing)} are missing")
    return [
        Row(
            label=entry["label"].removeprefix(CONTROL_PREFIX),
            scores={name: _number(entry[name], f"{table}: line {number}, {name}") for name in COLUMNS},
            control=entry["label"].startswith(CONTROL_PREFIX),
        )
        for number, entry in enumerate(entries, start=2)
    ]


def _number(text: str | None, where: str) -> float | None:
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where}: {text!r} is not a number") from None
