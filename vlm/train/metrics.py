"""What a run says about itself: JSON lines, TensorBoard and a progress bar, the same after a kill as without one.

The lines are cut back to the checkpoint a run resumes from, and the sums of an unfinished interval travel in the
checkpoint, so that apart from the fields in `TIMES` the finished file equals that of a run that was left alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlm import files

TIMES = ("tokens_per_second", "samples_per_second", "data_wait_seconds", "elapsed_seconds")
"""Fields of a line that differ between two runs of the same recipe."""


@dataclass(frozen=True)
class Outcome:
    """What one step did, over all its micro-batches and data-parallel ranks."""

    loss_sum: float  # nats, over trained tokens
    trained_tokens: int
    tokens: int  # without padding
    samples: int
    gradient_norm: float  # before clipping
    seconds: float
    data_wait_seconds: float  # of this rank


@dataclass
class Totals:
    """Sums since the start of the stage, and of the interval that the next line will report."""

    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    elapsed_seconds: float = 0.0
    interval_loss_sum: float = 0.0
    interval_samples: int = 0
    interval_tokens: int = 0
    interval_trained_tokens: int = 0
    interval_seconds: float = 0.0
    interval_data_wait_seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        self.samples += outcome.samples
        self.tokens += outcome.tokens
        self.trained_tokens += outcome.trained_tokens
        self.elapsed_seconds += outcome.seconds
        self.interval_loss_sum += outcome.loss_sum
        self.interval_samples += outcome.samples
        self.interval_tokens += outcome.tokens
        self.interval_trained_tokens += outcome.trained_tokens
        self.interval_seconds += outcome.seconds
        self.interval_data_wait_seconds += outcome.data_wait_seconds

    def line(self, iteration: int, outcome: Outcome, learning_rate: float) -> dict[str, float]:
        """The interval as one line of metrics; starts the next interval.

        `loss` is the mean over all trained tokens of the interval (nats); the gradient norm (before clipping) and
        the learning rate are those of the line's own iteration; `samples`, `tokens` and `trained_tokens` count from
        the start of the stage.
        """
        seconds = max(self.interval_seconds, 1e-9)
        line = {
            "iteration": iteration,
            "loss": self.interval_loss_sum / max(self.interval_trained_tokens, 1),
            "gradient_norm": outcome.gradient_norm,
            "learning_rate": learning_rate,
            "samples": self.samples,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "tokens_per_second": round(self.interval_tokens / seconds, 1),
            "samples_per_second": round(self.interval_samples / seconds, 2),
            "data_wait_seconds": round(self.interval_data_wait_seconds, 4),
            "elapsed_seconds": round(self.elapsed_seconds, 3),
        }
        for name in asdict(self):
            if name.startswith("interval_"):
                setattr(self, name, type(getattr(self, name))())
        return line


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a last line torn by a kill is left out.

    Raises:
        ValueError: a line before the last is not JSON; the file was not written by this program alone.
    """
    if not path.exists():
        return []
    pieces = path.read_bytes().split(b"\n")
    lines = []
    for number, piece in enumerate(pieces[:-1], start=1):  # what follows the last newline is empty or torn
        try:
            lines.append(json.loads(piece))
        except ValueError:
            raise ValueError(
                f"{path}: line {number} is not JSON: {piece[:80]!r}; remove the line or the file"
            ) from None
    return lines


def cut_back(path: Path, iteration: int) -> list[dict[str, Any]]:
    """Drop the lines of iterations after `iteration`, and a torn last line; returns the lines that stay."""
    lines = [line for line in read_lines(path) if line["iteration"] <= iteration]
    kept = "".join(json.dumps(line) + "\n" for line in lines)
    if path.exists() and path.read_bytes() != kept.encode():
        files.write_text(path, kept)
    return lines


class Reporter:
    """Writes the lines of one run; on ranks other than the first it does nothing."""

    def __init__(self, out: Path, *, start: int, iterations: int, description: str, active: bool = True) -> None:
        self._active = active
        self._loss = float("nan")
        if not active:
            return
        out.mkdir(parents=True, exist_ok=True)
        self.lines = cut_back(out / "metrics.jsonl", start)
        self._file = open(out / "metrics.jsonl", "a")  # noqa: SIM115
        self._tensorboard = _TensorBoard(out / "tensorboard", start)
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=iterations,
            initial=start,
            desc=description,
            unit="step",
            mininterval=0.2 if on_terminal else 10.0,
            dynamic_ncols=on_terminal,
            file=sys.stderr,
        )

    def advance(self, outcome: Outcome) -> None:
        """Move the progress bar one iteration on."""
        if self._active:
            loss = outcome.loss_sum / max(outcome.trained_tokens, 1)
            rate = f"{outcome.tokens / max(outcome.seconds, 1e-9):,.0f}"
            self._bar.set_postfix({"loss": f"{loss:.4f}", "tokens/s": rate}, refresh=False)
            self._bar.update()

    def write(self, line: dict[str, float]) -> None:
        if self._active:
            self.lines.append(line)
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._tensorboard.write(line)

    def sync(self) -> None:
        """Put the lines on the disk: called before a checkpoint, which they must never lag behind."""
        if self._active:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._active:
            self._bar.close()
            self._file.close()
            self._tensorboard.close()


class _TensorBoard:
    """Scalars for TensorBoard, without `torch.utils.tensorboard`: its checks cost more than all our lines."""

    def __init__(self, directory: Path, start: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(directory))
        if start:  # a session that starts at a step makes TensorBoard forget what an earlier one wrote beyond it
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(self._event(wall_time=time.time(), step=start + 1, session_log=log))

    def write(self, line: dict[str, float]) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value) for name, value in line.items() if name != "iteration"
        ]
        event = self._event(wall_time=time.time(), step=int(line["iteration"]), summary=self._summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
