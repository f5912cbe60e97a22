"""Builds what a stage needs and runs its iterations: step, report, save."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from megatron.core import parallel_state

from vlm import checkpoint, files, loader, model, parallel
from vlm.checkpoint.places import CHECKPOINTS
from vlm.model.builder import read_configs, read_pixel_statistics
from vlm.train import identity, optimizer
from vlm.train.metrics import Outcome, Reporter, Totals
from vlm.train.plan import Plan
from vlm.train.step import NonFiniteError, Step
from vlm.train.stop import Stop, name


class Trainer:
    """A stage ready to train, in processes that `vlm.parallel` has joined. A context: leaving it closes the files.

    Args:
        plan: what to train.
        stop: says when to end early.

    Raises:
        ValueError: the processes, the checkpoint or the data do not fit the settings.
    """

    def __init__(self, plan: Plan, stop: Stop) -> None:
        self.plan = plan
        self.stop = stop
        self.totals = Totals()
        self.peak_memory_bytes = 0
        config, stage = plan.config, plan.settings
        self.first_rank = torch.distributed.get_rank() == 0
        known = identity.read(plan.out / CHECKPOINTS)
        newest = checkpoint.latest(plan.out) if known == plan.identity else None
        self.model = _build_model(plan)
        if newest is None:
            checkpoint.load_model(self.model, plan.parent)
        self.model.freeze(stage.trainable)
        self.model.train()
        wrapped = optimizer.wrap(self.model)
        self.optimizer, self.schedule = optimizer.build(wrapped, config, stage)
        self.loader = loader.build(
            config,
            plan.stage,
            plan.data,
            checkpoint.huggingface(plan.parent, "language"),
            checkpoint.huggingface(plan.parent, "vision"),
            rank=parallel_state.get_data_parallel_rank(),
            world=parallel_state.get_data_parallel_world_size(),
        )
        self.iteration = 0 if newest is None else self._resume(newest)
        self.saved_iteration = self.iteration
        self._claim(known)
        self.last_good = newest or plan.parent
        self.step = Step(
            wrapped,
            self.optimizer,
            self.loader,
            num_micro_batches=plan.num_micro_batches,
            sequence_length=stage.sequence_length,
            device=parallel.device(),
        )
        self.reporter = Reporter(
            plan.out,
            start=self.iteration,
            iterations=stage.iterations,
            description=plan.stage,
            active=self.first_rank,
        )

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reporter.close()
        self.loader.close()

    def train(self) -> str | None:
        """Run the iterations that are left, then write `finished.json`.

        Returns:
            None at the end; where it was asked to stop and has saved, a sentence that says so.

        Raises:
            NonFiniteError: names the iteration, the samples and the last good checkpoint. Nothing was saved since.
        """
        stage = self.plan.settings
        self.stop.began()
        while self.iteration < stage.iterations:
            if code := self._agreed(self.stop.code):
                return self._leave(code)
            outcome = self._step()
            last = self.iteration == stage.iterations
            self._report(outcome, now=last or self.iteration % stage.log_interval == 0)
            if last or self.iteration % stage.save_interval == 0:
                self._save()
        rejected = self._rejected()
        if self.first_rank:
            self._finish(rejected)
        return None

    def _step(self) -> Outcome:
        self.schedule.step(1)
        try:
            outcome = self.step()
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{self.plan.stage}: iteration {self.iteration + 1} is not finite: {error}. "
                f"The last good checkpoint is {self.last_good}; nothing was written over it."
            ) from None
        self.stop.stepped(outcome.seconds)
        self.iteration += 1
        return outcome

    def _agreed(self, value: int) -> int:
        """The largest of all ranks' values: what one rank was asked for, all do, at the same iteration."""
        if torch.distributed.get_world_size() == 1:
            return value
        largest = torch.tensor(value)  # on the CPU, so that a GPU that is still busy is not waited for
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return int(largest)

    def _leave(self, code: int) -> str:
        """Save what is not yet saved."""
        if self.iteration > self.saved_iteration:
            self._save()
        return (
            f"{self.plan.stage}: stopped by {name(code)} after iteration {self.iteration} of "
            f"{self.plan.settings.iterations}, all of it is in {self.last_good}; the same command goes on from there"
        )

    def _report(self, outcome: Outcome, *, now: bool) -> None:
        self.totals.add(outcome)
        self.reporter.advance(outcome)
        if now:
            self.reporter.write(self.totals.line(self.iteration, outcome, optimizer.learning_rate(self.optimizer)))

    def _claim(self, known: dict[str, Any] | None) -> None:
        """Make the folder this run's own; what another run left in it is moved aside. After the last refusal."""
        torch.distributed.barrier()  # all ranks have read what is there before the first one moves it
        if known != self.plan.identity and self.first_rank:
            folder = identity.set_aside(self.plan.out, known)
            if folder is not None:
                why = identity.difference(known, self.plan.identity) if known else "nothing says what it was"
                print(f"{self.plan.stage}: another run was moved to {folder} ({why})", file=sys.stderr)
            identity.write(self.plan.out / CHECKPOINTS, self.plan.identity)
        torch.distributed.barrier()

    def _layout(self) -> dict[str, int]:
        """Settings that the loader's state depends on."""
        return {"data.workers": self.plan.config.data.workers, "parallel (data ranks)": self.plan.config.parallel.data}

    def _resume(self, newest: Path) -> int:
        resumed = checkpoint.load_stage(newest, model=self.model, optimizer=self.optimizer, scheduler=self.schedule)
        for key, value in self._layout().items():
            there = resumed.extra["layout"][key]
            if there != value:
                raise ValueError(
                    f"{key}: is {value}, but {newest} was written with {there}, and the place in the data cannot be "
                    f"carried over; set it back, or move {self.plan.out} away to train from the start"
                )
        self.loader.restore(resumed.loader)
        self.totals = Totals(**resumed.extra["totals"])
        self.peak_memory_bytes = resumed.extra["peak_memory_bytes"]
        if self.first_rank:
            print(f"{self.plan.stage}: resuming after iteration {resumed.iteration} from {newest}", file=sys.stderr)
        return resumed.iteration

    def _rejected(self) -> dict[str, str]:
        """Samples that no data-parallel rank could use, and why."""
        ranks: list[dict[str, str]] = [self.loader.rejected]
        if (world := parallel_state.get_data_parallel_world_size()) > 1:
            ranks *= world
            group = parallel_state.get_data_parallel_group()
            torch.distributed.all_gather_object(ranks, self.loader.rejected, group=group)
        return {key: reason for rank in ranks for key, reason in sorted(rank.items())}

    def _save(self) -> None:
        started = time.monotonic()
        self.reporter.sync()
        self.last_good = checkpoint.save_stage(
            self.plan.out,
            stage=self.plan.stage,
            iteration=self.iteration,
            parent=self.plan.parent,
            trainable=self.plan.settings.trainable,
            identity=self.plan.digest,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.schedule,
            loader=self.loader.state(),
            extra={"totals": asdict(self.totals), "layout": self._layout(), "peak_memory_bytes": self._peak_memory()},
        )
        self.saved_iteration = self.iteration
        self.stop.saved(time.monotonic() - started)

    def _peak_memory(self) -> int:
        """Largest memory of this rank over all its processes so far: on its GPU, or in all where it has none."""
        if torch.cuda.is_available():
            now = torch.cuda.max_memory_allocated()
        else:
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.peak_memory_bytes = max(self.peak_memory_bytes, now)
        return self.peak_memory_bytes

    def _finish(self, rejected: dict[str, str]) -> None:
        files.write_json(self.plan.out / "rejected.json", rejected)
        trained, frozen = optimizer.num_parameters(self.model)
        losses = [line["loss"] for line in self.reporter.lines]
        report: dict[str, Any] = {
            "stage": self.plan.stage,
            "checkpoint": str(self.last_good.relative_to(self.plan.out)),
            "iterations": self.iteration,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "seconds": round(self.totals.elapsed_seconds, 3),
            "peak_memory_bytes": self._peak_memory(),
            "trained_parameters": trained,
            "frozen_parameters": frozen,
            "samples": self.totals.samples,
            "tokens": self.totals.tokens,
            "rejected": len(rejected),
        }
        files.write_json(self.plan.out / "finished.json", report)
        if rejected:
            print(
                f"{self.plan.stage}: {len(rejected)} samples could not be used; {self.plan.out / 'rejected.json'} "
                "says which and why",
                file=sys.stderr,
            )


def _build_model(plan: Plan) -> Any:
    """The model without weights: they are loaded next."""
    folder = plan.parent / "huggingface"
    return model.build(*read_configs(folder), plan.config, *read_pixel_statistics(folder / "vision"), initialise=False)
