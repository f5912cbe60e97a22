"""Where a step's batches come from: the loader, with the wait timed and the samples remembered."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from vlm.batch import PackedBatch


class Feed(Iterator[PackedBatch]):
    """Hands the loader's batches to mcore's schedule, timing the wait and remembering what was in them.

    Args:
        loader: packed sequences of this data-parallel rank.
        device: where the batches go.
    """

    def __init__(self, loader: Iterator[PackedBatch], device: torch.device) -> None:
        self._loader, self._device = loader, device
        self.begin()

    def begin(self) -> None:
        """Forget the step before."""
        self.wait_seconds = 0.0
        self.tokens = 0
        self.keys: list[tuple[str, ...]] = []

    def __next__(self) -> PackedBatch:
        started = time.perf_counter()
        # Opening a torch DataLoader draws a seed; a resumed run opens one more often than one that was left alone.
        with torch.random.fork_rng(devices=[]):
            batch = next(self._loader)
        self.wait_seconds += time.perf_counter() - started
        self.keys.append(batch.sample_keys)
        self.tokens += batch.num_tokens
        return batch.to(self._device)
