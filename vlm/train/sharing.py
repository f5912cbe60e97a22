"""Batches are built once per model-parallel group, by its first rank; here the other ranks get them.

What they must know on the host (sizes, counts, sample keys, what the kernels check, a refusal) travels as an object
between the hosts. In the device's buffer it would have to be read back, and the host would wait for everything that the
device was asked to do before. All tensors follow in one flat buffer, pictures as uint8 and whole numbers as int32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from torch import distributed

T = TypeVar("T")
Tensors = Mapping[str, torch.Tensor]

_TRANSPORT = {torch.int64: torch.int32}
"""Token ids and positions are far below 2^31."""


def on_builder(build: Callable[[], T]) -> T | None:
    """What `build` opens on the ranks that build batches, None on the others. To be called by all ranks.

    Raises:
        ValueError: `build` refused on some rank; the same message on all of them.
    """
    if distributed.get_world_size() == 1:
        return build()
    opened, refusal = None, None
    if is_builder():
        try:
            opened = build()
        except (ValueError, FileNotFoundError) as error:
            refusal = str(error)
    refusals: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(refusals, refusal)
    if first := next((message for message in refusals if message is not None), None):
        raise ValueError(first)
    return opened


def is_builder() -> bool:
    """Whether this rank builds batches: tensor rank 0 of the first pipeline stage."""
    return distributed.get_rank() == parallel_state.get_model_parallel_src_rank()


_Shape = tuple[str, torch.dtype, torch.Size]


@dataclass(frozen=True)
class _Header:
    known: Any
    shapes: list[_Shape]
    error: Exception | None = None


class Sharing:
    """Hands what the first rank of this model-parallel group has to the others. All ranks call `share` alike.

    Args:
        device: where the tensors are wanted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._group = parallel_state.get_model_parallel_group()
        self._source = parallel_state.get_model_parallel_src_rank()

    def share(self, build: Callable[[], tuple[Any, Tensors]]) -> tuple[Any, Tensors]:
        """What `build` returns on the building rank: anything that pickles, and tensors, which are then on the device.

        Raises:
            StopIteration, ValueError: as `build` did.
            RuntimeError: `build` failed otherwise, on the ranks that it did not run on.
        """
        header, buffer, failure = None, None, None
        if distributed.get_rank() == self._source:
            try:
                header, buffer = self._flatten(*build())
            except Exception as error:
                header, failure = _Header(None, [], _portable(error)), error
        objects = [header]
        distributed.broadcast_object_list(objects, self._source, self._group, torch.device("cpu"))
        header = objects[0]
        assert header is not None
        if header.error is not None:
            raise failure or header.error
        if buffer is None:
            buffer = torch.empty(sum(map(_num_bytes, header.shapes)), dtype=torch.uint8, device=self._device)
        distributed.broadcast(buffer, self._source, self._group)
        views = _views(buffer, header.shapes)
        return header.known, {name: views[name].to(dtype) for name, dtype, _ in header.shapes}

    def _flatten(self, known: Any, tensors: Tensors) -> tuple[_Header, torch.Tensor]:
        """One buffer on the device, by way of page-locked memory, from which the copy waits for nothing."""
        # Bytes last, so that every number lies at a multiple of its size.
        ordered = sorted(tensors.items(), key=lambda item: -_transported(item[1].dtype).itemsize)
        shapes = [(name, value.dtype, value.shape) for name, value in ordered]
        on_gpu = self._device.type == "cuda"
        buffer = torch.empty(sum(map(_num_bytes, shapes)), dtype=torch.uint8, pin_memory=on_gpu)
        for name, view in _views(buffer, shapes).items():
            view.copy_(tensors[name])
        return _Header(known, shapes), buffer.to(self._device, non_blocking=True)


def _transported(dtype: torch.dtype) -> torch.dtype:
    return _TRANSPORT.get(dtype, dtype)


def _num_bytes(shape: _Shape) -> int:
    return shape[2].numel() * _transported(shape[1]).itemsize


def _views(buffer: torch.Tensor, shapes: list[_Shape]) -> Tensors:
    """The tensors inside a flat buffer."""
    pieces = buffer.split(list(map(_num_bytes, shapes)))
    return {
        name: piece.view(_transported(dtype)).view(shape)
        for (name, dtype, shape), piece in zip(shapes, pieces, strict=True)
    }


def _portable(error: Exception) -> Exception:
    """An exception that says the same on another rank."""
    if isinstance(error, StopIteration):
        return StopIteration()
    if isinstance(error, ValueError):
        return ValueError(str(error))
    return RuntimeError(f"the rank that builds the batches failed: {type(error).__name__}: {error}")
