"""Results of the benches as JSON, as a table in kernels/README.md and as a picture.

python kernels/benches/table.py        the table and the pictures again, from the JSON files as they are
"""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KEYS = ("operation", "shape", "dtype", "stage")
PROVIDERS = ("ours", "transformer_engine", "sdpa_flash", "sdpa_cudnn", "liger", "eager")
TITLES = {
    "ours": "ours",
    "transformer_engine": "Transformer Engine",
    "sdpa_flash": "SDPA FlashAttention",
    "sdpa_cudnn": "SDPA cuDNN",
    "liger": "Liger",
    "eager": "eager",
}
START, END = "<!-- results: written by `make bench` -->", "<!-- end of results -->"


def write(folder: Path, cells: list[dict[str, Any]], environment: dict[str, str]) -> Path:
    """Merge cells into <gpu>.json: a cell measured again replaces the older one, the rest stays with its versions."""
    folder.mkdir(parents=True, exist_ok=True)
    gpu = cells[0]["gpu"]
    path = folder / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")
    known = json.loads(path.read_text())["cells"] if path.exists() else []
    merged = {_name(cell): cell for cell in known}
    merged |= {_name(cell): cell | {"versions": environment} for cell in cells}
    content = {"gpu": gpu, "cells": sorted(merged.values(), key=_name)}
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    return path


def _name(cell: dict[str, Any]) -> tuple[str, ...]:
    return (*(cell[key] for key in KEYS), cell["provider"])


def publish(folder: Path, readme: Path) -> None:
    """Write the table of every GPU between the README's marks, and a picture beside each JSON file."""
    paths = sorted(folder.glob("*.json"))
    parts = []
    for path in paths:
        results = json.loads(path.read_text())
        parts.append(markdown(results, path.stem))
        picture(results, path.with_suffix(".png"))
    text = readme.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    body = "\n".join(parts) if parts else "Not measured yet.\n"
    readme.write_text(f"{before}{START}\n\n{body}\n{END}{after}")


def rows(results: dict[str, Any]) -> list[tuple[dict[str, str], dict[str, dict[str, Any]]]]:
    """(operation, shape, dtype, stage) and its cells by provider."""
    cells = sorted(results["cells"], key=_name)
    return [
        (dict(zip(KEYS, key, strict=True)), {cell["provider"]: cell for cell in group})
        for key, group in groupby(cells, key=lambda cell: tuple(cell[k] for k in KEYS))
    ]


def markdown(results: dict[str, Any], stem: str) -> str:
    versions = {json.dumps(cell["versions"], sort_keys=True) for cell in results["cells"]}
    lines = [f"### {results['gpu']}", ""]
    for version in sorted(versions):
        lines.append(", ".join(f"{name} {number}" for name, number in json.loads(version).items()) + "  ")
    lines += ["Milliseconds (median), TFLOP/s of the work that must be done, and GiB of peak memory beyond the inputs."]
    lines += [
        f"The last column is the fastest peer's time over ours. Picture: [{stem}.png](benches/results/{stem}.png).",
        "",
    ]
    for operation, group in groupby(rows(results), key=lambda row: row[0]["operation"]):
        members = list(group)
        providers = [p for p in PROVIDERS if any(p in cells for _, cells in members)]
        lines += [f"**{operation}**", ""]
        lines.append("| shape | dtype | pass | " + " | ".join(TITLES[p] for p in providers) + " | peer / ours |")
        lines.append("|" + "---|" * (4 + len(providers)))
        for key, cells in members:
            values = [_cell(cells.get(p)) for p in providers]
            lines.append(
                f"| {key['shape']} | {key['dtype']} | {key['stage']} | {' | '.join(values)} | {_ratio(cells)} |"
            )
        lines.append("")
    failed = [(key, p, cell["failed"]) for key, cells in rows(results) for p, cell in cells.items() if "failed" in cell]
    lines += [f"- {TITLES[p]}, {key['operation']}, {key['shape']}, {key['stage']}: {why}" for key, p, why in failed]
    return "\n".join(lines) + "\n"


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if "failed" in cell:
        return "failed"
    text = f"{cell['seconds'] * 1e3:.3f}"
    if cell.get("flop"):
        text += f" ({cell['flop'] / cell['seconds'] / 1e12:.0f})"
    else:
        text += f" ({cell['moved_bytes'] / cell['seconds'] / 1e12:.1f} TB/s)"
    return text + f" {cell['peak_bytes'] / 2**30:.2f} GiB"


def _ratio(cells: dict[str, dict[str, Any]]) -> str:
    times = {p: cell["seconds"] for p, cell in cells.items() if "seconds" in cell}
    peers = [seconds for p, seconds in times.items() if p != "ours"]
    return f"{min(peers) / times['ours']:.2f}" if peers and "ours" in times else ""


def picture(results: dict[str, Any], path: Path) -> None:
    """One bar per cell, as time relative to ours: longer is slower."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    members = [(key, cells) for key, cells in rows(results) if "seconds" in cells.get("ours", {})]
    if not members:
        return
    figure, axis = pyplot.subplots(figsize=(9, 1 + 0.75 * len(members)), layout="constrained")
    for index, (_, cells) in enumerate(members):
        shown = [p for p in PROVIDERS if "seconds" in cells.get(p, {})]
        for offset, provider in enumerate(shown):
            ratio = cells[provider]["seconds"] / cells["ours"]["seconds"]
            y = index + 0.8 * (offset - (len(shown) - 1) / 2) / len(shown)
            axis.barh(y, min(ratio, 4), height=0.8 / len(shown), color=f"C{PROVIDERS.index(provider)}")
            axis.text(min(ratio, 4), y, f" {cells[provider]['seconds'] * 1e3:.2f} ms", va="center", fontsize=6)
    axis.axvline(1, color="black", linewidth=0.5)
    axis.set_yticks(range(len(members)), [", ".join(key[k] for k in KEYS) for key, _ in members], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 4.6)
    axis.set_xlabel("time relative to ours, cut at 4: longer is slower")
    present = [p for p in PROVIDERS if any("seconds" in cells.get(p, {}) for _, cells in members)]
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{PROVIDERS.index(p)}") for p in present]
    axis.legend(handles, [TITLES[p] for p in present], fontsize=7)
    axis.set_title(results["gpu"])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    publish(HERE / "results", HERE.parent / "README.md")
