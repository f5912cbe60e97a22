"""One look for all charts: few inks, no frames, values written where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, FAINT, GRID = "#1f2733", "#6b7683", "#e3e7ec"
MODEL, SHUFFLED, CONTROL, HELD_OUT = "#2563a8", "#a9c6e4", "#b4bbc4", "#c2571a"
FORMATS = (".png", ".svg", ".pdf")


def figure(width: float, height: float, title: str) -> Figure:
    """An empty figure, in inches, with its title at the top left."""
    engine = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.1)  # inches
    drawn = Figure(figsize=(width, height), layout=engine, facecolor="white")
    drawn.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    return drawn


def plain(axes: Axes, *, grid: Literal["x", "y"]) -> None:
    """Take away what carries no information; `grid` is the axis along which values are read, x or y."""
    axes.spines[["top", "right", "left" if grid == "x" else "bottom"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=FAINT, labelsize=9, length=0)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def save(drawn: Figure, path: Path) -> None:
    """Write the figure, complete or absent, in the format of the file's ending.

    Raises:
        ValueError: the ending is not one of FORMATS.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"--out: {path} ends in {path.suffix or 'nothing'}, allowed are {', '.join(FORMATS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.writing")
    options: dict[str, Any] = {"dpi": 160} if path.suffix == ".png" else {"metadata": {"Date": None}}
    drawn.savefig(beside, format=path.suffix[1:], **options)
    beside.replace(path)
