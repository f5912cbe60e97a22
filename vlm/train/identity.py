"""What a training run is: everything that decides its weights, so that it is resumed only as itself.

Kept beside the checkpoints as `identity.json`. Nothing here imports torch: a run that is finished says so at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from vlm import files
from vlm.config import OBSERVING, Config

_BLOCK_BYTES = 1 << 16
_BLOCKS = 64


def describe(config: Config, stage: str, parent: str, data: dict[str, str]) -> dict[str, Any]:
    """Flat mapping from configuration key (or `parent`, `data of ...`) to value.

    Args:
        stage: name of the stage.
        parent: identity of the checkpoint it starts from.
        data: fingerprint of each data set's shards by name.

    What is saved, logged and validated, and when that ends training, is left out, since it does not touch the weights
    of an iteration; so are the number of loader processes and ranks, which decide whether a checkpoint can be resumed
    and not what it is.
    """
    settings = config.stages[stage].model_dump(mode="json", exclude={*OBSERVING, "early_stop"})
    flat = {
        "seed": config.seed,
        "dtype": config.dtype,
        **_flatten("models.language", config.models.language.model_dump(include={"image_token"})),
        **_flatten("models.vision", config.models.vision.model_dump(include={"feature_layer"})),
        **_flatten("models.projector", config.models.projector.model_dump(exclude={"init_std"})),
        **_flatten(
            "data", config.data.model_dump(include={"image_resize", "shuffle_run", "shuffle_buffer", "packing_buffer"})
        ),
        **_flatten(f"stages.{stage}", settings),
        "parent": parent,
    }
    return flat | {f"data of {name}": fingerprint for name, fingerprint in sorted(data.items())}


def _flatten(key: str, tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {key: tree}
    return {leaf: value for name, below in tree.items() for leaf, value in _flatten(f"{key}.{name}", below).items()}


def digest(identity: dict[str, Any]) -> str:
    """SHA-256 of an identity, in hexadecimal."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The keys in which two identities differ, each with the old and the new value."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key}: {_short(old.get(key))} -> {_short(new.get(key))}" for key in keys)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 20 else text[:9].strip('"') + "…"


def fingerprint(directory: Path) -> str:
    """SHA-256 over the names, sizes and 64 evenly spaced blocks of 64 KiB of every training shard of an indexed set.

    A shard of up to 4 MiB is read whole; of a larger one the same 4 MiB, so that 30 GB take a second.

    Raises:
        FileNotFoundError: the folder is missing, holds no shards, or was never indexed.
    """
    if not (directory / ".nv-meta").is_dir():
        what = "is not indexed" if directory.is_dir() else "does not exist"
        raise FileNotFoundError(f"{directory} {what}: run `vlm data shard` and `vlm data index {directory}` first")
    shards = sorted(directory.glob("shard-*.tar"))
    if not shards:
        raise FileNotFoundError(f"{directory} holds no training shards (shard-*.tar): run `vlm data shard` again")
    total = hashlib.sha256()
    for shard in shards:
        size = shard.stat().st_size
        total.update(f"{shard.name} {size}\n".encode())
        with open(shard, "rb") as stream:
            step = max(size // _BLOCKS, _BLOCK_BYTES)
            for offset in range(0, size, step):
                stream.seek(offset)
                total.update(stream.read(_BLOCK_BYTES))
    return total.hexdigest()


def read(checkpoints: Path) -> dict[str, Any] | None:
    """The identity of the run whose checkpoints these are, None where there is none yet.

    Raises:
        ValueError: the file does not hold one.
    """
    path = checkpoints / "identity.json"
    if not path.exists():
        return None
    identity = files.read_json(path)
    if not isinstance(identity, dict):
        raise ValueError(f"{path}: holds no mapping; remove the folder {checkpoints} to train again")
    return identity


def write(checkpoints: Path, identity: dict[str, Any]) -> None:
    """Say whose checkpoints these are, before the first of them is written."""
    files.write_json(checkpoints / "identity.json", identity)


_MADE = ("finished.json", "rejected.json", "metrics.jsonl", "tensorboard", "checkpoints")
"""What a stage leaves in its folder; the checkpoints, which carry the identity, are moved last."""


def set_aside(out: Path, identity: dict[str, Any] | None) -> Path | None:
    """Move what another run left in `out` to `previous-<hash8>`, so that nothing is ever written over.

    A kill in the middle leaves the checkpoints in place, and the next call moves the rest to the same folder.

    Returns:
        The folder, or None where there was nothing to move.
    """
    made = [name for name in _MADE if (out / name).exists()]
    if not made:
        return None
    stem = f"previous-{digest(identity)[:8] if identity else 'unknown'}"
    number = 1
    while any((out / (folder := stem if number == 1 else f"{stem}-{number}") / name).exists() for name in made):
        number += 1
    (out / folder).mkdir(exist_ok=True)
    for name in made:
        os.rename(out / name, out / folder / name)
    return out / folder
