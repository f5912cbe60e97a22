"""Text files that other people's tools read and write: complete or absent, and refused by name when they are broken.

Standard library only, so that a command that needs neither torch nor a GPU can use it.
"""

from __future__ import annotations

import json
import os
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
