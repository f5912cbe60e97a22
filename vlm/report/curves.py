"""The loss of every stage, so that a run that stopped learning is seen at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from vlm import files
from vlm.report import drawing

FIELDS = ("iteration", "loss", "learning_rate")


def draw(metrics: Sequence[Path], out: Path) -> None:
    """Draw loss and learning rate over the iterations, one column per stage.

    Args:
        metrics: `<stage>/metrics.jsonl` of each stage, in the order of training; the folder names the stage.
        out: PNG, SVG or PDF file, by its ending.

    Raises:
        ValueError: a file is missing or empty, or a line lacks one of FIELDS.
    """
    stages = {path.parent.name: _read(path) for path in metrics}
    drawn = drawing.figure(1.2 + 4.2 * len(stages), 4.6, "Training loss")
    grid = drawn.subplots(2, len(stages), sharex="col", squeeze=False, height_ratios=(4, 1))
    for column, (stage, lines) in enumerate(stages.items()):
        _loss(grid[0][column], stage, lines)
        _learning_rate(grid[1][column], lines)
    grid[0][0].set_ylabel("nats per trained token", color=drawing.FAINT, fontsize=9)
    grid[1][0].set_ylabel("learning rate", color=drawing.FAINT, fontsize=9)
    drawing.save(drawn, out)


def _read(path: Path) -> list[dict[str, Any]]:
    lines = files.read_records(path)
    if not lines:
        raise ValueError(f"{path}: holds no line of metrics")
    for number, line in enumerate(lines, start=1):
        if wrong := [name for name in FIELDS if not isinstance(line.get(name), int | float)]:
            raise ValueError(f"{path}: line {number} has no number under {', '.join(wrong)}")
    return lines


def _loss(axes: Axes, stage: str, lines: Sequence[dict[str, Any]]) -> None:
    iterations, losses = ([line[name] for line in lines] for name in ("iteration", "loss"))
    axes.plot(iterations, losses, color=drawing.MODEL, linewidth=1.8, solid_capstyle="round")
    axes.plot(iterations[-1], losses[-1], "o", color=drawing.MODEL, markersize=5)
    axes.annotate(
        f"{losses[-1]:.3f}",
        (iterations[-1], losses[-1]),
        xytext=(0, 9),
        textcoords="offset points",
        ha="right",
        color=drawing.INK,
        fontweight="bold",
        fontsize=10,
    )
    axes.set_title(stage, loc="left", fontsize=11, color=drawing.INK)
    axes.set_ylim(0, max(losses) * 1.05)
    drawing.plain(axes, grid="y")


def _learning_rate(axes: Axes, lines: Sequence[dict[str, Any]]) -> None:
    iterations, rates = ([line[name] for line in lines] for name in ("iteration", "learning_rate"))
    axes.fill_between(iterations, rates, color=drawing.SHUFFLED, alpha=0.5, linewidth=0)
    axes.plot(iterations, rates, color=drawing.MODEL, linewidth=1.0)
    axes.set_ylim(0, max(rates) * 1.1 or 1)
    axes.set_yticks([max(rates)], labels=[f"{max(rates):.1e}".replace("e-0", "e-")])
    axes.set_xlim(0, iterations[-1] * 1.02)
    axes.set_xlabel("iteration", color=drawing.FAINT, fontsize=9)
    drawing.plain(axes, grid="y")
