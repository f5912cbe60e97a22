"""Where checkpoints lie, and how a folder appears whole or not at all. Imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm.checkpoint.manifest import NAME, Manifest, read_manifest

CHECKPOINTS = "checkpoints"
LATEST = "latest"


def resolve(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest one of a stage's folder.

    Args:
        path: a checkpoint, a stage's folder (`results/{run}/train/{stage}`), or the `checkpoints` folder inside.

    Raises:
        ValueError: there is no checkpoint.
    """
    path = Path(path)
    if (path / NAME).is_file():
        return path
    newest = latest(path)
    if newest is None:
        state = "holds no checkpoint" if path.exists() else "does not exist"
        raise ValueError(f"{path}: {state} (neither {NAME} nor {CHECKPOINTS}/{LATEST} is there)")
    return newest


def latest(stage: Path) -> Path | None:
    """The newest complete checkpoint of a stage's folder, None before the first.

    Raises:
        ValueError: `latest` names a checkpoint that is gone.
    """
    for folder in (stage / CHECKPOINTS, stage):
        pointer = folder / LATEST
        if pointer.is_file():
            checkpoint = folder / pointer.read_text().strip()
            if not (checkpoint / NAME).is_file():
                raise ValueError(f"{pointer}: names {checkpoint.name}, which is not there")
            return checkpoint
    return None


def chain(path: Path) -> list[tuple[Path, Manifest]]:
    """A checkpoint and those it was trained from, newest first, until all parts are there.

    Raises:
        ValueError: a parent is gone, or is not the one that training started from.
    """
    folder = resolve(path)
    links = [(folder, read_manifest(folder))]
    while (parent := links[-1][1].parent) is not None:
        child = links[-1][0]
        folder = Path(os.path.normpath(child.resolve() / parent.path))
        if not (folder / NAME).is_file():
            raise ValueError(f"{child / NAME}: its parent {folder} is missing; it holds the parts that did not learn")
        manifest = read_manifest(folder)
        if manifest.identity != parent.identity:
            raise ValueError(
                f"{child / NAME}: its parent {folder} was replaced by another checkpoint "
                f"({manifest.identity[:8]} instead of {parent.identity[:8]}); train the stage again"
            )
        links.append((folder, manifest))
    return links


def huggingface(checkpoint: Path, part: str) -> Path:
    """Folder with the base model's configuration, tokenizer or image processor.

    Args:
        part: `language` or `vision`.
    """
    return checkpoint / "huggingface" / part


def sync(path: Path) -> None:
    """Flush a folder, all below it, and the entry in the folder above to disk."""
    for folder, _, names in os.walk(path):
        for name in [*names, "."]:
            _sync_one(Path(folder) / name)
    _sync_one(path.parent)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def beside(out: Path) -> Path:
    """A fresh empty folder beside `out`, where its content is prepared."""
    folder = out.parent / f".{out.name}.writing"
    if folder.exists():  # left by an interrupted run
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def put_in_place(folder: Path, out: Path) -> None:
    """Flush a prepared folder and give it its name. What was there before goes only now."""
    sync(folder)
    old = out.parent / f".{out.name}.replaced"
    if old.exists():
        shutil.rmtree(old)
    if out.exists():
        out.rename(old)
    folder.rename(out)
    _sync_one(out.parent)
    if old.exists():
        shutil.rmtree(old)


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """Prepare a folder beside `out`, and rename it when the block ends well; else nothing of it is left."""
    folder = beside(Path(out))
    try:
        yield folder
        put_in_place(folder, Path(out))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def point_to(checkpoint: Path) -> None:
    """Make a checkpoint the newest of its folder. Called when it is complete and on disk."""
    pointer = checkpoint.parent / LATEST
    prepared = checkpoint.parent / f".{LATEST}.writing"
    with open(prepared, "w") as stream:
        stream.write(checkpoint.name + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    prepared.rename(pointer)
    _sync_one(pointer.parent)
