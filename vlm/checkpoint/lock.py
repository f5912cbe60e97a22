"""One training per folder, whatever starts a second one: a forgotten snakemake, another machine, another job.

A lock is a chain of numbered claims in a folder, made with `link`, which lets exactly one of several processes succeed,
on a network file system too. Who creates the claim after one whose owner is gone owns the folder. The newest claim is
never removed, only marked as released, so that no number is given out twice and nothing that looks gone is ever
deleted under a process that has just taken it.

An owner on this machine is gone when its process is. One elsewhere touches its claim every BEAT_SECONDS and is gone
when that has not happened for GONE_SECONDS, both by the clock of the file system. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm import files

BEAT_SECONDS = 10.0
GONE_SECONDS = 120.0
"""Twelve beats: more than a network file system hides a change of attributes (`acregmax`, 60 s)."""
EXIT_TAKEN = 73
"""`EX_CANTCREAT` of sysexits.h: another training owns the folder."""
_LOOK_SECONDS = 0.5


class Taken(RuntimeError):
    """The folder belongs to another process."""


@dataclass(frozen=True)
class Owner:
    host: str
    machine: str
    """This start of the machine, and the namespace its process numbers count in."""
    pid: int
    started: float
    """When the process was started, in the machine's own clock: a number may belong to another process later."""
    job: str
    """Number of the SLURM job, empty where there is none."""
    since: str

    @classmethod
    def this(cls) -> Owner:
        pid = os.getpid()
        started = _started(pid)
        assert started is not None, "this process runs"
        job = os.environ.get("SLURM_JOB_ID", "")
        return cls(socket.gethostname(), _machine(), pid, started, job, time.strftime("%Y-%m-%d %H:%M:%S"))

    def __str__(self) -> str:
        job = f" in SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> float | None:
    """When a process of this machine was started, None where it has ended."""
    if not Path("/proc/self/stat").exists():
        import psutil

        try:
            return float(psutil.Process(pid).create_time())
        except psutil.NoSuchProcess:
            return None
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else float(fields[18])  # ended, only its parent has not noticed; else ticks since boot


class _Claims:
    """The chain in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"

    def newest(self) -> int:
        return max((int(path.stem) for path in self.folder.glob("[0-9]*.json")), default=0)

    def owner(self, number: int) -> Owner | None:
        """Who made a claim; None where it was released or replaced, or never made."""
        try:
            with open(self.path(number)) as stream:
                content = json.load(stream)
        except FileNotFoundError:
            return None
        return Owner(**content["owner"]) if content["owner"] else None

    def make(self, number: int) -> bool:
        """Try to create a claim."""
        mine = self.folder / f".{uuid.uuid4().hex}"
        try:
            _write(mine, {"owner": asdict(Owner.this())})
            try:
                os.link(mine, self.path(number))
            except FileExistsError:
                if mine.stat().st_nlink < 2:  # NFS may lose the answer and report its own repetition
                    return False
        finally:
            mine.unlink(missing_ok=True)
        if self.newest() != number:  # others came and went since the last look
            self.path(number).unlink(missing_ok=True)
            return False
        for older in self.folder.glob("[0-9]*.json"):
            if int(older.stem) < number:
                older.unlink(missing_ok=True)
        return True

    def alive(self, number: int, owner: Owner) -> bool:
        """Whether the owner still works: of another machine's only its next beat is a proof, which is waited for."""
        if owner.machine == _machine():
            return _started(owner.pid) == owner.started
        clock = self.folder / f".{uuid.uuid4().hex}"
        try:
            first = self._touched(number)
            while (touched := self._touched(number)) is not None:
                clock.touch()
                if touched != first:
                    return True
                if clock.stat().st_mtime - touched > GONE_SECONDS:
                    return False
                time.sleep(_LOOK_SECONDS)
        finally:
            clock.unlink(missing_ok=True)
        return False

    def _touched(self, number: int) -> float | None:
        try:
            with open(self.path(number)) as stream:  # opening asks the server, where `stat` may answer from a cache
                return os.fstat(stream.fileno()).st_mtime
        except FileNotFoundError:
            return None


def _write(path: Path, content: dict[str, Any]) -> None:
    with open(path, "w") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


def await_free(folder: Path, *, wait: bool, cancelled: Callable[[], bool] = lambda: False) -> int:
    """The number that the next claim on a folder would get, once its owner has gone.

    Args:
        folder: holds the claims; made where it is missing.
        wait: wait for an owner to end, until `cancelled()`.

    Raises:
        Taken: there is an owner; names it.
    """
    claims, told = _Claims(folder), False
    while True:
        number = claims.newest()
        owner = claims.owner(number)
        if owner is None or not claims.alive(number, owner):
            return number + 1
        if not wait or cancelled():
            raise Taken(f"{folder.parent}: belongs to another training, {owner}; nothing was written")
        if not told:
            print(f"Waiting for another training in {folder.parent} to end: {owner}", file=sys.stderr, flush=True)
            told = True
        time.sleep(_LOOK_SECONDS)


@contextlib.contextmanager
def hold(folder: Path, *, wait: bool = False, cancelled: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Own a folder for the length of a block; arguments and errors as those of `await_free`.

    Should another process take it over meanwhile, since this one was silent for too long (suspended, or cut off from
    the file system), this one ends at once with EXIT_TAKEN.
    """
    claims = _Claims(folder)
    while not claims.make(number := await_free(folder, wait=wait, cancelled=cancelled)):
        pass
    released = threading.Event()
    beats = threading.Thread(target=_beat, args=(claims, number, released), name="lock", daemon=True)
    beats.start()
    try:
        yield
    finally:
        released.set()
        beats.join()
        with contextlib.suppress(OSError):  # a full or vanished disk; the process is about to be gone
            files.write_json(claims.path(number), {"owner": None})


def _beat(claims: _Claims, number: int, released: threading.Event) -> None:
    path = claims.path(number)
    while not released.wait(BEAT_SECONDS):
        try:
            os.utime(path)
            lost = claims.newest() != number
        except FileNotFoundError:
            lost = True
        except OSError:
            continue  # the file system does not answer: the next beat may come through
        if lost and not released.is_set():
            print(f"vlm: {path} is no longer the newest claim: another training took the folder over", file=sys.stderr)
            os._exit(EXIT_TAKEN)
