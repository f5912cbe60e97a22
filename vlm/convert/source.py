"""What converting a language model and a vision model have in common: read, check, write as a stream, say from what."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from vlm import checkpoint, files
from vlm.checkpoint import Manifest
from vlm.checkpoint.manifest import NAME, Kind
from vlm.weights import Folder, Row
from vlm.weights.folder import INDEX, PICKLE_ENDINGS
from vlm.weights.tables import num_bytes

_BLOCK_BYTES = 1 << 22


def open_folder(source: Path) -> Folder:
    """The weights of a Hugging Face model folder.

    Raises:
        ValueError: it is none, or what `vlm.weights.Folder` refuses.
    """
    if source.is_file():
        what = "a pickle, which is not read; what is" if source.suffix in PICKLE_ENDINGS else "a file; what"
        raise ValueError(f"{source}: is {what} converted is a folder with config.json and safetensors")
    if not source.is_dir():
        raise ValueError(f"{source}: is not a folder")
    return Folder(source)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face model folder.

    Raises:
        ValueError: it is missing or holds no object.
    """
    config = files.read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'}: expected a JSON object")
    return config


@contextmanager
def _hashing(paths: Iterable[Path]) -> Iterator[Callable[[], dict[str, str]]]:
    """Hash files in the background; the function waits for the hashes, by name."""
    hasher = ThreadPoolExecutor(1)
    hashes = {path.name: hasher.submit(sha256, path) for path in paths}
    try:
        yield lambda: {name: hashes[name].result() for name in sorted(hashes)}
    finally:
        hasher.shutdown(cancel_futures=True)


def sha256(path: Path) -> str:
    """Hash of a file, read in blocks."""
    total = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            total.update(block)
    return total.hexdigest()


@dataclass(frozen=True)
class Base:
    """What a checkpoint keeps of one base model beside its weights."""

    config: dict[str, Any]
    """Becomes `huggingface/{part}/config.json`."""
    side_files: tuple[str, ...]
    """Names taken over where they are there."""


def write(
    name: str,
    kind: Kind,
    parts: tuple[str, ...],
    source: Folder,
    rows: Sequence[Row],
    out: Path,
    bases: Mapping[str, Base],
    **described: Any,
) -> None:
    """Write a model's folder as a Megatron checkpoint, a tensor at a time.

    Args:
        name: of the conversion, before the names of the files it read.
        kind, parts, described: of the manifest.
        source: already checked against `rows`.
        bases: by `language` or `vision`.
    """
    by_key = {row.ours: row for row in sorted(rows, key=source.place)}
    specs = {key: (source.dtype(row), row.shape) for key, row in by_key.items()}
    total = sum(num_bytes(shape, dtype) for dtype, shape in specs.values())
    side_files = dict.fromkeys(file for base in bases.values() for file in base.side_files)
    read = [path for file in ("config.json", INDEX, *side_files) if (path := source.path / file).is_file()]
    needed = total + sum(path.stat().st_size for path in read)
    writing = checkpoint.writing(out, reads=[source.path], needed_bytes=needed, replaces=NAME)
    # Hashing reads the same files at the same time and in the same order: the second reader finds them in memory.
    with _hashing([*read, *source.files]) as hashes, writing as folder:
        with tqdm(total=total, desc=f"convert {name}", unit="B", unit_scale=True) as bar:

            def make(key: str) -> Tensor:
                tensor = source.join(by_key[key])
                bar.update(tensor.nbytes)
                return tensor

            checkpoint.write_tensors(folder, specs, make)
        for part, base in bases.items():
            place = checkpoint.huggingface(folder, part)
            place.mkdir(parents=True)
            files.write_json(place / "config.json", base.config)
            for path in read:
                if path.name in base.side_files:
                    shutil.copyfile(path, place / path.name)
        sources = {f"{name}/{file}": digest for file, digest in hashes().items()}
        Manifest(kind=kind, parts=parts, sources=sources, **described).write(folder)
