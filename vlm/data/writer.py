"""Processes that write tar shards, each complete or absent, so that a run that was killed goes on where it stopped.

A process gets its share of the shards when it starts; they are of equal size, so nobody waits for work. A finished
shard has a hidden JSON file beside it that says what is in it.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import tarfile
import time
import traceback
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from vlm import files

PLAN = ".plan.json"
_TELL_SECONDS = 0.2  # between messages of a process
Rejected = dict[int, str]


class Job(NamedTuple):
    """A shard and the samples it is to hold."""

    name: str
    samples: array[int]


class Outcome(NamedTuple):
    """What became of a shard; one without a sample has no file."""

    num_samples: int
    rejected: Rejected


@contextmanager
def open_folder(out: Path, fingerprint: str) -> Iterator[Path]:
    """The hidden folder beside `out` where shards wait for each other; those of the same plan are still in it.

    Nobody else writes there meanwhile: it is locked until this process and all that it started have ended.
    """
    folder = out.parent / f".{out.name}.writing"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        files.lock(lock, f"{out}: waiting for another process that writes it")
        if folder.is_dir() and os.fstat(lock).st_ino == folder.stat().st_ino:
            break
        os.close(lock)  # the other process has given the folder its name meanwhile
    try:
        plan = folder / PLAN
        if not plan.is_file() or files.read_json(plan) != {"fingerprint": fingerprint}:
            for old in folder.iterdir():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            files.write_json(plan, {"fingerprint": fingerprint})
        yield folder
    finally:
        os.close(lock)


def finished(folder: Path, name: str) -> Outcome | None:
    """What became of a shard, or None where it is not finished."""
    try:
        content = json.loads((folder / f".{name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return Outcome(content["num_samples"], {int(index): reason for index, reason in content["rejected"].items()})


class Writer:
    """Writes shards in processes of its own; iterate over it for what they have done.

    The processes are forked, so that they share what was read so far.

    Args:
        folder: of the shards.
        members: the tar members of a sample by their extension; ValueError where it cannot be used.
        jobs: the shards.
        workers: processes.
    """

    def __init__(
        self, folder: Path, members: Callable[[int], dict[str, bytes]], jobs: Sequence[Job], workers: int
    ) -> None:
        self._folder, self._members = folder, members
        self._shares = [share for number in range(workers) if (share := jobs[number::workers])]
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> Writer:
        context = multiprocessing.get_context("fork")
        for share in self._shares:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=self._work, args=(share, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def __iter__(self) -> Iterator[tuple[int, Rejected]]:
        """Number of samples looked at, and those among them that were rejected, whenever there is news.

        Raises:
            ValueError: the disk is full.
            RuntimeError: a process died.
        """
        pipes = dict(zip(self._pipes, self._processes, strict=True))
        while pipes:
            for pipe in multiprocessing.connection.wait(list(pipes)):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                except EOFError:
                    process = pipes.pop(pipe)
                    process.join()
                    if process.exitcode:
                        raise RuntimeError(
                            f"{self._folder}: a writing process ended with {process.exitcode} (-9: killed, as when "
                            "memory runs out); run the command again, finished shards are kept"
                        ) from None
                    continue
                if isinstance(message, Exception):
                    raise message
                yield message

    def _work(self, share: Sequence[Job], pipe: Connection, parent: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees it and ends us
        try:
            for job in share:
                self._write(job, pipe, parent)
        except OSError as error:
            pipe.send(ValueError(f"{self._folder}: cannot be written: {error.strerror} ({error.filename})"))
        except Exception:
            pipe.send(RuntimeError(traceback.format_exc()))

    def _write(self, job: Job, pipe: Connection, parent: int) -> None:
        """Times and owners are left out of the tar: same input, same bytes."""
        half, path = self._folder / f".{job.name}.half", self._folder / job.name
        rejected: Rejected = {}
        told, told_at, news = 0, time.monotonic(), {}
        with tarfile.open(half, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, index in enumerate(job.samples, start=1):
                if os.getppid() != parent:  # it was killed, and nobody is left to write for
                    os._exit(1)
                try:
                    for extension, data in self._members(index).items():
                        member = tarfile.TarInfo(f"{index:09d}.{extension}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
                except ValueError as error:
                    rejected[index] = news[index] = str(error)
                if time.monotonic() - told_at > _TELL_SECONDS:
                    pipe.send((number - told, news))
                    told, told_at, news = number, time.monotonic(), {}
        num_samples = len(job.samples) - len(rejected)
        if num_samples:
            files.sync_one(half)
            half.replace(path)
        else:
            half.unlink()
        files.write_json(self._folder / f".{job.name}.json", {"num_samples": num_samples, "rejected": rejected})
        pipe.send((len(job.samples) - told, news))
