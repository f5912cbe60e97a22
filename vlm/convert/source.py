"""What converting a language model and a vision model have in common: read, check, write as a stream, say from what."""

from __future__ import annotations

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlm import checkpoint, files
from vlm.checkpoint import Manifest
from vlm.checkpoint.manifest import Kind
from vlm.weights import Folder, Table
from vlm.weights.tables import num_bytes

_BLOCK_BYTES = 1 << 22


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face model folder.

    Raises:
        ValueError: it is missing or holds no object.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder")
    config = files.read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'}: expected a JSON object")
    return config


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
    # Hashing reads the same files at the same time, so that the second reader finds them in memory.
    with ThreadPoolExecutor(1) as hasher, checkpoint.writing(out) as folder:
        described = [source.path / "config.json", *sides]
        hashes = {path.name: hasher.submit(sha256, path) for path in [*described, *source.files]}
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
        sources = {f"{kind}/{name}": hashed.result() for name, hashed in sorted(hashes.items())}
        Manifest(kind=kind, parts=(part,), sources=sources).write(folder)
