"""The loss on held-out samples: the same ones every time, measured without touching the training.

It decides which checkpoint is the best and when to stop early; what that needs to know travels in the checkpoints.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from vlm.batch import PackedBatch
from vlm.train.feed import Feed
from vlm.train.metrics import Sums, means
from vlm.train.step import forward, reduce


@dataclass
class Progress:
    """What the validation losses so far say. Of the loss alone: nothing here is of one rank."""

    lowest: float | None = None
    stale: int = 0
    """Validations since the lowest loss."""
    best: int | None = None
    """Iteration of the checkpoint with the lowest loss of those that were validated."""
    best_loss: float | None = None

    def add(self, loss: float) -> None:
        """Note the loss of a validation."""
        if self.lowest is None or loss < self.lowest:
            self.lowest, self.stale = loss, 0
        else:
            self.stale += 1

    def exhausted(self, patience: int | None) -> bool:
        """Whether so many validations in a row were without improvement; never where it is None."""
        return patience is not None and self.stale >= patience

    def saving(self, iteration: int, loss: float) -> None:
        """Note that the model which has this validation loss is being saved."""
        if self.best_loss is None or loss < self.best_loss:
            self.best, self.best_loss = iteration, loss


class Validation:
    """Measures the loss of a model in training.

    Args:
        model: the model in mcore's DDP.
        split: packed sequences of the validation samples of this data-parallel rank, the same ones each time it is
            iterated over; None where another rank builds them.
        num_micro_batches: packed sequences per forward pass through the pipeline.
        max_sequences: of this rank; None for all.
        sequence_length: S, slots of a packed sequence.
        device: where the batches go.
        sets: names of the data sets.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        split: Iterable[PackedBatch] | None,
        *,
        num_micro_batches: int,
        max_sequences: int | None,
        sequence_length: int,
        device: torch.device,
        sets: Sequence[str],
    ) -> None:
        self._model, self.split, self._device, self._sets = model, split, device, tuple(sets)
        self._num_micro_batches, self._max_sequences = num_micro_batches, max_sequences
        self._forward = partial(
            get_forward_backward_func(),
            forward_step_func=forward,
            model=[model],
            seq_length=sequence_length,
            micro_batch_size=1,
            forward_only=True,
        )

    def __call__(self) -> dict[str, float]:
        """`validation_loss`, the mean over trained tokens (nats), and that of each of several data sets.

        The same on all ranks.

        Raises:
            ValueError: there is no trained token in the validation samples.
        """
        self._model.eval()
        try:
            with torch.no_grad(), _generators_untouched():
                sums = self._measure()
        finally:
            self._model.train()
        if not sums.trained_tokens:
            sets = ", ".join(f"data.sets.{name}.validation_share" for name in self._sets)
            raise ValueError(f"no token of the validation split is trained: raise {sets}, and write the shards again")
        return means("validation_loss", sums.losses, sums.trained)

    def _measure(self) -> Sums:
        batches = None if self.split is None else islice(self.split, self._max_sequences)
        feed, parts = Feed(batches, self._device, self._sets), list[Any]()
        while number := feed.fetch(self._num_micro_batches):  # how many there are has to be known beforehand
            parts += self._forward(data_iterator=feed, num_microbatches=number)
        return reduce(parts, feed, self._device)


@contextmanager
def _generators_untouched() -> Iterator[None]:
    """Whatever is drawn inside, the training draws the same numbers after it."""
    states = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
