"""Files and folders that are complete or absent, and refused by name when they are broken.

Standard library only, so that a command that needs neither torch nor a GPU can use it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write `path` beside its place and rename it, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.writing")
    with open(beside, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
    _sync_one(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, complete or absent."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read one JSON value.

    Raises:
        ValueError: the file is missing or is not JSON, with the line where it stops being so.
    """
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON at line {error.lineno}: {error.msg}") from None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON list, of one JSON object, or of a JSON-lines file, whichever `path` holds.

    Raises:
        ValueError: the file is missing, is neither form, or holds something that is not an object.
    """
    text = _text(path)
    try:
        value = json.loads(text)
        records = value if isinstance(value, list) else [value]
        where = "entry {} of the list"
    except json.JSONDecodeError:
        records, where = _lines(path, text), "line {}"
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: {where.format(number)} is {type(record).__name__}, expected an object")
    return records


def _lines(path: Path, text: str) -> list[Any]:
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not JSON: {error.msg}") from None
    return records


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


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
