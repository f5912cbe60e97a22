"""Where checkpoints lie. Imports no torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vlm import files
from vlm.checkpoint.manifest import NAME, Manifest, read_manifest

CHECKPOINTS = "checkpoints"
LATEST = "latest"
BEST = "best"
"""Pointers beside a stage's checkpoints: files that hold the name of one."""


def resolve(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest one of a stage's folder.

    Args:
        path: a checkpoint, a stage's folder (`results/{run}/train/{stage}`), the `checkpoints` folder inside, or
            `checkpoints/best`, where there is one.

    Raises:
        ValueError: there is no checkpoint.
    """
    path = Path(path)
    if (path / NAME).is_file():
        return path
    if path.name in (LATEST, BEST) and path.is_file():
        return _pointed_to(path)
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
            return _pointed_to(pointer)
    return None


def _pointed_to(pointer: Path) -> Path:
    checkpoint = pointer.parent / pointer.read_text().strip()
    if not (checkpoint / NAME).is_file():
        raise ValueError(f"{pointer}: names {checkpoint.name}, which is not there")
    return checkpoint


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


def iteration_folder(stage: Path, iteration: int) -> Path:
    """Where a stage's checkpoint of an iteration is."""
    return stage / CHECKPOINTS / f"iteration_{iteration:07d}"


def point_to(checkpoint: Path) -> None:
    """Make a checkpoint the newest of its folder. Called when it is complete and on disk."""
    files.write_text(checkpoint.parent / LATEST, checkpoint.name + "\n")


def clear_unfinished(stage: Path) -> None:
    """Remove what an interruption left of checkpoints that were being written. Called by the owner of the folder."""
    for folder in (stage / CHECKPOINTS).glob(".iteration_*"):
        shutil.rmtree(folder)


def name_best(stage: Path, iteration: int | None) -> None:
    """Let `best` name the checkpoint of an iteration, or go. Changes nothing where it is so already."""
    pointer = stage / CHECKPOINTS / BEST
    if iteration is None:
        pointer.unlink(missing_ok=True)
        return
    text = iteration_folder(stage, iteration).name + "\n"
    if not pointer.is_file() or pointer.read_text() != text:
        files.write_text(pointer, text)


def prune(stage: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints of a stage's folder, and the one that `best` names.

    A removed one loses its manifest first, so that what an interruption leaves of it is not taken for a checkpoint.
    """
    folders = sorted(folder for folder in (stage / CHECKPOINTS).glob("iteration_*") if (folder / NAME).is_file())
    best = stage / CHECKPOINTS / BEST
    spared = best.read_text().strip() if best.is_file() else None
    for folder in folders[:-keep]:
        if folder.name != spared:
            (folder / NAME).unlink()
    for folder in (stage / CHECKPOINTS).glob("iteration_*"):
        if not (folder / NAME).is_file():
            shutil.rmtree(folder)
