"""One optimizer step: micro-batches through mcore's schedule, the gradient over all of them, and its refusal if broken.

Shapes: S slots of a packed sequence, R trained positions of a micro-batch, K data sets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from vlm.batch import PackedBatch
from vlm.train.feed import Feed
from vlm.train.metrics import Outcome, Sums


class NonFiniteError(ArithmeticError):
    """The loss or the gradient of a step is not a number, so every weight after it would be lost."""


def _loss(
    sets_R: torch.Tensor | None, num_sets: int, losses_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the losses of a micro-batch and the number of its trained tokens, as mcore's schedule takes them; and the
    sums by data set, float64 [K]. Not `index_add`, whose order of addition varies on a GPU."""
    # Filled on the device: a copy of the number would make the host wait for all that the device was asked before.
    count = torch.full((), losses_R.numel(), dtype=torch.int, device=losses_R.device)
    apart_KR = losses_R.detach().double().unsqueeze(0)
    if sets_R is not None:
        numbers_K1 = torch.arange(num_sets, device=losses_R.device).unsqueeze(1)
        apart_KR = torch.where(sets_R == numbers_K1, apart_KR, 0.0)
    return losses_R.sum(), count, apart_KR.sum(1)


def forward(feed: Feed, model: Any) -> tuple[torch.Tensor, Any]:
    """mcore's `forward_step_func`: the next micro-batch through the model, and what to make of its losses."""
    losses_R = model(next(feed))
    return losses_R, partial(_loss, feed.sets_R, len(feed.sets))


def reduce(parts: Sequence[torch.Tensor], feed: Feed, device: torch.device) -> Sums:
    """Everything that is summed, over all ranks at once, in float64: exact counts to 2^53.

    Args:
        parts: losses by data set [K] of each micro-batch; only the last pipeline stage has any.
    """
    sets = feed.sets
    counts = [*feed.trained, feed.tokens, sum(map(len, feed.keys)), feed.images, feed.pairs]
    sums = torch.tensor([0.0] * len(sets) + counts, dtype=torch.float64, device=device)
    if parts:
        sums[: len(sets)] = torch.stack(list(parts)).sum(0)
    if parallel_state.get_data_parallel_world_size() > 1:
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(sums, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    values = sums.tolist()
    losses, trained, rest = values[: len(sets)], values[len(sets) : -4], values[-4:]
    tokens, samples, images, pairs = map(int, rest)
    return Sums(
        losses=dict(zip(sets, losses, strict=True)),
        trained=dict(zip(sets, map(int, trained), strict=True)),
        tokens=tokens,
        samples=samples,
        images=images,
        pairs=pairs,
    )


class Step:
    """Runs optimizer steps of `num_micro_batches` packed sequences on this data-parallel rank.

    Args:
        model: the model in mcore's DDP.
        optimizer: mcore's optimizer over it.
        loader: packed sequences of this data-parallel rank; None where another rank builds them.
        num_micro_batches: packed sequences per step on this rank (global batch / data-parallel ranks).
        sequence_length: S, slots of a packed sequence; pipeline stages exchange activations of this length.
        device: where the batches go.
        sets: names of the data sets, as sample keys begin with them.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        loader: Iterator[PackedBatch] | None,
        *,
        num_micro_batches: int,
        sequence_length: int,
        device: torch.device,
        sets: Sequence[str],
    ) -> None:
        self._model, self._optimizer, self._device = model, optimizer, device
        self._feed = Feed(loader, device, sets)
        self._num_micro_batches = num_micro_batches
        self._forward_backward = partial(
            get_forward_backward_func(),
            forward_step_func=forward,
            model=[model],
            num_microbatches=num_micro_batches,
            seq_length=sequence_length,
            micro_batch_size=1,
        )

    def __call__(self) -> Outcome:
        """Take one step.

        Raises:
            NonFiniteError: loss or gradient norm is infinite or not a number; names the samples of the step. The
                weights in memory are then worthless and must not be saved.
        """
        started = time.perf_counter()
        self._feed.begin()
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            self._feed.fetch(self._num_micro_batches)
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        parts = self._forward_backward(data_iterator=self._feed)
        _, gradient_norm, _ = self._optimizer.step()
        sums = reduce(parts, self._feed, self._device)
        if not (math.isfinite(sums.loss_sum) and math.isfinite(gradient_norm)):
            raise NonFiniteError(self._blame(sums, gradient_norm, parts))
        return Outcome(
            **vars(sums),
            gradient_norm=float(gradient_norm),
            seconds=time.perf_counter() - started,
            data_wait_seconds=self._feed.wait_seconds,
        )

    def _blame(self, sums: Sums, gradient_norm: float, parts: Sequence[torch.Tensor]) -> str:
        """Names the samples of the micro-batches whose loss is broken, or of the whole step if only gradients are."""
        broken = [not bool(torch.isfinite(losses_K).all()) for losses_K in parts]
        chosen = [keys for keys, bad in zip(self._feed.keys, broken, strict=False) if bad]
        mine = (any(broken), chosen if any(broken) else self._feed.keys)
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)  # only the last stages of pipelines know what is broken
        any_broken = any(bad for bad, _ in everyone)
        found = [key for bad, groups in everyone if bad or not any_broken for group in groups for key in group]
        keys = dict.fromkeys(found)
        loss = sums.loss_sum / max(sums.trained_tokens, 1)
        return f"loss {loss}, gradient norm {gradient_norm}; samples: {', '.join(keys)}"
