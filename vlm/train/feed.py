"""Where a step's batches come from: the loader of this model-parallel group, timed and counted.

Shapes: R trained positions of a micro-batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

import vlm_kernels
from vlm.batch import PackedBatch
from vlm.train.sharing import Sharing, Tensors

LOOKED_AT = ("cu_seqlens", "image_positions", "labels_R")
"""Tensors whose values the kernels check."""


@dataclass(frozen=True)
class _Contents:
    """What the host knows of a micro-batch, so that nothing waits for the device to count it."""

    keys: tuple[str, ...]
    max_seqlen: int
    tokens: int
    images: int
    pairs: int
    trained: list[int]
    looked_at: dict[str, torch.Tensor]
    """The tensors of LOOKED_AT, on the CPU."""


class Feed(Iterator[PackedBatch]):
    """Hands batches to mcore's schedule, timing the wait and counting what was in them.

    Args:
        loader: packed sequences of this data-parallel rank; None on the ranks that get theirs from the one that builds
            them, see `vlm.train.sharing`.
        device: where the batches go.
        sets: names of the data sets, as `sample_keys` begin with them.
    """

    def __init__(self, loader: Iterator[PackedBatch] | None, device: torch.device, sets: Sequence[str]) -> None:
        self._loader, self._device = loader, device
        self._ready: deque[tuple[_Contents, Tensors]] = deque()
        group = parallel_state.get_model_parallel_group(check_initialized=False)
        self._sharing = Sharing(device) if group is not None and group.size() > 1 else None
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

    def fetch(self, limit: int) -> int:
        """Take up to `limit` batches now, for the `next` calls to come; the number of them, fewer at the end.

        The stages of a pipeline ask for a batch at different times, and would wait for each other in sharing it.
        """
        try:
            while len(self._ready) < limit:
                self._ready.append(self._take())
        except StopIteration:
            pass
        return len(self._ready)

    def __next__(self) -> PackedBatch:
        contents, tensors = self._ready.popleft() if self._ready else self._take()
        self.keys.append(contents.keys)
        self.tokens += contents.tokens
        self.images += contents.images
        self.pairs += contents.pairs
        self.trained = [sum(pair) for pair in zip(self.trained, contents.trained, strict=True)]
        moved: dict[str, Any] = {name: value.to(self._device, non_blocking=True) for name, value in tensors.items()}
        for name, values in contents.looked_at.items():
            vlm_kernels.known_on_host(moved[name], values)
        self.sets_R = moved.pop("sets_R", None)
        return PackedBatch(**moved, max_seqlen=contents.max_seqlen, sample_keys=contents.keys)

    def _take(self) -> tuple[_Contents, Tensors]:
        started = time.perf_counter()
        try:
            return self._build() if self._sharing is None else self._sharing.share(self._build)
        finally:
            self.wait_seconds += time.perf_counter() - started

    def _build(self) -> tuple[_Contents, Tensors]:
        assert self._loader is not None
        # Opening a torch DataLoader draws a seed; a resumed run opens one more often than one that was left alone.
        with torch.random.fork_rng(devices=[]):
            batch = next(self._loader)
        return self._count(batch)

    def _count(self, batch: PackedBatch) -> tuple[_Contents, Tensors]:
        borders = batch.cu_seqlens[: len(batch.sample_keys) + 1]  # without the padding
        lengths = borders.diff().to(torch.int64)
        tensors = batch.tensors
        trained = [len(batch.trained_positions)]
        if len(self.sets) > 1:
            names = [key.partition("/")[0] for key in batch.sample_keys]
            owners = torch.tensor([self.sets.index(name) for name in names], dtype=torch.int64)
            sets_R = owners[torch.searchsorted(borders, batch.trained_positions, right=True) - 1]
            trained = sets_R.bincount(minlength=len(self.sets)).tolist()
            if self._device.type == "cuda" and self._sharing is None:  # or the copy would wait for the device
                sets_R = sets_R.pin_memory()
            tensors["sets_R"] = sets_R
        contents = _Contents(
            keys=batch.sample_keys,
            max_seqlen=batch.max_seqlen,
            tokens=batch.num_tokens,
            images=len(batch.images),
            pairs=int((lengths * (lengths + 1)).sum()) // 2,
            trained=trained,
            looked_at={name: tensors[name] for name in LOOKED_AT},
        )
        return contents, tensors
