"""What every exported folder has in common: a stream of safetensors, side files, and a note of where it comes from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vlm import checkpoint, files
from vlm.checkpoint import Tensors
from vlm.checkpoint.manifest import versions
from vlm.weights import Row, write_sharded
from vlm.weights.folder import Spec
from vlm.weights.tables import num_bytes

PROVENANCE = "provenance.json"
"""Says which checkpoint a folder was exported from; a folder that has it may be replaced by another export."""
MAX_SHARD_BYTES = 5_000_000_000
"""As the folders on the Hub."""


def write(
    tensors: Tensors,
    rows: Sequence[Row],
    out: Path,
    part: str,
    finish: Callable[[Path], None],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the weights of some rows, a tensor at a time, and what makes them a model's folder.

    Args:
        out: complete or absent; an older export there is replaced at the end.
        part: `llava`, `language` or `vision`.
        finish: adds configuration, tokenizer and the like to the folder it is given.
        dtype: of all weights; None for those in which they are stored.

    Raises:
        ValueError: a weight is in no checkpoint of the chain, or `vlm.files.writing` refuses the place.
    """
    path, manifest = tensors.links[0]
    missing = [row.ours for row in rows if row.ours not in tensors.specs]
    if missing:
        raise ValueError(f"{path}: no weight {missing[0]} (and {len(missing) - 1} more), which {part} needs")
    specs: dict[str, Spec] = {
        name: (dtype or tensors.specs[row.ours][0], shape)
        for row in rows
        for name, shape in zip(row.theirs, row.shapes, strict=True)
    }
    total = sum(num_bytes(shape, kind) for kind, shape in specs.values())
    reads = [folder for folder, _ in tensors.links]
    with checkpoint.writing(out, reads=reads, needed_bytes=total, replaces=PROVENANCE) as folder:
        with tqdm(total=total, desc=f"export {part}", unit="B", unit_scale=True) as bar:
            write_sharded(folder, specs, _stream(rows, tensors), max_shard_bytes, bar.update)
        finish(folder)
        made_from = {"identity": manifest.identity, "stage": manifest.stage or manifest.kind}
        chain = [{"identity": link.identity, "stage": link.stage or link.kind} for _, link in tensors.links[1:]]
        note = {"part": part, "checkpoint": made_from | {"iteration": manifest.iteration}, "trained_from": chain}
        files.write_json(folder / PROVENANCE, note | {"sources": tensors.links[-1][1].sources, "versions": versions()})


def _stream(rows: Sequence[Row], tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    for row in rows:
        yield from row.split(tensors.read(row.ours)).items()


def copy_side_files(source: Path, folder: Path) -> None:
    """All of a base model's files but its configurations, which every export writes anew."""
    for path in source.iterdir():
        if path.name not in ("config.json", "generation_config.json"):
            shutil.copyfile(path, folder / path.name)


def write_generation_config(source: Path, folder: Path, language: dict[str, Any]) -> None:
    """The language model's, with the special tokens that only its config.json names."""
    path = source / "generation_config.json"
    config = files.read_json(path) if path.is_file() else {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config.get(key) is None and language.get(key) is not None:
            config[key] = language[key]
    config.pop("_from_model_config", None)
    files.write_json(folder / "generation_config.json", config)
