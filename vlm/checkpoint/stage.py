"""Everything a stage needs to go on as if it had never stopped: weights, optimizer, schedule, generators, loader.

Tensors that ranks share or split are in the distributed checkpoint, which is read at any layout. What belongs to one
rank alone (its random generators) is in `rank_00000.pt`, the place in the data of each data-parallel rank in
`data_00000.pt`; both hold tensors and plain values only and are read as such.
"""

from __future__ import annotations

import os
import random
import shutil
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
from vlm.checkpoint.pending import NotSaved, Pending
from vlm.checkpoint.tensors import Held


@dataclass(frozen=True)
class Resumed:
    iteration: int
    """Iterations that are done."""
    loader: bytes | None
    """The loader's own state, as this data-parallel rank handed it to `save_stage`; None where there were more or
    fewer such ranks."""
    extra: dict[str, Any]
    layout: dict[str, int]
    """Ranks by their kind (`tensor`, `pipeline`, `data`) when it was saved."""


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _layout() -> dict[str, int]:
    from megatron.core import parallel_state

    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def _distributed(optimizer: Any) -> bool:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return any(isinstance(one, DistributedOptimizer) for one in optimizer.chained_optimizers)


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.pt"


def _data_file(folder: Path) -> Path:
    from megatron.core import parallel_state

    return folder / f"data_{parallel_state.get_data_parallel_rank():05d}.pt"


def begin_stage(
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
    keep: int = 2,
    best: int | None = None,
) -> Pending:
    """Begin to save a stage at an iteration. Called by all ranks, which may train on when it returns.

    When the checkpoint is finished, `latest` moves to it and older ones go.

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
        loader: the loader's state, from the first rank of every tensor and pipeline parallel group.
        extra: numbers, strings, lists and tensors of this rank that come back with `load_stage`.
        keep: how many of the newest checkpoints stay.
        best: iteration of the one that stays beside them, and which `best` names from now on.

    Raises:
        NotSaved: the folder cannot be written.
    """
    from megatron.core import parallel_state

    destination = places.iteration_folder(out, iteration)
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
    of_optimizer = optimizer.sharded_state_dict(weights, metadata=models.metadata())
    state = {
        "model": weights,
        # A distributed optimizer's state is None on data-parallel ranks after the first.
        "optimizer": {key: value for key, value in of_optimizer.items() if value is not None},
        "scheduler": scheduler.state_dict(),
    }
    own = {
        "generators": _generators(),
        "extra": extra or {},
        "layout": _layout(),
        "distributed_optimizer": _distributed(optimizer),
    }
    held: dict[str, Held] = {}
    try:
        folder = models.prepare(destination)
        models.write_state(folder, state, held)
        held[_rank_file(folder, _rank()).name] = _content(own)
        if parallel_state.get_model_parallel_group().rank() == 0:
            held[_data_file(folder).name] = _content({"loader": _pack(loader)})
    except OSError as error:
        shutil.rmtree(destination.with_name(f".{destination.name}.writing"), ignore_errors=True)
        raise NotSaved(destination, error, sum(one.num_bytes for one in held.values())) from error

    def publish() -> None:
        models.complete(folder, destination, manifest, origin)
        places.point_to(destination)
        places.name_best(out, best)
        places.prune(out, keep=keep)

    return Pending(destination, folder, held, publish)


def save_stage(out: Path, **options: Any) -> Path:
    """`begin_stage` and wait until the checkpoint is finished; returns its folder."""
    return begin_stage(out, **options).finish()


def _content(value: Any) -> Held:
    content = Held()
    torch.save(value, content)
    return content


def load_stage(checkpoint: Path, *, model: Any, optimizer: Any, scheduler: Any) -> Resumed:
    """Put a stage back to where it was saved, at the same layout or another. Called by all ranks.

    At another layout the random generators stay as they are: training draws nothing from them.

    Args:
        checkpoint: one written by `save_stage`, or the stage's folder.
        model: a `Llava` of the same settings, wrapped or not. All its parts are loaded.
        optimizer, scheduler: freshly built for it.

    Raises:
        ValueError: the other kind of optimizer, or a file that is missing.
    """
    folder = places.resolve(checkpoint)
    own = _load(_rank_file(folder, 0))
    then, now = own["layout"], _layout()
    if own["distributed_optimizer"] != _distributed(optimizer):
        raise ValueError(
            f"parallel.distributed_optimizer: is {_name(_distributed(optimizer))}, but {folder} was saved with "
            f"{_name(own['distributed_optimizer'])}, which stores its state in another form; set it back"
        )
    if then == now:
        own = _load(_rank_file(folder, _rank()))
    place = _load(_data_file(folder))["loader"].numpy().tobytes() if then["data"] == now["data"] else None
    manifest = models.load_model(model, folder)
    weights = models.sharded_state(model, manifest.parts)
    sharded = optimizer.sharded_state_dict(weights, is_loading=True, metadata=models.metadata())
    state = models.read_state(folder, {"optimizer": sharded})
    # bfloat16's optimizer asks for a list of masters even where a pipeline stage trains nothing (optimizer.py:880).
    state["optimizer"].setdefault("fp32_from_fp16_params", [])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if then == now:
        _set_generators(own["generators"])
    assert manifest.iteration is not None
    return Resumed(manifest.iteration, place, own["extra"], then)


def _name(value: bool) -> str:
    return str(value).lower()


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: is missing; remove its folder, and the stage goes on from the checkpoint before")
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


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
