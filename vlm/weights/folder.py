"""Safetensors folders read and written one tensor at a time, so that a 14 GB model passes through a small machine.

Files are read by offset into fresh memory instead of being mapped: mapped pages count as resident memory and would
grow with the file. The format is that of https://github.com/huggingface/safetensors: 8 bytes little-endian length of
the header, a JSON header, the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.files import read_json
from vlm.weights.tables import Row, Shape, Table, num_bytes

Spec = tuple[torch.dtype, Shape]
"""Type and shape of a tensor."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: Shape
    start: int
    """Offset in the file in bytes."""


def read_header(file: Path) -> dict[str, Entry]:
    """Names, types, shapes and places of all tensors of one file.

    Raises:
        ValueError: the file is not safetensors, is truncated, or holds a type that is not a floating-point one.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{file}: is truncated or not a safetensors file")
        try:
            header = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError(f"{file}: is not a safetensors file (its header is not JSON)") from None
    entries = {}
    for name, item in header.items():
        if name == "__metadata__":
            continue
        begin, end = item["data_offsets"]
        if item["dtype"] not in DTYPES:
            # Only position_ids and the like; the caller finds out whether it was needed.
            continue
        dtype, shape = DTYPES[item["dtype"]], tuple(item["shape"])
        if end - begin != num_bytes(shape, dtype):
            raise ValueError(f"{file}: {name} has {end - begin} bytes, its shape {list(shape)} needs another number")
        entries[name] = Entry(file, dtype, shape, 8 + length + begin)
    needed = 8 + length + max((item["data_offsets"][1] for n, item in header.items() if n != "__metadata__"), default=0)
    if size < needed:
        raise ValueError(f"{file}: is truncated, {size} of {needed} bytes are there")
    return entries


class Folder:
    """The safetensors of one Hugging Face model folder, single or sharded with an index."""

    def __init__(self, path: Path) -> None:
        """Read all headers.

        Raises:
            ValueError: no safetensors (pickles are refused by name), a missing shard, a truncated file.
        """
        self.path = path
        if (path / INDEX).is_file():
            weight_map: dict[str, str] = read_json(path / INDEX).get("weight_map", {})
            self.files = [path / name for name in sorted(set(weight_map.values()))]
            missing = [file.name for file in self.files if not file.is_file()]
            if missing:
                raise ValueError(f"{path / INDEX}: names {', '.join(missing)}, which the folder does not hold")
        elif (path / SINGLE).is_file():
            weight_map, self.files = {}, [path / SINGLE]
        else:
            pickles = sorted(file.name for ending in ("bin", "pt", "pth") for file in path.glob(f"*.{ending}"))
            if pickles:
                raise ValueError(
                    f"{path}: holds {', '.join(pickles)} but no safetensors; pickled weights are refused because "
                    "loading them can run any code: save the model with save_pretrained(safe_serialization=True)"
                )
            raise ValueError(f"{path}: holds neither {SINGLE} nor {INDEX}")
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            self.entries.update(read_header(file))
        for name, file_name in weight_map.items():
            if name in self.entries and self.entries[name].file.name != file_name:
                raise ValueError(f"{path / INDEX}: {name} should be in {file_name}, found elsewhere")

    def read(self, name: str) -> Tensor:
        """One tensor, in its stored type."""
        entry = self.entries[name]
        tensor = torch.empty(num_bytes(entry.shape, entry.dtype), dtype=torch.uint8)
        with open(entry.file, "rb", buffering=0) as stream:
            stream.seek(entry.start)
            view = memoryview(tensor.numpy())
            done = 0
            while done < len(view):
                count = stream.readinto(view[done:])
                if not count:
                    raise ValueError(f"{entry.file}: is truncated inside {name}")
                done += count
        return tensor.view(entry.dtype).view(entry.shape)

    def prefix(self, table_name: str, candidates: Iterable[str]) -> str:
        """The first of `candidates` with which the tensor is there, else the first."""
        choices = list(candidates)
        return next((prefix for prefix in choices if prefix + table_name in self.entries), choices[0])

    def check(self, *tables: Table) -> None:
        """Compare with the tables that together describe the folder, before anything is written.

        Raises:
            ValueError: naming missing and unexpected tensors, and shapes that contradict `config.json`.
        """
        rows = [row for table in tables for row in table.rows]
        names = {name for row in rows for name in row.theirs}
        missing = sorted(names - self.entries.keys())
        if missing:
            raise ValueError(f"{self.path}: {_some(missing)} missing from {self._where()}")
        unexpected = [
            name
            for name in self.entries
            if name not in names and not any(table.ignored.fullmatch(name) for table in tables)
        ]
        if unexpected:
            raise ValueError(f"{self.path}: {_some(unexpected)} unexpected: config.json describes no such weight")
        for row in rows:
            self._check_row(row)

    def _check_row(self, row: Row) -> None:
        for name, dims, shape in zip(row.theirs, row.dims, row.shapes, strict=True):
            found = self.entries[name].shape
            if found != shape:
                raise ValueError(
                    f"{self.entries[name].file}: {name} has shape {list(found)}, config.json gives {list(shape)} "
                    f"({', '.join(dims)})"
                )
        if len({self.entries[name].dtype for name in row.theirs}) > 1:
            raise ValueError(f"{self.path}: {', '.join(row.theirs)} differ in type")

    def join(self, row: Row) -> Tensor:
        """Our tensor of one row."""
        return row.join([self.read(name) for name in row.theirs])

    def dtype(self, row: Row) -> torch.dtype:
        return self.entries[row.theirs[0]].dtype

    def _where(self) -> str:
        return self.files[0].name if len(self.files) == 1 else f"{len(self.files)} safetensors files"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{shown}{rest} {'is' if len(names) == 1 else 'are'}"


def write_sharded(
    folder: Path,
    specs: Mapping[str, Spec],
    tensors: Iterator[tuple[str, Tensor]],
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Write safetensors as the Hub has them: one file, or shards with an index.

    Args:
        folder: an existing empty folder; the caller makes it appear under its final name.
        specs: type and shape per name, in the order in which `tensors` delivers them.
        tensors: name and tensor, one at a time; converted to the type in `specs`.
        progress: told the bytes written.
    """
    shards: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, (dtype, shape) in specs.items():
        size = num_bytes(shape, dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (dtype, shape)
        filled += size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, name))
        _write_file(folder / name, shard, tensors, progress)
    if len(shards) > 1:
        total = sum(num_bytes(shape, dtype) for dtype, shape in specs.values())
        with open(folder / INDEX, "w") as stream:
            json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, stream, indent=2)


def _write_file(
    file: Path,
    shard: Mapping[str, Spec],
    tensors: Iterator[tuple[str, Tensor]],
    progress: Callable[[int], object],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in shard.items():
        size = num_bytes(shape, dtype)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in shard.items():
            delivered, tensor = next(tensors)
            assert delivered == name and tuple(tensor.shape) == shape, (delivered, name, tensor.shape, shape)
            data = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
            assert len(data) == math.prod(shape) * dtype.itemsize
            stream.write(memoryview(data.numpy()))
            progress(len(data))
        stream.flush()
        os.fsync(stream.fileno())
