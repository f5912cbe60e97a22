"""What a checkpoint is and where it comes from, in one JSON file that a person can read. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlm import files
from vlm.config import Config

NAME = "manifest.json"
PARTS = {"vision": "vision_model", "projector": "vision_projection", "language": "language_model"}
"""Part of the settings to the attribute of `vlm.model.Llava`, which is the prefix of its weights."""
Kind = Literal["language", "vision", "combined", "stage"]
_PACKAGES = ("vlm", "torch", "megatron-core", "transformers", "safetensors")


@dataclass(frozen=True)
class Parent:
    """The checkpoint that training started from."""

    path: str
    """Relative to the folder of the checkpoint, so that a results folder can move as a whole."""
    identity: str


@dataclass(frozen=True)
class Manifest:
    kind: Kind
    parts: tuple[str, ...]
    """Attributes of the model whose weights are in this folder; the others are in the parent."""
    sources: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every file of a base model that was read, by name."""
    models: dict[str, Any] = field(default_factory=dict)
    """The settings under `models`; empty before the models are combined."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Other settings that decide what the checkpoint is or how pictures reach it: image_resize, seed, dtype."""
    stage: str | None = None
    iteration: int | None = None
    training: str | None = None
    """Hash of everything that decides the weights of a stage."""
    parent: Parent | None = None
    configuration: str | None = None
    """SHA-256 of the resolved configuration of the run that wrote it. No part of the identity: most of the settings do
    not touch these weights, and those that do are in `models`, `settings` and `training`."""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """SHA-256 of where the weights come from: equal for equal inputs, wherever the folder lies."""
        tree = asdict(self)
        del tree["versions"], tree["configuration"]
        tree["parent"] = self.parent.identity if self.parent else None
        for model in tree["models"].values():
            for place in ("source", "revision"):  # `sources` has the content
                model.pop(place, None)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        files.write_json(folder / NAME, {**asdict(self), "versions": versions(), "identity": self.identity})


def versions() -> dict[str, str]:
    """Versions of what wrote a checkpoint."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_settings(config: Config, where: Path, models: Mapping[str, Any], image_resize: str | None) -> None:
    """Refuse weights that the configuration does not describe, before anything is done with them.

    Which base models they are is not compared: a folder may have moved, and their sizes are in the checkpoint.

    Args:
        where: the checkpoint or exported folder.
        models: what it was made with, as the configuration's `models`.
        image_resize: how its pictures were prepared; None where it does not say.

    Raises:
        ValueError: naming the key and both values.
    """
    ours = config.models.model_dump(mode="json")
    pairs = {
        f"models.{part}.{name}": (ours[part][name], models.get(part, {}).get(name))
        for part, name in (
            ("language", "image_token"),
            ("vision", "feature_layer"),
            ("projector", "hidden_size"),
            ("projector", "bias"),
        )
    }
    if image_resize is not None:
        pairs["data.image_resize"] = (config.data.image_resize, image_resize)
    for key, (wanted, there) in pairs.items():
        if there != wanted:
            raise ValueError(f"{key}: is {wanted!r}, but the checkpoint {where} was made with {there!r}")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of one checkpoint.

    Raises:
        ValueError: the folder is not a checkpoint, or its manifest is broken or was edited.
    """
    path = folder / NAME
    if not path.is_file():
        raise ValueError(f"{folder}: is not a checkpoint ({NAME} is missing)")
    tree = files.read_json(path)
    try:
        identity = tree.pop("identity")
        parent = tree.pop("parent")
        manifest = Manifest(**{**tree, "parts": tuple(tree["parts"])}, parent=Parent(**parent) if parent else None)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: is not a manifest of this version ({error})") from None
    if identity != manifest.identity:
        raise ValueError(f"{path}: was changed by hand: its identity no longer fits its content")
    return manifest
