"""The tensors of a distributed checkpoint as a stream, one at a time, without a model and without process groups.

megatron-core's `torch_dist` format is that of `torch.distributed.checkpoint` (`.metadata` and `*.distcp`) with two
small files beside: `metadata.json`, which names the format, and `common.pt`, for what is not sharded. Keys carry the
number of their layer (megatron-core's `non_homogeneous_layers`), so that a model with fewer layers reads what it needs.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _write_item
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from vlm import files
from vlm.checkpoint import places

Spec = tuple[torch.dtype, tuple[int, ...]]
METADATA = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
"""How megatron-core names and shards what it saves; stored with the checkpoint. A distributed optimizer's state is
gathered on the first data-parallel rank alone: all of them together would hold it once per rank."""
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class _StreamPlanner(dcp.DefaultSavePlanner):
    """Announces tensors by type and shape, and makes each only when it is written."""

    def __init__(self, specs: Mapping[str, Spec], make: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._specs, self._make = specs, make

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_item(key, dtype, torch.Size(shape)) for key, (dtype, shape) in self._specs.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        tensor = self._make(index.fqn).detach()
        dtype, shape = self._specs[index.fqn]
        assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape), (index.fqn, tensor.dtype, tensor.shape)
        return tensor


class Held:
    """Content of a file that is written later, as a stream. It stays in the pieces in which it came: one growing
    buffer (`io.BytesIO`) would be moved again and again, and takes three times as long."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.num_bytes = 0

    def write(self, piece: bytes | memoryview) -> int:
        self.pieces.append(bytes(piece))
        self.num_bytes += len(self.pieces[-1])
        return len(self.pieces[-1])

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        """Nothing is on its way anywhere."""


class Writer(dcp.FileSystemWriter):
    """Writes one file per rank, a tensor at a time, or into memory for `vlm.checkpoint.pending` to write.

    The base class keeps every tensor it has written until the file is closed
    (torch/distributed/checkpoint/filesystem.py: `_write_files_from_queue`): the whole model, on a GPU a copy of it.
    """

    def __init__(self, folder: Path | str, held: dict[str, Held] | None = None) -> None:
        super().__init__(folder)
        self._held = held
        """Gets the content by file name, if the files are to be written later."""

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        if self._held is None:
            with open(Path(self.path) / name, "wb") as stream, files.flushing(stream):
                results = self._write_items(stream, name, plan, planner)
        else:
            self._held[name] = Held()
            results = self._write_items(self._held[name], name, plan, planner)
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(results)
        return future

    def _write_items(self, stream: Any, name: str, plan: SavePlan, planner: dcp.SavePlanner) -> list[WriteResult]:
        with _without_checksums():
            return [
                _write_item(
                    self.transforms, stream, _plain(planner.resolve_data(item)), item, name, self.serialization_format
                )
                for item in plan.items
            ]


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Each tensor is a zip archive whose CRC32 nobody checks: torch.load does not (torch/serialization.py:
    `set_crc32_options`). Computing it took 0.3 s of CPU per 1.4 GB."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _plain(data: Tensor | io.BytesIO) -> Tensor | io.BytesIO:
    """On the CPU, and not a view: a view would be written with all of the memory it looks at."""
    if not isinstance(data, Tensor):
        return data
    tensor = data.detach().to("cpu")
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _item(key: str, dtype: torch.dtype, shape: torch.Size) -> WriteItem:
    offsets = torch.Size([0] * len(shape))
    return WriteItem(
        index=MetadataIndex(key, offsets),
        type=WriteItemType.TENSOR,
        tensor_data=TensorWriteData(ChunkStorageMetadata(offsets, shape), TensorProperties(dtype=dtype), shape),
    )


def write_tensors(folder: Path, specs: Mapping[str, Spec], make: Callable[[str], Tensor]) -> None:
    """Write a distributed checkpoint into an empty folder.

    Args:
        folder: see `vlm.checkpoint.writing`.
        specs: type and global shape per key, in the order of writing.
        make: returns the tensor of a key; called once per key, and its result is dropped after writing.
    """
    with _alone():
        dcp.save({}, storage_writer=Writer(folder), planner=_StreamPlanner(specs, make), no_dist=True)
    with open(
        folder / "common.pt", "wb"
    ) as stream:  # by its name, torch would report a full disk as an error of its own
        torch.save({"content_metadata": METADATA}, stream)
    (folder / "metadata.json").write_text(json.dumps(_FORMAT))


@contextmanager
def _alone() -> Iterator[None]:
    """Silences the warning that no process group is there: that is meant."""
    with warnings.catch_warnings(), own_errors():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def own_errors() -> Iterator[None]:
    """Raises what went wrong, which `torch.distributed.checkpoint` wraps in an exception of its own."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


class _Reader(dcp.FileSystemReader):
    """Reads `.metadata` once instead of once per tensor."""

    @cached_property
    def _metadata(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def _reader(folder: Path) -> _Reader:
    for name in (".metadata", "metadata.json", "common.pt"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: is missing, the checkpoint is not complete")
    reader = _Reader(folder)
    try:
        pieces = reader.read_metadata().storage_data.values()
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise ValueError(f"{folder / '.metadata'}: is damaged ({error})") from None
    ends: dict[str, int] = {}
    for piece in pieces:
        ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, end in ends.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: is missing, the checkpoint is not complete")
        if (size := (folder / name).stat().st_size) < end:
            raise ValueError(f"{folder / name}: is truncated, {size} of {end} bytes are there")
    return reader


def _specs(reader: _Reader) -> dict[str, Spec]:
    tensors = reader.read_metadata().state_dict_metadata
    return {
        key: (item.properties.dtype, tuple(item.size))
        for key, item in tensors.items()
        if isinstance(item, TensorStorageMetadata)
    }


class Tensors:
    """Weights of a checkpoint and, for parts it does not hold, of those it was trained from."""

    def __init__(self, path: Path) -> None:
        """Open a checkpoint (see `vlm.checkpoint.resolve`) and its parents.

        Raises:
            ValueError: a checkpoint of the chain is missing or incomplete.
        """
        self.links = places.chain(path)
        self.specs: dict[str, Spec] = {}
        self.folders: dict[str, Path] = {}
        self._readers: dict[Path, _Reader] = {}
        for folder, manifest in self.links:
            self._readers[folder] = _reader(folder)
            for key, spec in _specs(self._readers[folder]).items():
                if key.split(".")[0] in manifest.parts and key not in self.specs:
                    self.specs[key], self.folders[key] = spec, folder

    def read(self, key: str) -> Tensor:
        """One whole tensor in its stored type, however many ranks wrote it."""
        dtype, shape = self.specs[key]
        state = {key: torch.empty(shape, dtype=dtype)}
        with _alone():
            dcp.load(state, storage_reader=self._readers[self.folders[key]], no_dist=True)
        return state[key]
