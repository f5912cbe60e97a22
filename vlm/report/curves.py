"""The losses of every stage, so that a run that stopped learning or began to memorise is seen at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from vlm import files
from vlm.report import drawing

FIELDS = ("loss", "learning_rate")
"""What every line of training has; a line of validation has only its own."""
VALIDATION = "validation_loss"
SPEED = "tokens_per_second"
DASHES = ((0, (1, 1.2)), (0, (4, 1.6)), (0, (6, 1.5, 1, 1.5)))
"""Of the data sets, where there are several."""

Line = dict[str, Any]


def draw(metrics: Sequence[Path], out: Path) -> None:
    """Draw losses, learning rate and speed over the iterations, one column per stage.

    Args:
        metrics: `<stage>/metrics.jsonl` of each stage, in the order of training; the folder names the stage.
        out: PNG, SVG or PDF file, by its ending.

    Raises:
        ValueError: a file is missing, holds no line of training, or a line lacks its number.
    """
    stages = {path.parent.name: _read(path) for path in metrics}
    drawn = drawing.figure(1.2 + 4.6 * len(stages), 5.6, "Training")
    grid = drawn.subplots(3, len(stages), sharex="col", squeeze=False, height_ratios=(4, 1, 1))
    for column, (stage, lines) in enumerate(stages.items()):
        _losses(grid[0][column], stage, lines)
        _learning_rate(grid[1][column], _with(lines, "learning_rate"))
        _speed(grid[2][column], _with(lines, SPEED))
        grid[2][column].set_xlabel("iteration", color=drawing.FAINT, fontsize=9)
        grid[2][column].set_xlim(0, lines[-1]["iteration"] * 1.02)
    for row, label in enumerate(("nats per trained token", "learning rate", "tokens/s")):
        grid[row][0].set_ylabel(label, color=drawing.FAINT, fontsize=9)
    drawing.save(drawn, out)


def _read(path: Path) -> list[Line]:
    lines = files.read_records(path)
    if not any("loss" in line for line in lines):
        raise ValueError(f"{path}: holds no line of training metrics")
    for number, line in enumerate(lines, start=1):
        needed = ("iteration", *(() if VALIDATION in line else FIELDS))
        if wrong := [name for name in needed if not isinstance(line.get(name), int | float)]:
            raise ValueError(f"{path}: line {number} has no number under {', '.join(wrong)}")
    return lines


def _with(lines: Sequence[Line], name: str) -> list[Line]:
    return [line for line in lines if name in line]


def _losses(axes: Axes, stage: str, lines: Sequence[Line]) -> None:
    """Training and validation, thick; below them in the same ink each of several data sets."""
    highest = 0.0
    validated = any(VALIDATION in line for line in lines)
    for name, label, ink in (("loss", "training", drawing.MODEL), (VALIDATION, "validation", drawing.HELD_OUT)):
        sets = sorted({key for line in lines for key in line if key.startswith(f"{name}/")})
        for one, dashes in zip(sets, cycle(DASHES), strict=False):
            look = {"linewidth": 1.0, "linestyle": dashes, "alpha": 0.75, "label": f"{label}, {one.split('/', 1)[1]}"}
            highest = max(highest, _curve(axes, _with(lines, one), one, color=ink, **look))
        if chosen := _with(lines, name):
            highest = max(highest, _curve(axes, chosen, name, color=ink, linewidth=1.8, label=label))
            _end(axes, chosen[-1], name, ink, offset=0 if not validated else 7 if name == VALIDATION else -7)
    axes.set_title(stage, loc="left", fontsize=11, color=drawing.INK)
    axes.set_ylim(0, highest * 1.05)
    if len(axes.lines) > 2:  # a curve alone and its end
        handles, labels = axes.get_legend_handles_labels()
        look = {"facecolor": "white", "edgecolor": "none", "framealpha": 0.8}
        axes.legend(handles, labels, fontsize=8.5, labelcolor=drawing.INK, loc="upper right", **look)
    drawing.plain(axes, grid="y")


def _curve(axes: Axes, lines: Sequence[Line], name: str, **look: Any) -> float:
    """Draw one, and return its highest value. Few measurements are marked."""
    values = [line[name] for line in lines]
    marker = "o" if name == VALIDATION else None
    axes.plot(
        [line["iteration"] for line in lines], values, solid_capstyle="round", marker=marker, markersize=3.5, **look
    )
    return float(max(values))


def _end(axes: Axes, line: Line, name: str, ink: str, *, offset: int) -> None:
    """The last value in figures, beside its point and so many points above it."""
    place = (line["iteration"], line[name])
    axes.plot(*place, "o", color=ink, markersize=5)
    axes.annotate(
        f"{line[name]:.3f}",
        place,
        xytext=(8, offset),
        textcoords="offset points",
        va="center",
        color=ink,
        fontweight="bold",
        fontsize=10,
    )


def _learning_rate(axes: Axes, lines: Sequence[Line]) -> None:
    highest = _area(axes, lines, "learning_rate")
    axes.set_yticks([highest], labels=[f"{highest:.1e}".replace("e-0", "e-")])


def _speed(axes: Axes, lines: Sequence[Line]) -> None:
    if lines:
        highest = _area(axes, lines, SPEED)
        axes.set_yticks([highest], labels=[EngFormatter(sep="", places=1)(highest)])
    else:
        axes.set_yticks([])
        drawing.plain(axes, grid="y")


def _area(axes: Axes, lines: Sequence[Line], name: str) -> float:
    iterations, values = ([line[key] for line in lines] for key in ("iteration", name))
    axes.fill_between(iterations, values, color=drawing.SHUFFLED, alpha=0.5, linewidth=0)
    axes.plot(iterations, values, color=drawing.MODEL, linewidth=1.0)
    axes.set_ylim(0, max(values) * 1.1 or 1)
    drawing.plain(axes, grid="y")
    return float(max(values))
