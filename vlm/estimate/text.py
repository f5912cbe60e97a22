"""The figures as tables to read."""

from __future__ import annotations

from typing import Any

GIB = 2**30
ROWS = {
    "weights": "weights",
    "gradients": "gradients, fp32",
    "masters": "masters, fp32",
    "moments": "Adam's moments, fp32",
    "activations": "activations of the layers",
    "image_activations": "activations of vision and projector",
    "working": "temporary, in backward",
    "total": "at the worst moment",
}


def text(found: dict[str, Any]) -> str:
    """Tables of what `vlm.estimate.estimate` found."""
    return "\n\n".join([_head(found), _parameters(found), _memory(found), _time(found), _disk(found), _verdict(found)])


def table(rows: list[list[str]], *, numbers: bool = True) -> str:
    """Columns two spaces apart, those after the first to the right where they are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) if numbers else cell for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def layout(of: dict[str, Any]) -> str:
    """A layout in words."""
    machines = f"{of['nodes']} x {of['ranks_per_node']} GPUs" if of["nodes"] > 1 else f"{of['gpus']} GPU(s)"
    words = [f"tensor {of['tensor']}", f"pipeline {of['pipeline']}", f"data {of['data']}"]
    words += [key.replace("_", " ") for key in ("sequence", "distributed_optimizer", "recompute") if of[key]]
    return f"{machines}: {', '.join(words)}"


def _head(found: dict[str, Any]) -> str:
    gpu = found["gpu"]
    return table(
        [
            ["run", found["run"]],
            ["GPU", f"{gpu['name']}, {_gib(gpu['memory_bytes'])} GiB, of them {_gib(gpu['usable_bytes'])} for tensors"],
            ["layout", f"{layout(found['layout'])} ({found['layout_from']})"],
            ["kernels", f"{found['backend']}, {found['dtype']}"],
            *([f"sizes of {part}", where] for part, where in found["models"].items()),
        ],
        numbers=False,
    )


def _parameters(found: dict[str, Any]) -> str:
    stages = found["stages"]
    rows = [["parameters", "", *stages]]
    for part, number in found["parameters"].items():
        learns = ["trainable" if part in stage["trainable"] else "frozen" for stage in stages.values()]
        rows.append([part, f"{number:,}", *learns])
    total = sum(found["parameters"].values())
    rows.append(
        ["all, and trainable", f"{total:,}", *(f"{stage['trainable_parameters']:,}" for stage in stages.values())]
    )
    return table(rows)


def _memory(found: dict[str, Any]) -> str:
    stages = found["stages"].values()
    rows = [["GiB per GPU", *found["stages"]]]
    rows += [[label, *(_gib(stage["memory"][key]) for stage in stages)] for key, label in ROWS.items()]
    rows.append(["fits", *("yes" if stage["fits"] else "NO" for stage in stages)])
    changed = "without" if found["layout"]["recompute"] else "with"
    rows.append([f"{changed} recompute", *(_gib(stage["total_with_recompute_changed"]) for stage in stages)])
    rows.append(["logits that are never stored", *(_gib(stage["logits_avoided_bytes"]) for stage in stages)])
    return table(rows)


def _time(found: dict[str, Any]) -> str:
    stages = found["stages"].values()
    sets = {name: one for stage in stages for name, one in stage["epochs"].items()}
    rows = [["time and data", *found["stages"]]]
    for label, value in (
        ("PFLOP per step", lambda stage: f"{stage['flops_per_step'] / 1e15:.3g}"),
        ("share of the peak (MFU) counted with", lambda stage: f"{stage['efficiency']['share']:.3f}"),
        ("seconds per step", lambda stage: f"{stage['seconds_per_step']:.3g}"),
        ("  of them waiting for other GPUs", lambda stage: f"{stage['waiting_seconds']:.3g}"),
        ("tokens per second", lambda stage: f"{stage['tokens_per_second']:,.0f}"),
        ("tokens of a sample, counted with", lambda stage: f"{stage['tokens_per_sample']:.0f}"),
        ("steps", lambda stage: f"{stage['iterations']:,}"),
        ("days", lambda stage: f"{stage['days']:.2f}"),
        ("samples", lambda stage: f"{stage['samples']:,}"),
        ("epochs", lambda stage: ", ".join(_epochs(one) for one in stage["epochs"].values())),
    ):
        rows.append([label, *(value(stage) for stage in stages)])
    notes = [f"{stage} counts with the MFU {one['efficiency']['found']}" for stage, one in found["stages"].items()]
    notes += [f"{name} has {_number(one['samples'])} samples ({one['found']})" for name, one in sets.items()]
    return "\n".join([table(rows), *notes])


def _disk(found: dict[str, Any]) -> str:
    rows = [["disk", "GB"]]
    rows += [[row["what"], "unknown" if row["bytes"] is None else _gb(row["bytes"])] for row in found["disk"]]
    rows.append(["in all, of what is known", _gb(sum(row["bytes"] or 0 for row in found["disk"]))])
    rows += [
        [f"one checkpoint of {name}, of at most {one['checkpoints']} at a time", _gb(one["checkpoint_bytes"])]
        for name, one in found["stages"].items()
    ]
    return table(rows)


def _verdict(found: dict[str, Any]) -> str:
    small = found["smallest_layout"]
    head = f"The run {'fits' if found['fits'] else 'does NOT fit'} and takes {found['days']:.2f} days."
    lines = [head]
    for name, one in (
        ("the run", small),
        *((name, stage["smallest_layout"]) for name, stage in found["stages"].items()),
    ):
        if one is None:
            lines.append(f"No layout of these GPUs holds {name}.")
            continue
        lines.append(
            f"The smallest layout for {name} is {layout(one)}; {_gib(one['peak_bytes'])} GiB per GPU, "
            f"{one['days']:.2f} days."
        )
    return "\n".join(lines)


def _epochs(one: dict[str, Any]) -> str:
    return "unknown" if one["epochs"] is None else f"{one['epochs']:.2f}"


def _number(value: int | None) -> str:
    return "an unknown number of" if value is None else f"{value:,}"


def _gib(num_bytes: float) -> str:
    return _short(num_bytes / GIB)


def _gb(num_bytes: float) -> str:
    return _short(num_bytes / 1e9)


def _short(value: float) -> str:
    """One decimal, more where it is small."""
    return f"{value:.1f}" if value >= 1 or not value else f"{value:.2g}"
