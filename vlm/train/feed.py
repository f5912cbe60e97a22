"""Where a step's batches come from: the loader, with the wait timed and what was in them counted.

Shapes: R trained positions of a micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from vlm.batch import PackedBatch


class Feed(Iterator[PackedBatch]):
    """Hands the loader's batches to mcore's schedule, timing the wait and counting what was in them.

    Counts are taken on the CPU, before a batch leaves for the device, so that nothing waits for it.

    Args:
        loader: packed sequences of this data-parallel rank.
        device: where the batches go.
        sets: names of the data sets, as `sample_keys` begin with them.
    """

    def __init__(self, loader: Iterator[PackedBatch], device: torch.device, sets: Sequence[str]) -> None:
        self._loader, self._device = loader, device
        self.sets = tuple(sets)
        self.begin()

    def begin(self) -> None:
        """Forget the step before."""
        self.wait_seconds = 0.0
        self.tokens = self.images = self.pairs = 0
        self.trained = [0] * len(self.sets)
        """Trained tokens of each data set."""
        self.keys: list[tuple[str, ...]] = []
        self.sets_R: torch.Tensor | None = None
        """int64 [R] on the device, the data set of each trained position of the last batch; None if there is one."""

    def __next__(self) -> PackedBatch:
        started = time.perf_counter()
        # Opening a torch DataLoader draws a seed; a resumed run opens one more often than one that was left alone.
        with torch.random.fork_rng(devices=[]):
            batch = next(self._loader)
        self.wait_seconds += time.perf_counter() - started
        self._count(batch)
        return batch.to(self._device)

    def _count(self, batch: PackedBatch) -> None:
        borders = batch.cu_seqlens[: len(batch.sample_keys) + 1]  # without the padding
        lengths = borders.diff().to(torch.int64)
        self.keys.append(batch.sample_keys)
        self.tokens += int(borders[-1])
        self.images += len(batch.images)
        self.pairs += int((lengths * (lengths + 1)).sum()) // 2
        if len(self.sets) == 1:
            self.trained[0] += len(batch.trained_positions)
            return
        names = [key.partition("/")[0] for key in batch.sample_keys]
        owners = torch.tensor([self.sets.index(name) for name in names], dtype=torch.int64)
        sets_R = owners[torch.searchsorted(borders, batch.trained_positions, right=True) - 1]
        for number, trained in enumerate(sets_R.bincount(minlength=len(self.sets)).tolist()):
            self.trained[number] += trained
        if self._device.type == "cuda":  # from page-locked memory, or the copy would wait for the device
            sets_R = sets_R.pin_memory()
        self.sets_R = sets_R.to(self._device, non_blocking=True)
