"""The weights of a folder under our names, whichever of the known formats it has, so that any two can be compared."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from vlm import files
from vlm.checkpoint import Tensors
from vlm.weights import (
    Folder,
    Row,
    exported_rows,
    is_exported,
    language_table,
    read_exported,
    vision_naming,
    vision_table,
)
from vlm.weights.legacy import Legacy, Spec, find

_LAYER = re.compile(r".*\.layers\.\d+")


class Contents(Protocol):
    """Type and whole shape of every weight, and each of them when asked for."""

    specs: dict[str, Spec]

    def read(self, key: str) -> Tensor: ...


class _HuggingFace:
    """A Hugging Face folder of a language model, a vision tower or a LLaVA."""

    def __init__(self, path: Path) -> None:
        self._weights = Folder(path)
        self._rows = {row.ours: row for row in self._find_rows(path)}
        self.specs: dict[str, Spec] = {key: (self._weights.dtype(row), row.shape) for key, row in self._rows.items()}

    def _find_rows(self, path: Path) -> Iterable[Row]:
        if is_exported(path):
            return exported_rows(read_exported(path), self._weights)
        config = files.read_json(path / "config.json")
        if str(config.get("model_type", "")).startswith("clip"):
            naming, prefix = vision_naming(self._weights.entries)
            table = vision_table(config, theirs=prefix, naming=naming)
        else:
            table = language_table(config)
        self._weights.check(table)
        return table.rows

    def read(self, key: str) -> Tensor:
        return self._weights.join(self._rows[key])


def open_contents(path: Path) -> Contents:
    """The weights of a checkpoint with its parents, of a Hugging Face folder, or of Megatron-LM's rank files.

    Raises:
        ValueError: the folder is none of them, or is not complete.
    """
    if (path / "config.json").is_file():
        return _HuggingFace(path)
    if path.is_dir() and find(path) is not None:
        return Legacy(path)
    return Tensors(path)


def group(key: str, *, layers: bool) -> str:
    """What a weight is counted with: its part of the model, or the layer or module inside."""
    if not layers:
        return key.split(".")[0]
    layer = _LAYER.match(key)
    return layer[0] if layer else key.removesuffix(".weight").removesuffix(".bias")


def in_order(names: Iterable[str]) -> list[str]:
    """Sorted with numbers as numbers: layer 9 before layer 10."""
    return sorted(
        names,
        key=lambda name: [(not word.isdigit(), int(word) if word.isdigit() else 0, word) for word in name.split(".")],
    )
