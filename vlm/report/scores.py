"""The scores of every model beside what needs no model, since a caption score alone says little."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from vlm.report import drawing
from vlm.report.rows import ACCURACY, CIDER, SHUFFLED, Row, read

CHANCE = 0.25
"""Guessing among four options, MMMU's usual number."""
LABEL_WIDTH = 24
THICKNESS = 0.36


def draw(table: Path, out: Path) -> None:
    """Draw CIDEr of models and controls, with and without shuffled pictures, and MMMU accuracy beside chance.

    Args:
        table: `scores/table.csv`.
        out: PNG, SVG or PDF file, by its ending.

    Raises:
        ValueError: the table is missing or broken.
    """
    rows = read(table)
    models = [row for row in rows if not row.control]
    drawn = drawing.figure(11, 1.3 + 0.55 * len(rows), "Scores on held-out pictures")
    captions, questions = drawn.subplots(1, 2, width_ratios=(3, 2))
    _captions(captions, rows)
    _questions(questions, models)
    drawing.save(drawn, out)


def _captions(axes: Axes, rows: Sequence[Row]) -> None:
    height = 2 * THICKNESS
    for place, row in enumerate(rows):
        value, shuffled = row.scores[CIDER], row.scores[SHUFFLED]
        if shuffled is None:
            _bar(axes, place, value, height, drawing.CONTROL)
        else:
            _bar(axes, place - THICKNESS / 2, value, THICKNESS, drawing.MODEL, bold=True)
            _bar(axes, place + THICKNESS / 2, shuffled, THICKNESS, drawing.SHUFFLED)
    inks = {"model": drawing.MODEL, "same, pictures shuffled": drawing.SHUFFLED, "control": drawing.CONTROL}
    for name, colour in inks.items():
        axes.barh([0], [0], color=colour, label=name)
    look = {"frameon": False, "fontsize": 9, "labelcolor": drawing.INK, "borderaxespad": 0}
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.07), ncols=len(inks), **look)
    _label(axes, "Captions: CIDEr", rows)


def _questions(axes: Axes, models: Sequence[Row]) -> None:
    for place, row in enumerate(models):
        _bar(axes, place, row.scores[ACCURACY], 1.1 * THICKNESS, drawing.MODEL, bold=True)
    axes.axvline(CHANCE, color=drawing.INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "guessing among four options",
        (CHANCE, len(models) - 0.5),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=9,
        color=drawing.FAINT,
        va="center",
    )
    _label(axes, "Questions: MMMU accuracy", models)
    axes.set_xlim(0, 1)


def _bar(axes: Axes, place: float, value: float | None, height: float, colour: str, *, bold: bool = False) -> None:
    if value is None:
        return
    axes.barh(place, value, height=height * 0.92, color=colour)
    axes.annotate(
        f"{value:.2f}",
        (value, place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        fontweight="bold" if bold else "normal",
        color=drawing.INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )


def _label(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    drawing.plain(axes, grid="x")
    axes.set_title(title, loc="left", fontsize=11, color=drawing.INK, pad=8)
    labels = [textwrap.fill(row.label, LABEL_WIDTH) for row in rows]
    axes.set_yticks(range(len(rows)), labels=labels, color=drawing.INK, fontsize=9.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
