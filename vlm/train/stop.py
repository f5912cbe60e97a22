"""Ends a run early without losing a step: when a signal asks for it, or before its time is up.

Signals arrive through a wake-up descriptor that a thread of its own reads: the main thread may be deep inside a
collective and would not run a Python handler for minutes. Imports no torch, so that it is in place before all else.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections import deque
from types import TracebackType

import psutil
from tqdm import tqdm

EXIT_STOPPED = 75
"""`EX_TEMPFAIL` of sysexits.h: not finished, but everything is saved, and the same command goes on."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_REQUEST_SECONDS = 2.0
"""A terminal, SLURM and a launcher each pass a request on, so that it may arrive several times within this time."""
_NO_TIME = 1 << 16
"""Code of a run whose time is up, above all numbers of signals."""
_MARGIN = 1.5
_RECENT_STEPS = 10
"""Steps that the next one is judged by; the very first ones compile kernels and take minutes."""


def parse_duration(text: str) -> float:
    """Seconds in `3h50m`, `90m`, `45s` or `90` (minutes).

    Raises:
        ValueError: it is none of these, or nothing is left of it.
    """
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    if text.isdecimal():
        minutes = int(text)
    total = 3600 * hours + 60 * minutes + seconds
    if not total:
        raise ValueError(f"--stop-after: {text!r} is no time, write for example 90m or 3h50m")
    return float(total)


def name(number: int) -> str:
    """What a code of `Stop.code` stands for, in words."""
    return "--stop-after" if number == _NO_TIME else signal.Signals(number).name


class Stop:
    """Notes that the run should end. A context: the signals are its own inside.

    A second request leaves at once with 128 + its number, as the shell reports a death by signal. What is saved stays
    whole, since everything on disk is written beside its place first.

    Args:
        budget_seconds: how long the process may live, from its start; None for ever.
        quiet: say nothing about the first request; another process does.
    """

    def __init__(self, budget_seconds: float | None = None, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._signal = 0
        self._asked = 0.0
        self._started = time.monotonic() - (time.time() - psutil.Process().create_time())
        self._deadline = None if budget_seconds is None else self._started + budget_seconds
        self._steps: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._save: float | None = None
        self._validation = 0.0

    def __enter__(self) -> Stop:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old = {number: signal.signal(number, _heard) for number in SIGNALS}
        self._old_descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the launcher starts its ranks with them blocked
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._old_descriptor)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        os.close(self._writer)  # ends the thread

    def _listen(self) -> None:
        while number := os.read(self._reader, 1):
            if number[0] in SIGNALS:
                self._request(number[0])
        os.close(self._reader)

    def _request(self, number: int) -> None:
        now = time.monotonic()
        if self._signal and now - self._asked > ONE_REQUEST_SECONDS:
            os._exit(128 + number)
        if not self._signal:
            self._signal, self._asked = number, now
            if not self._quiet:
                # Beside the progress bar, which an ordinary line would be glued to.
                tqdm.write(f"vlm: {name(number)}: saving after this iteration; once more to leave at once", sys.stderr)

    def began(self) -> None:
        """Training begins. Until a save was timed, one is taken to last as long as everything up to here: what a
        save writes was about what had to be read."""
        if self._save is None:
            self._save = time.monotonic() - self._started

    def stepped(self, seconds: float) -> None:
        self._steps.append(seconds)

    def validated(self, seconds: float) -> None:
        self._validation = seconds

    def saved(self, seconds: float) -> None:
        self._save = seconds

    @property
    def code(self) -> int:
        """0 to go on; else why to stop, see `name`. Of this rank: the ranks have to agree on it."""
        if self._signal:
            return self._signal
        if self._deadline is None:
            return 0
        needed = _MARGIN * (max(self._steps, default=0.0) + self._validation + (self._save or 0.0))
        return _NO_TIME if time.monotonic() + needed > self._deadline else 0


def _heard(number: int, frame: object) -> None:
    """A handler has to exist for the wake-up descriptor to be written; it does the work."""


def _leave_to_the_parent() -> None:
    """In a forked child (a loader process): SLURM and terminals signal it too, but its parent decides when it ends."""
    if signal.getsignal(signal.SIGTERM) is _heard:
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


os.register_at_fork(after_in_child=_leave_to_the_parent)
