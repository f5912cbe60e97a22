"""What a run says about itself: JSON lines, TensorBoard and a progress bar, the same after a kill as without one.

The lines are cut back to the checkpoint a run resumes from, and the sums of an unfinished interval travel in the
checkpoint, so that apart from the fields in `TIMES` the finished file equals that of a run that was left alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlm import files
from vlm.model.flops import StepFlops

TIMES = (
    "tokens_per_second",
    "samples_per_second",
    "tflops_per_device",
    "mfu",
    "data_wait_seconds",
    "peak_memory_bytes",
    "elapsed_seconds",
)
"""Fields of a line that differ between two runs of the same recipe."""


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What went through the model, over all micro-batches and data-parallel ranks."""

    losses: dict[str, float]  # nats, summed over trained tokens, by data set
    trained: dict[str, int]  # trained tokens, by data set
    tokens: int  # without padding
    samples: int
    images: int
    pairs: int  # of a query and a key that it sees

    @property
    def loss_sum(self) -> float:
        return sum(self.losses.values())

    @property
    def trained_tokens(self) -> int:
        return sum(self.trained.values())


@dataclass(frozen=True, kw_only=True)
class Outcome(Sums):
    """What one step did."""

    gradient_norm: float  # before clipping
    seconds: float
    data_wait_seconds: float  # of this rank


@dataclass(frozen=True)
class Meter:
    """How fast a run is for the devices it has."""

    flops: StepFlops
    devices: int
    peak: float | None
    """Operations per second of a device; None where that is unknown."""

    def read(self, totals: Totals) -> dict[str, float]:
        """Model TFLOP/s per device over the interval; their share of the device's peak (MFU) where that is known."""
        done = self.flops(
            tokens=totals.interval_tokens,
            pairs=totals.interval_pairs,
            images=totals.interval_images,
            trained_tokens=sum(totals.interval_trained.values()),
        )
        rate = done / max(totals.interval_seconds, 1e-9) / self.devices
        share = {} if self.peak is None else {"mfu": round(rate / self.peak, 4)}
        return {"tflops_per_device": float(f"{rate / 1e12:.4g}"), **share}


@dataclass
class Totals:
    """Sums since the start of the stage, and of the interval that the next line will report."""

    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    elapsed_seconds: float = 0.0
    interval_losses: dict[str, float] = field(default_factory=dict)
    interval_trained: dict[str, int] = field(default_factory=dict)
    interval_samples: int = 0
    interval_tokens: int = 0
    interval_images: int = 0
    interval_pairs: int = 0
    interval_seconds: float = 0.0
    interval_data_wait_seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        self.samples += outcome.samples
        self.tokens += outcome.tokens
        self.trained_tokens += outcome.trained_tokens
        self.elapsed_seconds += outcome.seconds
        for name in outcome.losses:
            self.interval_losses[name] = self.interval_losses.get(name, 0.0) + outcome.losses[name]
            self.interval_trained[name] = self.interval_trained.get(name, 0) + outcome.trained[name]
        self.interval_samples += outcome.samples
        self.interval_tokens += outcome.tokens
        self.interval_images += outcome.images
        self.interval_pairs += outcome.pairs
        self.interval_seconds += outcome.seconds
        self.interval_data_wait_seconds += outcome.data_wait_seconds

    def line(
        self, iteration: int, outcome: Outcome, learning_rate: float, meter: Meter, peak_memory_bytes: int
    ) -> dict[str, float]:
        """The interval as one line of metrics; starts the next interval.

        `loss` is the mean over all trained tokens of the interval (nats), `loss/<data set>` over those of one of
        several data sets; the gradient norm (before clipping) and the learning rate are those of the line's own
        iteration; `samples`, `tokens` and `trained_tokens` count from the start of the stage; waiting for data and
        memory are the first rank's.
        """
        seconds = max(self.interval_seconds, 1e-9)
        line = {
            "iteration": iteration,
            **means("loss", self.interval_losses, self.interval_trained),
            "gradient_norm": outcome.gradient_norm,
            "learning_rate": learning_rate,
            "samples": self.samples,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "tokens_per_second": round(self.interval_tokens / seconds, 1),
            "samples_per_second": round(self.interval_samples / seconds, 2),
            **meter.read(self),
            "data_wait_seconds": round(self.interval_data_wait_seconds, 4),
            "peak_memory_bytes": peak_memory_bytes,
            "elapsed_seconds": round(self.elapsed_seconds, 3),
        }
        for name, value in vars(self).items():
            if name.startswith("interval_"):
                setattr(self, name, type(value)())
        return line


def means(name: str, losses: Mapping[str, float], trained: Mapping[str, int]) -> dict[str, float]:
    """`name`: nats per trained token; and `name/<data set>` where there are several, but for those without a token."""
    found = {name: sum(losses.values()) / max(sum(trained.values()), 1)}
    if len(losses) > 1:
        found |= {f"{name}/{one}": losses[one] / trained[one] for one in losses if trained[one]}
    return found


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
