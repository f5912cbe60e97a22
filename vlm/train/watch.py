"""Ranks that watch each other: when one dies, hangs or fails, the others end within a minute and say which it was.

A rank that waits in a collective for one that will not come cannot be interrupted from Python, so this runs in threads.
Every rank keeps a count going in the store that the processes met through, and watches that of the next rank; what one
finds it leaves there for all. One thread talks to the store, which may never answer, the other one judges.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from types import TracebackType

from torch import distributed

BEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0
_LOST_SECONDS = 5.0
"""A store that is gone: its keeper has died, or has just ended as this rank is about to."""


class Watch:
    """Watches the other ranks for the length of a block, if there are any. After the process groups are made.

    An exception that leaves the block is told to all ranks, unless it is only the echo of another rank's end.
    """

    def __init__(self) -> None:
        self._rank, self._world = distributed.get_rank(), distributed.get_world_size()
        self._left = threading.Event()
        self._answered = time.monotonic()
        self._refused: float | None = None
        self._count, self._heard = -1, time.monotonic()
        self._name = f"rank {(self._rank + 1) % self._world}"
        self._failure = ""

    def __enter__(self) -> Watch:
        if self._world > 1:
            self._store = self._connect()
            self._store.set(
                f"name {self._rank}", f"rank {self._rank} (process {os.getpid()} on {socket.gethostname()})"
            )
            self._judge = threading.Thread(target=self._judge_ranks, name="watch", daemon=True)
            for thread in (threading.Thread(target=self._talk, name="beats", daemon=True), self._judge):
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._world == 1:
            return
        if error is None:
            self._left.set()
        elif _is_echo(error):
            self._judge.join(SILENT_SECONDS + 2 * BEAT_SECONDS)  # it knows better, and ends the process
        else:
            self._left.set()
            self._tell(f"rank {self._rank} failed: {error}")

    @staticmethod
    def _connect() -> distributed.Store:
        """A connection of its own: calls on one connection wait for each other."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return distributed.PrefixStore("watch", distributed.TCPStore(address, port, wait_for_workers=False))

    def _talk(self) -> None:
        count, watched = 0, (self._rank + 1) % self._world
        while not self._left.wait(BEAT_SECONDS):
            count += 1
            try:
                self._store.set(str(self._rank), str(count))
                if self._store.check([f"name {watched}", str(watched)]):
                    self._name = self._store.get(f"name {watched}").decode()
                    heard = int(self._store.get(str(watched)))
                    if heard != self._count:
                        self._count, self._heard = heard, time.monotonic()
                if self._store.check(["failure"]):
                    self._failure = self._store.get("failure").decode()
                self._answered, self._refused = time.monotonic(), None
            except distributed.DistError:
                self._refused = self._refused or time.monotonic()

    def _judge_ranks(self) -> None:
        looked = time.monotonic()
        while not self._left.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - looked > 4 * BEAT_SECONDS:  # this very process was suspended, and maybe all of them
                self._answered = self._heard = now
            looked = now
            if self._failure:
                self._end(self._failure if self._rank == 0 else "")
            if self._refused is not None and now - self._refused > _LOST_SECONDS:
                self._end("rank 0, or what started it, is gone: the store that it kept does not answer any more")
            if now - self._answered > SILENT_SECONDS:
                self._end(f"rank 0, which keeps the store, has not answered for {SILENT_SECONDS:.0f} seconds")
            if now - self._heard > SILENT_SECONDS:
                found = f"{self._name} has not answered for {SILENT_SECONDS:.0f} seconds: it hangs, or has died"
                self._tell(found)
                self._end(found)

    def _tell(self, failure: str) -> None:
        try:
            self._store.set("failure", failure)
        except distributed.DistError:
            return  # the others notice that the store is gone

    def _end(self, reason: str) -> None:
        if reason:
            print(f"vlm: rank {self._rank} ends because {reason}", file=sys.stderr, flush=True)
        os._exit(1)


def _is_echo(error: BaseException) -> bool:
    """Whether a collective failed here, which it does when another rank of it is gone."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, RuntimeError) and bool(frames) and "/torch/distributed/" in frames[-1].filename
