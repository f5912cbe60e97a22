"""Safetensors folders read and written one tensor at a time, so that a 14 GB model passes through a small machine.

Files are read by offset into fresh memory instead of being mapped: mapped pages count as resident memory and would
grow with the file. The format is that of https://github.com/huggingface/safetensors: 8 bytes little-endian length of
the header, a JSON header, the data.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.files import flushing, read_json
from vlm.weights.tables import Row, Shape, Table, num_bytes

Spec = tuple[torch.dtype, Shape]
"""Type and shape of a tensor."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
"""How pickles begin, and the zip archives that torch.save puts them in."""
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
_PICKLED = (
    "pickled weights are refused because loading them can run any code: load the model where you trust it and save it "
    "with save_pretrained, which writes safetensors"
)


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: Path
    type: str
    """As the header names it; `DTYPES` has those that are read."""
    shape: Shape
    start: int
    """Offset in the file in bytes."""
    num_bytes: int


def read_header(file: Path) -> dict[str, Entry]:
    """Names, types, shapes and places of all tensors of one file.

    Raises:
        ValueError: the file is not safetensors, is truncated, or its tensors do not fill it one after the other.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        first = stream.read(9)
        length = int.from_bytes(first[:8], "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            if first.startswith(_PICKLES):
                raise ValueError(f"{file}: is a pickle, not a safetensors file; {_PICKLED}")
            cut = "is truncated inside its header" if first[8:] == b"{" else "is truncated or not a safetensors file"
            raise ValueError(f"{file}: {cut}")
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError(f"{file}: is not a safetensors file (its header is not JSON)") from None
    try:
        found = {
            name: (item["data_offsets"], Entry(file, item["dtype"], tuple(item["shape"]), *_place(item, 8 + length)))
            for name, item in header.items()
            if name != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{file}: is not a safetensors file (its header describes no tensors)") from None
    end = 0
    for name, ((begin, stop), entry) in sorted(found.items(), key=lambda item: item[1][0]):
        if begin != end or stop < begin:
            raise ValueError(f"{file}: is damaged, {name} begins at byte {begin} of the data, expected {end}")
        needed = num_bytes(entry.shape, DTYPES[entry.type]) if entry.type in DTYPES else stop - begin
        if stop - begin != needed:
            raise ValueError(
                f"{file}: is damaged, {name} has {stop - begin} bytes, its shape {list(entry.shape)} needs {needed}"
            )
        end = stop
    if size != 8 + length + end:
        state = "truncated" if size < 8 + length + end else "damaged"
        raise ValueError(f"{file}: is {state}, it has {size} bytes and its header describes {8 + length + end}")
    return {name: entry for name, (_, entry) in found.items()}


def _place(item: Any, data: int) -> tuple[int, int]:
    begin, end = map(int, item["data_offsets"])
    return data + begin, end - begin


def read_bytes(file: Path, start: int, count: int, name: str) -> Tensor:
    """Bytes of a file as uint8, in memory of their own.

    Raises:
        ValueError: the file ends before; `name` says inside what.
    """
    tensor = torch.empty(count, dtype=torch.uint8)
    with open(file, "rb", buffering=0) as stream:
        stream.seek(start)
        view, done = memoryview(tensor.numpy()), 0
        while done < count:
            if not (got := stream.readinto(view[done:])):
                raise ValueError(f"{file}: is truncated inside {name}")
            done += got
    return tensor


class Folder:
    """The safetensors of one Hugging Face model folder, single or sharded with an index."""

    def __init__(self, path: Path) -> None:
        """Read all headers.

        Raises:
            ValueError: no safetensors (pickles are refused by name), a missing shard, a shard without a weight that the
                index places there, a truncated file.
        """
        self.path = path
        weight_map = _weight_map(path)
        self.files = [path / name for name in sorted(set(weight_map.values()))] if weight_map else [_only_file(path)]
        missing = [file.name for file in self.files if not file.is_file()]
        if missing:
            raise ValueError(f"{path / INDEX}: names {', '.join(missing)}, which the folder does not hold")
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            for name, entry in read_header(file).items():
                if name in self.entries:
                    raise ValueError(f"{path}: {name} is in {self.entries[name].file.name} and in {file.name}")
                self.entries[name] = entry
        for name, file_name in weight_map.items():
            if name not in self.entries or self.entries[name].file.name != file_name:
                raise ValueError(f"{path / INDEX}: names {name} in {file_name}, which does not hold it")

    def read(self, name: str) -> Tensor:
        """One tensor, in its stored type."""
        entry = self.entries[name]
        tensor = read_bytes(entry.file, entry.start, entry.num_bytes, name)
        return tensor.view(DTYPES[entry.type]).view(entry.shape)

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
            raise ValueError(f"{self.path}: {some(missing)} missing from {self._where()}")
        unexpected = [
            name
            for name in self.entries
            if name not in names and not any(table.ignored.fullmatch(name) for table in tables)
        ]
        if unexpected:
            raise ValueError(f"{self.path}: {some(unexpected)} unexpected: config.json describes no such weight")
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
            if (kind := self.entries[name].type) not in DTYPES:
                raise ValueError(
                    f"{self.entries[name].file}: {name} has type {kind}, supported are {', '.join(DTYPES)}; a "
                    "quantised model is no base to train on"
                )
        if len({self.entries[name].type for name in row.theirs}) > 1:
            raise ValueError(f"{self.path}: {', '.join(row.theirs)} differ in type")

    def join(self, row: Row) -> Tensor:
        """Our tensor of one row."""
        return row.join([self.read(name) for name in row.theirs])

    def place(self, row: Row) -> tuple[Path, int]:
        """Where the first of a row's tensors lies: in this order files are read from their beginnings to their ends."""
        entry = self.entries[row.theirs[0]]
        return entry.file, entry.start

    def dtype(self, row: Row) -> torch.dtype:
        return DTYPES[self.entries[row.theirs[0]].type]

    def _where(self) -> str:
        return self.files[0].name if len(self.files) == 1 else f"{len(self.files)} safetensors files"


