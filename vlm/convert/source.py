"""What converting a language model and a vision model have in common: read, check, write as a stream, say from what."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlm import checkpoint, files
from vlm.checkpoint import Manifest
from vlm.checkpoint.manifest import NAME, Kind
from vlm.weights import Folder, Table
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


def write(
    kind: Kind, part: str, source: Folder, table: Table, out: Path, config: dict[str, Any], side_files: tuple[str, ...]
) -> None:
    """Write one base model as a Megatron checkpoint, a tensor at a time.

    Args:
        kind: of the checkpoint, which is also the name of its folder under `huggingface`.
        part: attribute of the model.
        source: the folder it comes from, already checked against `table`.
        config: what `huggingface/{kind}/config.json` will hold.
        side_files: names taken over where they are there.
    """
    rows = {row.ours: row for row in table.rows}
    specs = {key: (source.dtype(row), row.shape) for key, row in rows.items()}
    total = sum(num_bytes(shape, dtype) for dtype, shape in specs.values())
    sides = [source.path / name for name in side_files if (source.path / name).is_file()]
    read = [source.path / name for name in ("config.json", INDEX) if (source.path / name).is_file()]
    read += [*sides, *source.files]
    needed = total + sum(path.stat().st_size for path in sides)
    # Hashing reads the same files at the same time, so that the second reader finds them in memory.
    writing = checkpoint.writing(out, reads=[source.path], needed_bytes=needed, replaces=NAME)
    with _hashing(read) as hashes, writing as folder:
        with tqdm(total=total, desc=f"convert {kind}", unit="B", unit_scale=True) as bar:

            def make(key: str) -> Any:
                tensor = source.join(rows[key])
                bar.update(tensor.nbytes)
                return tensor

            checkpoint.write_tensors(folder, specs, make)
        place = checkpoint.huggingface(folder, kind)
        place.mkdir(parents=True)
        files.write_json(place / "config.json", config)
        for path in sides:
            shutil.copyfile(path, place / path.name)
        sources = {f"{kind}/{name}": digest for name, digest in hashes().items()}
        Manifest(kind=kind, parts=(part,), sources=sources).write(folder)
