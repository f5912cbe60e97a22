"""Builds what a stage needs and runs its iterations: step, report, save."""

from __future__ import annotations

import math
import random
import resource
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from megatron.core import parallel_state

from vlm import checkpoint, files, loader, model, parallel
from vlm.checkpoint import places
from vlm.checkpoint.places import CHECKPOINTS
from vlm.model import flops
from vlm.model.builder import read_configs, read_pixel_statistics
from vlm.model.sizes import language_sizes, vision_sizes
from vlm.train import identity, optimizer, sharing
from vlm.train.metrics import Meter, Outcome, Reporter, Totals
from vlm.train.plan import Plan
from vlm.train.step import NonFiniteError, Step
from vlm.train.stop import Stop, name
from vlm.train.validation import Progress, Validation


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
        self.progress = Progress()
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
        self.num_parameters = optimizer.num_parameters(self.model)
        wrapped = optimizer.wrap(self.model, distributed_optimizer=config.parallel.distributed_optimizer)
        self.optimizer, self.schedule = optimizer.build(wrapped, config, stage)
        self.loader = _open_data(plan, "train")
        self.data_restarts: list[int] = []
        layout: dict[str, Any] = {
            "sequence_length": stage.sequence_length,
            "device": parallel.device(),
            "sets": tuple(stage.data),
            "num_micro_batches": plan.num_micro_batches,
        }
        self.validation = None
        if stage.validation_interval:
            limit = stage.validation_batches * plan.num_micro_batches or None
            self.validation = Validation(wrapped, _open_data(plan, "val"), max_sequences=limit, **layout)
        self.iteration = 0 if newest is None else self._resume(newest)
        self.saved_iteration = self.iteration
        self.pending: checkpoint.Pending | None = None
        self._claim(known)
        self.last_good = newest or plan.parent
        self.step = Step(wrapped, self.optimizer, self.loader, **layout)
        self.meter = _meter(plan)
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
        if error is not None and torch.distributed.get_world_size() == 1:
            self._finish_saving()  # several ranks cannot: some of them may be in a collective that will not end
        self.reporter.close()
        self._close_data()

    def train(self) -> str | None:
        """Run the iterations that are left, then write `finished.json`.

        Returns:
            None at the end; where it was asked to stop and has saved, a sentence that says so.

        Raises:
            NonFiniteError: names the iteration, the samples and the last good checkpoint. Nothing was saved since.
        """
        stage = self.plan.settings
        self.stop.began()
        while not self._ended():
            code, busy = self._agreed(self.stop.code, self.pending is not None and self.pending.busy)
            if not busy:
                self._finish_saving()
            if code:
                return self._leave(code)
            outcome = self._step()
            validation = self._validate()
            last = self._ended()
            self._report(outcome, validation, now=last or self.iteration % stage.log_interval == 0)
            if last or self.iteration % stage.save_interval == 0:
                if stage.keep_best:
                    self.progress.saving(self.iteration, validation["validation_loss"])
                self._save()
        self._finish_saving()
        rejected = self._rejected()
        if self.first_rank:
            self._finish(rejected)
        return None

    def _step(self) -> Outcome:
        self.schedule.step(1)
        try:
            outcome = self.step()
        except NonFiniteError as error:
            self._finish_saving()
            raise NonFiniteError(
                f"{self.plan.stage}: iteration {self.iteration + 1} is not finite: {error}. "
                f"The last good checkpoint is {self.last_good}; nothing was written over it."
            ) from None
        self.stop.stepped(outcome.seconds)
        self.iteration += 1
        return outcome

    def _ended(self) -> bool:
        stage = self.plan.settings
        return self.iteration == stage.iterations or self.progress.exhausted(stage.early_stop)

    def _validate(self) -> dict[str, float]:
        """The validation losses, where it is time for them."""
        stage = self.plan.settings
        due = self.iteration == stage.iterations or self.iteration % max(stage.validation_interval, 1) == 0
        if self.validation is None or not due:
            return {}
        started = time.monotonic()
        losses = self.validation()
        if not math.isfinite(losses["validation_loss"]):
            self._finish_saving()
            raise NonFiniteError(
                f"{self.plan.stage}: the validation loss after iteration {self.iteration} is "
                f"{losses['validation_loss']}. The last good checkpoint is {self.last_good}."
            )
        self.stop.validated(time.monotonic() - started)
        self.progress.add(losses["validation_loss"])
        return losses

    def _agreed(self, *values: int) -> list[int]:
        """The largest of all ranks' values: what one rank was asked for, all do, at the same iteration."""
        largest = torch.tensor(values)  # on the CPU, so that a GPU that is still busy is not waited for
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return largest.tolist()

    def _leave(self, code: int) -> str:
        """Save what is not yet saved."""
        if self.iteration > self.saved_iteration:
            self._save()
        self._finish_saving()
        return (
            f"{self.plan.stage}: stopped by {name(code)} after iteration {self.iteration} of "
            f"{self.plan.settings.iterations}, all of it is in {self.last_good}; the same command goes on from there"
        )

    def _report(self, outcome: Outcome, validation: dict[str, float], *, now: bool) -> None:
        self.totals.add(outcome)
        self.reporter.advance(outcome)
        if now:
            rate = optimizer.learning_rate(self.optimizer)
            line = self.totals.line(self.iteration, outcome, rate, self.meter, self._peak_memory())
            self.reporter.write(line | {"packing_efficiency": self._packing_efficiency()})
        if validation:
            self.reporter.write({"iteration": self.iteration, **validation})

    def _packing_efficiency(self) -> float:
        """Share of the slots so far that held tokens instead of padding, over all ranks."""
        stage = self.plan.settings
        return round(self.totals.tokens / (self.iteration * stage.global_batch * stage.sequence_length), 4)

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

    def _resume(self, newest: Path) -> int:
        resumed = checkpoint.load_stage(newest, model=self.model, optimizer=self.optimizer, scheduler=self.schedule)
        workers, there = self.plan.config.data.workers, resumed.extra["workers"]
        if workers != there:
            raise ValueError(
                f"data.workers: is {workers}, but {newest} was written with {there}, and the place in the data cannot "
                f"be carried over; set it back, or move {self.plan.out} away to train from the start"
            )
        self._resume_data(resumed, newest)
        self.totals = Totals(**resumed.extra["totals"])
        self.progress = self._resume_progress(resumed.extra["validation"])
        self.peak_memory_bytes = resumed.extra["peak_memory_bytes"]
        if self.first_rank:
            print(f"{self.plan.stage}: resuming after iteration {resumed.iteration} from {newest}", file=sys.stderr)
        return resumed.iteration

    def _resume_data(self, resumed: checkpoint.Resumed, newest: Path) -> None:
        """Go on at the same place. Energon's places belong to as many ranks as there were: others begin a new stream,
        drawn from the seed and the iteration, so that it does not repeat the samples of the beginning."""
        self.data_restarts = list(resumed.extra["data_restarts"])
        if resumed.loader is None:
            self.data_restarts.append(resumed.iteration)
            if self.first_rank:
                print(
                    f"{self.plan.stage}: parallel gives {self.plan.config.parallel.data} data-parallel ranks, {newest} "
                    f"was written by {resumed.layout['data']}: the place in the data cannot be carried over, and a "
                    "newly shuffled stream begins",
                    file=sys.stderr,
                )
        if self.data_restarts:
            self._close_data()
            self.loader = _open_data(self.plan, "train", self.data_restarts[-1])
        if (place := resumed.loader) is not None:
            sharing.on_builder(lambda: self.loader.restore(place))

    def _close_data(self) -> None:
        if self.loader is not None:
            self.loader.close()

    def _resume_progress(self, state: dict[str, Any]) -> Progress:
        """A kill may have come between a checkpoint and the word that it is the best; or the best one is not kept."""
        progress = Progress(**state)
        out, best = self.plan.out, progress.best
        if not (self.plan.settings.keep_best and best and places.iteration_folder(out, best).is_dir()):
            progress.best = progress.best_loss = None
        if self.first_rank:
            places.name_best(out, progress.best)
        return progress

    def _rejected(self) -> dict[str, str]:
        """Samples that no data-parallel rank could use, and why."""
        streams = [self.loader, self.validation and self.validation.split]
        mine = {key: reason for one in streams if one is not None for key, reason in one.rejected.items()}
        ranks: list[dict[str, str]] = [mine]
        if (world := parallel_state.get_data_parallel_world_size()) > 1:
            ranks *= world
            group = parallel_state.get_data_parallel_group()
            torch.distributed.all_gather_object(ranks, mine, group=group)
        return {key: reason for rank in ranks for key, reason in sorted(rank.items())}

    def _save(self) -> None:
        """Begin to save; a thread writes while training goes on."""
        self._finish_saving()
        self.reporter.sync()
        self.pending = checkpoint.begin_stage(
            self.plan.out,
            stage=self.plan.stage,
            iteration=self.iteration,
            parent=self.plan.parent,
            trainable=self.plan.settings.trainable,
            identity=self.plan.digest,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.schedule,
            loader=b"" if self.loader is None else self.loader.state(),
            extra={
                "totals": asdict(self.totals),
                "validation": asdict(self.progress),
                "workers": self.plan.config.data.workers,
                "data_restarts": self.data_restarts,
                "peak_memory_bytes": self._peak_memory(),
            },
            keep=self.plan.settings.keep,
            best=self.progress.best,
        )
        self.saved_iteration = self.iteration

    def _finish_saving(self) -> None:
        if self.pending is not None:
            self.last_good = self.pending.finish()
            self.stop.saved(self.pending.seconds)
            self.pending = None

    def _peak_memory(self) -> int:
        """Largest memory of a rank so far: on its GPU, or in all where it has none. Called by all ranks."""
        if torch.cuda.is_available():
            now = torch.cuda.max_memory_allocated()
        else:
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.peak_memory_bytes = max(self.peak_memory_bytes, self._agreed(now)[0])
        return self.peak_memory_bytes

    def _finish(self, rejected: dict[str, str]) -> None:
        files.write_json(self.plan.out / "rejected.json", rejected)
        trained, frozen = self.num_parameters
        losses, validated = (
            [line[key] for line in self.reporter.lines if key in line] for key in ("loss", "validation_loss")
        )
        report: dict[str, Any] = {
            "stage": self.plan.stage,
            "checkpoint": str(self.last_good.relative_to(self.plan.out)),
            "iterations": self.iteration,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "last_validation_loss": validated[-1] if validated else None,
            "lowest_validation_loss": self.progress.lowest,
            "best_iteration": self.progress.best,
            "stopped_early": self.progress.stale if self.iteration < self.plan.settings.iterations else None,
            "seconds": round(self.totals.elapsed_seconds, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
            "trained_parameters": trained,
            "frozen_parameters": frozen,
            "samples": self.totals.samples,
            "tokens": self.totals.tokens,
            "packing_efficiency": self._packing_efficiency(),
            "rejected": len(rejected),
            "data_restarts": self.data_restarts,
        }
        files.write_json(self.plan.out / "finished.json", report)
        if rejected:
            print(
                f"{self.plan.stage}: {len(rejected)} samples could not be used; {self.plan.out / 'rejected.json'} "
                "says which and why",
                file=sys.stderr,
            )


def _open_data(plan: Plan, split: Literal["train", "val"], restarted: int = 0) -> Any:
    """The data of this data-parallel rank, None on ranks that build no batches; a stream of its own for every iteration
    it may be restarted at."""
    seed = random.Random(f"{plan.config.seed} {restarted}").getrandbits(31) if restarted else plan.config.seed
    build = partial(
        loader.build,
        plan.config.model_copy(update={"seed": seed}),
        plan.stage,
        plan.data,
        checkpoint.huggingface(plan.parent, "language"),
        checkpoint.huggingface(plan.parent, "vision"),
        rank=parallel_state.get_data_parallel_rank(),
        world=parallel_state.get_data_parallel_world_size(),
        split=split,
    )
    return sharing.on_builder(build)


def _build_model(plan: Plan) -> Any:
    """The model without weights: they are loaded next."""
    folder = plan.parent / "huggingface"
    return model.build(*read_configs(folder), plan.config, *read_pixel_statistics(folder / "vision"), initialise=False)


def _meter(plan: Plan) -> Meter:
    settings = plan.config
    language, vision = read_configs(plan.parent / "huggingface")
    cost = flops.count(
        language_sizes(language),
        vision_sizes(vision),
        projector_size=settings.models.projector.hidden_size,
        feature_layer=settings.models.vision.feature_layer,
        trainable=plan.settings.trainable,
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return Meter(cost, settings.parallel.world_size, flops.peak(device, settings.dtype))
