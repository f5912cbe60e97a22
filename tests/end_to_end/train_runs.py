"""Stages of a workspace that are trained and disturbed, and what they left compared to the bit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
import train_process
from torch.distributed import checkpoint as dcp
from train_workspace import ITERATIONS, Workspace

from vlm.train.metrics import TIMES, read_lines

NAMED_AT_NEXT_STEP = {"vlm.checkpoint.pending:Pending.busy": False}
"""Values for a run whose checkpoints are sure to be there one step after they were begun, however slow the disk."""


class Runs:
    """Starts stages of a workspace; the undisturbed ones are trained once."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.folder = workspace.folder
        self.config = workspace.config(self.folder / "config.yaml")

    def undisturbed(self, stage: str) -> Path:
        out = self.folder / "undisturbed" / stage
        if not out.exists():
            assert train_process.finish(self.start(stage, out)) == 0, log(out)
        return out

    def start(self, stage: str, out: Path, *events: Any, **changes: Any) -> Any:
        return train_process.start(out.with_suffix(".log"), *events, **self._arguments(stage, out, changes))

    def start_ranks(self, stage: str, out: Path, events: Any = None, **changes: Any) -> list[Any]:
        """Two data-parallel ranks; `changes` hold the configuration that promises them."""
        return train_process.start_ranks(
            out.with_suffix(".log"), 2, events or {}, **self._arguments(stage, out, changes)
        )

    def _arguments(self, stage: str, out: Path, changes: dict[str, Any]) -> dict[str, Any]:
        parent = self.workspace.combined if stage == "pretrain" else self.undisturbed("pretrain")
        out.parent.mkdir(parents=True, exist_ok=True)
        shared = {"config": self.config, "start_from": parent, "data": self.workspace.data}
        return {**shared, "stage": stage, "out": out, **changes}

    def train(self, stage: str, out: Path, *events: Any, **changes: Any) -> int:
        return train_process.finish(self.start(stage, out, *events, **changes))


def log(out: Path) -> str:
    return out.with_suffix(".log").read_text()


def content(checkpoint: Path) -> dict[str, Any]:
    """Every tensor and value of a checkpoint by name."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in metadata.items()}
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    own = {path.name: torch.load(path, weights_only=True) for path in checkpoint.glob("*_?????.pt")}
    for name, part in own.items():
        if name.startswith("data"):  # equal states may share objects differently
            part["loader"] = pickle.loads(part["loader"].numpy().tobytes())
            continue
        for key in [key for key in part["extra"]["totals"] if key.endswith("seconds")]:
            del part["extra"]["totals"][key]
        del part["extra"]["peak_memory_bytes"]
    return {**tensors, **own, "common": torch.load(checkpoint / "common.pt", weights_only=False)}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if hasattr(a, "__dict__"):
        return type(a) is type(b) and equal(vars(a), vars(b))
    return bool(a == b)


def assert_same(out: Path, reference: Path, iterations: int = ITERATIONS) -> None:
    last = f"checkpoints/iteration_{iterations:07d}"
    ours, theirs = content(out / last), content(reference / last)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not equal(ours[name], theirs[name])] == []
    lines, expected = (
        [
            {name: value for name, value in line.items() if name not in TIMES}
            for line in read_lines(path / "metrics.jsonl")
        ]
        for path in (out, reference)
    )
    assert lines == expected
    reports = [json.loads((path / "finished.json").read_text()) for path in (out, reference)]
    for report in reports:
        del report["seconds"], report["peak_memory_bytes"]
    assert reports[0] == reports[1]
