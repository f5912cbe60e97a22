"""A model's weights into and out of a distributed checkpoint, at any number of ranks.

megatron-core is imported inside the functions: it takes seconds, and reading tensors needs none of it.
"""

from __future__ import annotations

import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed

from vlm import files
from vlm.checkpoint.manifest import Manifest
from vlm.checkpoint.tensors import METADATA, Held, Tensors, Writer, own_errors

State = dict[str, Any]


def unwrap(model: Any) -> Any:
    """The model inside DistributedDataParallel and Float16Module."""
    while not hasattr(model, "vision_model") and hasattr(model, "module"):
        model = model.module
    return model


def metadata() -> dict[str, Any]:
    """What megatron-core's `sharded_state_dict` methods are told."""
    from megatron.core import parallel_state

    return {**METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def sharded_state(model: Any, parts: Iterable[str] | None = None) -> State:
    """The model's sharded tensors by key of its `state_dict`.

    Args:
        model: a `Llava`, wrapped or not.
        parts: attributes to keep, all if None.
    """
    state = unwrap(model).sharded_state_dict(metadata=metadata())
    kept = None if parts is None else tuple(f"{part}." for part in parts)
    chosen = {}
    for key, item in state.items():
        if "_extra_state" in key or (kept is not None and not key.startswith(kept)):
            continue  # extra states hold nothing, or 8-bit scales that are found again
        chosen[key] = item
    return chosen


def _save_strategy(held: dict[str, Held] | None) -> Any:
    """megatron-core's `torch_dist` save strategy on the writer of `torch.distributed.checkpoint`.

    The one megatron-core ships (dist_checkpointing/strategies/filesystem_async.py:54) spawns a process that loads
    `__main__` again and forks writers: seconds for a miniature checkpoint that this one writes in 0.1 s. The files
    are the same.
    """
    from megatron.core.dist_checkpointing.strategies import torch as mcore
    from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy

    class Direct(SaveShardedStrategy):
        def save(self, sharded_state_dict: State, checkpoint_dir: Path | str) -> None:
            state, _, _ = mcore._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
            with own_errors():
                dcp.save(
                    mcore.mcore_to_pyt_state_dict(state, is_loading=False),
                    storage_writer=Writer(checkpoint_dir, held),
                    planner=mcore.MCoreSavePlanner(flatten_state_dict=False),
                )

        @property
        def can_handle_sharded_objects(self) -> bool:
            return True

    return Direct("torch_dist", 1)


def write_state(folder: Path, state: State, held: dict[str, Held] | None = None) -> None:
    """Write sharded tensors and what is not sharded into a folder that all ranks see. Called by all ranks.

    Args:
        held: gets the content of this rank's tensor file by name, which is then left to be written.
    """
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(
        state,
        str(folder),
        sharded_strategy=_save_strategy(held),
        content_metadata=dict(METADATA),
        # A pipeline stage whose part is frozen has no optimizer state: only what all ranks have is compared.
        preprocess_common_before_consistancy_check=lambda common: {"scheduler": common.get("scheduler")},
    )


def read_state(folder: Path, state: State) -> State:
    """Fill sharded tensors in place from one folder; returns the state with pieces joined. Called by all ranks."""
    from megatron.core import dist_checkpointing

    with warnings.catch_warnings():
        # dist_checkpointing/strategies/torch.py:799 calls a function that torch has renamed
        warnings.filterwarnings("ignore", message="`load_state_dict` is deprecated")
        found: State = dist_checkpointing.load(state, str(folder), validate_access_integrity=False)
    return found


def save(out: Path, sharded_state: State, manifest: Manifest, side_files: Path | None = None) -> Path:
    """Write one checkpoint, complete or absent. Called by all ranks.

    Args:
        out: its folder, which all ranks see.
        sharded_state: nested dictionary of megatron-core's sharded tensors, and of plain values equal on all ranks.
        manifest: what it is.
        side_files: a checkpoint whose `huggingface` folder is taken over.
    """
    with writing_together(out, manifest, side_files) as folder:
        write_state(folder, sharded_state)
    return out


@contextmanager
def writing_together(out: Path, manifest: Manifest, side_files: Path | None) -> Iterator[Path]:
    """As `vlm.checkpoint.writing`, for a folder that all ranks write into; the first adds what is not theirs."""
    folder = prepare(out)
    try:
        yield folder
        barrier()
        if is_first():
            complete(folder, out, manifest, side_files)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    barrier()


def prepare(out: Path) -> Path:
    """A fresh folder beside `out` that all ranks see. Called by all ranks."""
    folder = out.parent / f".{out.name}.writing"
    if is_first():
        files.beside(out)
    barrier()
    return folder


def complete(folder: Path, out: Path, manifest: Manifest, side_files: Path | None) -> None:
    """Add what no rank of its own writes and give the folder its name. Called on the first rank."""
    if side_files is not None:
        shutil.copytree(side_files / "huggingface", folder / "huggingface")
    manifest.write(folder)
    files.put_in_place(folder, out)


def is_first() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def barrier() -> None:
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.barrier()


def load_model(model: Any, path: Path) -> Manifest:
    """Load every weight of a model, from a checkpoint and, for parts it does not hold, from its parents.

    Args:
        model: a `Llava` at any tensor and pipeline parallel size, of any backend and dtype; called by all ranks.
        path: a checkpoint or a stage's folder. One of kind `language` or `vision` loads that part alone.

    Returns:
        The manifest of the newest checkpoint.

    Raises:
        ValueError: a weight is in no checkpoint of the chain, or has another shape there.
    """
    tensors = Tensors(path)
    manifest = tensors.links[0][1]
    alone = manifest.parts if manifest.kind in ("language", "vision") else None
    state = sharded_state(model, alone)
    missing = [item.key for item in state.values() if item.key not in tensors.specs]
    if missing:
        folders = " and ".join(str(folder) for folder, _ in tensors.links)
        raise ValueError(f"{folders}: no weight {missing[0]} (and {len(missing) - 1} more) for this model")
    by_folder: dict[Path, State] = defaultdict(dict)
    for key, item in state.items():
        _check_shape(item, tensors)
        by_folder[tensors.folders[item.key]][key] = item
    loaded: State = {}
    for folder in dict.fromkeys(tensors.folders.values()):  # reading is collective, even where a rank wants nothing
        wanted = by_folder[folder]
        found = read_state(folder, wanted)
        loaded.update({key: found[key] for key in wanted})
    with torch.no_grad():
        own = unwrap(model).state_dict(keep_vars=True)
        forgotten = [key for key in own if key not in loaded and "_extra_state" not in key and alone is None]
        assert not forgotten, f"{forgotten[0]}: its module's sharded_state_dict leaves it out"
        for key, value in loaded.items():
            if own[key].data_ptr() != value.data_ptr():  # tensors that were joined from pieces; the rest is in place
                own[key].copy_(value)
    return manifest


def _check_shape(item: Any, tensors: Tensors) -> None:
    """Refuse a weight of another size; a vocabulary may be padded differently."""
    found = tensors.specs[item.key][1]
    if not hasattr(item, "global_shape"):
        return  # a factory (gate and up): its pieces are checked by megatron-core
    wanted = tuple(item.global_shape)
    same = found[1:] == wanted[1:] if item.allow_shape_mismatch else found == wanted
    if not same:
        raise ValueError(
            f"{tensors.folders[item.key]}: {item.key} has shape {list(found)}, the model has {list(wanted)}; is it the "
            "checkpoint of these base models and this models.projector?"
        )
