"""One optimizer step: micro-batches through mcore's schedule, the gradient over all of them, and its refusal if broken.

Shapes: S slots of a packed sequence, R trained positions of a micro-batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from vlm.batch import PackedBatch
from vlm.train.feed import Feed
from vlm.train.metrics import Outcome


class NonFiniteError(ArithmeticError):
    """The loss or the gradient of a step is not a number, so every weight after it would be lost."""


def _loss(losses_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, int]]:
    """Sum of the losses of a micro-batch and the number of its trained tokens, as mcore's schedule takes them."""
    loss_sum = losses_R.sum()
    count = torch.tensor(losses_R.numel(), dtype=torch.int, device=losses_R.device)
    return loss_sum, count, (loss_sum.detach(), losses_R.numel())


def _forward(batches: Iterator[PackedBatch], model: Any) -> tuple[torch.Tensor, Any]:
    return model(next(batches)), _loss


class Step:
    """Runs optimizer steps of `num_micro_batches` packed sequences on this data-parallel rank.

    Args:
        model: the model in mcore's DDP.
        optimizer: mcore's optimizer over it.
        loader: packed sequences of this data-parallel rank.
        num_micro_batches: packed sequences per step on this rank (global batch / data-parallel ranks).
        sequence_length: S, slots of a packed sequence; pipeline stages exchange activations of this length.
        device: where the batches go.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        loader: Iterator[PackedBatch],
        *,
        num_micro_batches: int,
        sequence_length: int,
        device: torch.device,
    ) -> None:
        self._model, self._optimizer, self._device = model, optimizer, device
        self._feed = Feed(loader, device)
        self._num_micro_batches = num_micro_batches
        self._forward_backward = partial(
            get_forward_backward_func(),
            forward_step_func=_forward,
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
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        parts = self._forward_backward(data_iterator=self._feed)
        _, gradient_norm, _ = self._optimizer.step()
        loss_sum, trained_tokens, tokens, samples = self._reduce(parts)
        if not (math.isfinite(loss_sum) and math.isfinite(gradient_norm)):
            raise NonFiniteError(self._blame(loss_sum, trained_tokens, gradient_norm, parts))
        return Outcome(
            loss_sum=loss_sum,
            trained_tokens=int(trained_tokens),
            tokens=int(tokens),
            samples=int(samples),
            gradient_norm=float(gradient_norm),
            seconds=time.perf_counter() - started,
            data_wait_seconds=self._feed.wait_seconds,
        )

    def _reduce(self, parts: list[tuple[torch.Tensor, int]]) -> list[float]:
        """Loss sum, trained tokens, tokens and samples over all ranks, in float64: exact counts to 2^53."""
        sums = torch.zeros(4, dtype=torch.float64, device=self._device)
        if parts:  # only the last pipeline stage has losses
            sums[0] = torch.stack([loss for loss, _ in parts]).double().sum()
            sums[1] = sum(count for _, count in parts)
        sums[2] = self._feed.tokens
        sums[3] = sum(map(len, self._feed.keys))
        if parallel_state.get_data_parallel_world_size() > 1:
            torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(sums, src=last, group=parallel_state.get_pipeline_model_parallel_group())
        return sums.tolist()

    def _blame(self, loss_sum: float, trained_tokens: float, gradient_norm: float, parts: list[Any]) -> str:
        """Names the samples of the micro-batches whose loss is broken, or of the whole step if only gradients are."""
        broken = [not bool(torch.isfinite(loss)) for loss, _ in parts]
        chosen = [keys for keys, bad in zip(self._feed.keys, broken, strict=False) if bad]
        mine = (any(broken), chosen if any(broken) else self._feed.keys)
        world = parallel_state.get_data_parallel_world_size()
        everyone: list[Any] = [mine]
        if world > 1:
            everyone = [None] * world
            torch.distributed.all_gather_object(everyone, mine, group=parallel_state.get_data_parallel_group())
        any_broken = any(bad for bad, _ in everyone)
        keys = [key for bad, groups in everyone if bad or not any_broken for group in groups for key in group]
        loss = loss_sum / max(trained_tokens, 1)
        return f"loss {loss}, gradient norm {gradient_norm}; samples: {', '.join(keys)}"