def _weight_map(path: Path) -> dict[str, str]:
    """File name of each weight by the index, empty where there is none."""
    if not (path / INDEX).is_file():
        return {}
    index = read_json(path / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path / INDEX}: has no weight_map")
    return weight_map


def _only_file(path: Path) -> Path:
    """The one safetensors file of a folder without an index."""
    found = [path / SINGLE] if (path / SINGLE).is_file() else sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{path}: holds {', '.join(file.name for file in found)} but no {INDEX}")
    pickles = sorted(file for ending in PICKLE_ENDINGS for file in path.glob(f"*{ending}"))
    if not pickles:
        raise ValueError(f"{path}: holds neither {SINGLE} nor {INDEX}")
    names = ", ".join(file.name for file in pickles)
    raise ValueError(f"{path}: holds {names} but no safetensors; {_PICKLED}{_torchscript(pickles)}")


def _torchscript(pickles: list[Path]) -> str:
    """How to convert what OpenAI publishes CLIP as, where that is what is there."""
    for file in pickles:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any("/code/" in name for name in archive.namelist()):
                    return f". {file.name} is a TorchScript archive; if you trust it, run in its folder: " + (
                        'python -c "import torch; from safetensors.torch import save_file; save_file({k: '
                        f"v.contiguous() for k, v in torch.jit.load('{file.name}', 'cpu').state_dict().items()}}, "
                        f"'{SINGLE}')\""
                    )
    return ""


def some(names: list[str]) -> str:
    """The first few of many names and a verb, for a message."""
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
    with open(file, "wb") as stream, flushing(stream):
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in shard.items():
            delivered, tensor = next(tensors)
            assert delivered == name and tuple(tensor.shape) == shape, (delivered, name, tensor.shape, shape)
            data = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
            assert len(data) == math.prod(shape) * dtype.itemsize
            stream.write(memoryview(data.numpy()))
            progress(len(data))
