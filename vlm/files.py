"""Files and folders that are complete or absent, and refused by name when they are broken.

Standard library only, so that a command that needs neither torch nor a GPU can use it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def write_text(path: Path, text: str) -> None:
    """Write `path` beside its place and rename it, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.writing")
    with open(beside, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
    sync_one(path.parent)


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


@contextmanager
def flushing(stream: IO[bytes]) -> Iterator[None]:
    """Flush a file that is being written every second, and at the end.

    The disk then works while more is made, instead of all at the end: by itself Linux begins when a tenth of the memory
    waits for it.
    """
    ended, failures = threading.Event(), []

    def flush() -> None:
        while not ended.wait(1.0):
            try:
                os.fdatasync(stream.fileno())
            except OSError as error:  # told once, so it must not be lost
                failures.append(error)
                return

    flusher = threading.Thread(target=flush, name="flush", daemon=True)
    flusher.start()
    try:
        yield
    finally:
        ended.set()
        flusher.join()
    if failures:
        raise failures[0]
    stream.flush()
    os.fsync(stream.fileno())


def lock(descriptor: int, waiting: str) -> None:
    """Lock an open file or folder of this machine for this process, waiting for another one; says so with `waiting`.

    The lock goes with the last process that holds the descriptor.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(waiting, file=sys.stderr, flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def sync(path: Path) -> None:
    """Flush a folder, all below it, and the entry in the folder above to disk."""
    for folder, _, names in os.walk(path):
        for name in [*names, "."]:
            sync_one(Path(folder) / name)
    sync_one(path.parent)


def sync_one(path: Path) -> None:
    """Flush one file, or the entries of one folder, to disk."""
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
    sync_one(out.parent)
    if old.exists():
        shutil.rmtree(old)


@contextmanager
def writing(
    out: Path, *, reads: Iterable[Path] = (), needed_bytes: int = 0, replaces: str | None = None
) -> Iterator[Path]:
    """Prepare a folder beside `out`, and rename it when the block ends well; else nothing of it is left.

    Args:
        reads: folders that the block reads; `out` may not lie in them, nor they in it, since it is replaced.
        needed_bytes: what the block will write; refused at once where the disk has less.
        replaces: a file by which an older `out` is known as one of ours; any other folder that is not empty is refused.

    Raises:
        ValueError: naming `out`: it cannot be written there, or the disk is or becomes full.
    """
    out = Path(out)
    _check_place(out, reads, replaces)
    try:
        folder = beside(out)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written: {error.strerror} ({error.filename})") from None
    try:
        free = shutil.disk_usage(folder).free
        if free < needed_bytes:
            raise ValueError(f"{out}: needs {needed_bytes:,} bytes, and its disk has {free:,} free")
        yield folder
        put_in_place(folder, out)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = f"{needed_bytes:,} bytes are needed, " if needed_bytes else ""
            raise ValueError(f"{out}: its disk became full; {needed}nothing of it is left") from error
        raise


def _check_place(out: Path, reads: Iterable[Path], replaces: str | None) -> None:
    place = out.resolve()
    for source in reads:
        inside, holds = place.is_relative_to(source.resolve()), source.resolve().is_relative_to(place)
        if inside or holds:
            how = "is" if inside and holds else "lies inside" if inside else "holds"
            raise ValueError(f"{out}: {how} {source}, which is read; choose a place outside of it")
    if out.is_dir() and replaces and not (out / replaces).is_file() and any(out.iterdir()):
        raise ValueError(f"{out}: holds other files (there is no {replaces}), which would be lost; name a new folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; name a new folder")
