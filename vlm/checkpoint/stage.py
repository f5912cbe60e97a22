"""Everything a stage needs to go on as if it had never stopped: weights, optimizer, schedule, generators, loader.

Tensors that ranks share or split are in the distributed checkpoint. What belongs to one rank alone (its random
generators, its loader) is in `rank_00000.pt`, which holds tensors and plain values only and is read as such.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import distributed

from vlm.checkpoint import model as models
from vlm.checkpoint import places
from vlm.checkpoint.manifest import PARTS, Manifest, Parent, read_manifest

KEPT = 2
"""Checkpoints of a stage that stay: the newest, and one before it. A 7B model with its optimizer takes about 100 GB."""


@dataclass(frozen=True)
class Resumed:
    iteration: int
    """Iterations that are done."""
    loader: bytes
    """The loader's own state, as it was handed to `save_stage`."""
    extra: dict[str, Any]


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _world() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.pt"


def save_stage(
    out: Path,
    *,
    stage: str,
    iteration: int,
    parent: Path,
    trainable: Sequence[str],
    identity: str,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    loader: bytes = b"",
    extra: dict[str, Any] | None = None,
) -> Path:
    """Save a stage at an iteration; `latest` moves to it when it is complete and on disk, and all but the
    newest KEPT go. Called by all ranks.

    Args:
        out: the stage's folder; the checkpoint becomes `out/checkpoints/iteration_0000200`.
        stage: its name.
        iteration: iterations that are done.
        parent: the checkpoint that the stage started from, which keeps the parts that do not learn.
        trainable: parts that learn, as in the settings (`vision`, `projector`, `language`); only they are saved.
        identity: hash of everything that decides the weights.
        model: the `Llava`, wrapped or not.
        optimizer: megatron-core's optimizer.
        scheduler: megatron-core's `OptimizerParamScheduler`.
        loader: this rank's loader state.
        extra: numbers, strings, lists and tensors of this rank that come back with `load_stage`.

    Returns:
        The folder of the checkpoint.
    """
    destination = out / places.CHECKPOINTS / f"iteration_{iteration:07d}"
    parts = tuple(PARTS[part] for part in sorted(trainable))
    origin = places.resolve(parent)
    begun_from = read_manifest(origin)
    manifest = Manifest(
        kind="stage",
        parts=parts,
        models=begun_from.models,
        settings=begun_from.settings,
        stage=stage,
        iteration=iteration,
        training=identity,
        parent=Parent(os.path.relpath(origin.resolve(), destination.resolve()), begun_from.identity),
    )
    weights = models.sharded_state(model, parts)
    state = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, metadata=models.metadata()),
        "scheduler": scheduler.state_dict(),
    }
    own = {"generators": _generators(), "loader": _pack(loader), "extra": extra or {}, "world": _world()}
    with models.writing_together(destination, manifest, origin) as folder:
        models.write_state(folder, state)
        torch.save(own, _rank_file(folder, _rank()))
    if models.is_first():
        places.point_to(destination)
        places.prune(out, keep=KEPT)
    models.barrier()
    return destination


def load_stage(checkpoint: Path, *, model: Any, optimizer: Any, scheduler: Any) -> Resumed:
    """Put a stage back to where it was saved. Called by all ranks.

    Args:
        checkpoint: one written by `save_stage`, or the stage's folder.
        model: a `Llava` of the same settings, wrapped or not. All its parts are loaded.
        optimizer, scheduler: freshly built for it.

    Raises:
        ValueError: another number of ranks, or a file that is missing.
    """
    folder = places.resolve(checkpoint)
    path = _rank_file(folder, _rank())
    if not path.is_file():
        raise ValueError(f"{path}: is missing; resume with the parallel settings of the checkpoint")
    own = torch.load(path, map_location="cpu", weights_only=True)
    if own["world"] != _world():
        raise ValueError(f"{folder}: was saved by {own['world']} ranks, {_world()} are running: set parallel as it was")
    manifest = models.load_model(model, folder)
    weights = models.sharded_state(model, manifest.parts)
    sharded = optimizer.sharded_state_dict(weights, is_loading=True, metadata=models.metadata())
    state = models.read_state(folder, {"optimizer": sharded})
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    _set_generators(own["generators"])
    assert manifest.iteration is not None
    return Resumed(manifest.iteration, own["loader"].numpy().tobytes(), own["extra"])


def _pack(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _generators() -> dict[str, Any]:
    """States of all random generators of this rank, as tensors and plain values."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    _, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(numpy.asarray(keys).astype(numpy.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": dict(get_cuda_rng_tracker().get_states()),
    }


def _set_generators(states: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    keys, position, has_gauss, cached = states["numpy"]
    numpy.random.set_state(("MT19937", keys.numpy().astype(numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["megatron"])
