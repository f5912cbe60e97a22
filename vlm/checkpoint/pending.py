"""A checkpoint on its way to the disk while training goes on.

A 7B model with its optimizer is about 100 GB, minutes of writing. What goes into the large files is copied into host
memory first, at the speed of memory, and a thread writes it; it takes part in no collective. The folder gets its name,
and `latest` moves, when the files of all ranks are on disk: at the next step boundary at which the ranks find it so.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import distributed

from vlm.checkpoint import model as models
from vlm.checkpoint.tensors import Held


class NotSaved(RuntimeError):
    """A checkpoint could not be written. Nothing of it is left, and those before it are untouched."""

    def __init__(self, out: Path, reason: object, needed_bytes: int) -> None:
        try:
            free = f"{shutil.disk_usage(out.parent).free:,}"
        except OSError:
            free = "an unknown number"
        super().__init__(
            f"{out}: could not be saved: {reason}. It needs about {needed_bytes:,} bytes, {free} are free. Nothing of "
            "it is left, and the checkpoints before it are untouched"
        )


class Pending:
    """A checkpoint that a thread writes. Made and finished by all ranks at the same iterations.

    Args:
        out: its folder.
        folder: where it is prepared, beside `out`.
        held: content of this rank's large files by name.
        publish: gives the finished folder its name; called on the first rank.
    """

    def __init__(self, out: Path, folder: Path, held: Mapping[str, Held], publish: Callable[[], None]) -> None:
        self.out, self._folder, self._publish = out, folder, publish
        self._error: BaseException | None = None
        self._needed_bytes = sum(content.num_bytes for content in held.values())
        self._began = time.monotonic()
        self.seconds = 0.0
        """From the copy to the name; known when it is finished."""
        self._thread = threading.Thread(target=self._write, args=(held,), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, held: Mapping[str, Held]) -> None:
        try:
            for name, content in held.items():
                write(self._folder / name, content)
        except BaseException as error:  # raised again by `finish`, in the thread that can end the run
            self._error = error

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread.is_alive()

    def finish(self) -> Path:
        """Wait for all ranks, then let the checkpoint be seen.

        Raises:
            NotSaved: on every rank, where one of them could not write.
        """
        self._thread.join()
        self._raise_together()
        if models.is_first():
            try:
                self._publish()
            except OSError as error:
                self._error = error
        self._raise_together()
        self.seconds = time.monotonic() - self._began
        return self.out

    def _raise_together(self) -> None:
        """Raise the first rank's error that there is, on all ranks and in the same words."""
        reports = [(self._error and str(self._error), self._needed_bytes)]
        if distributed.is_initialized() and (world := distributed.get_world_size()) > 1:
            mine, reports = reports[0], reports * world
            distributed.all_gather_object(reports, mine)
        errors = [error for error, _ in reports if error is not None]
        if errors:
            if models.is_first():
                shutil.rmtree(self._folder, ignore_errors=True)
            raise NotSaved(self.out, errors[0], sum(needed for _, needed in reports))


def write(path: Path, content: Held) -> None:
    """Write a file from memory and flush it to disk. Python's lock is free meanwhile."""
    with open(path, "wb") as stream:
        stream.writelines(content.pieces)
        stream.flush()
        os.fsync(stream.fileno())
