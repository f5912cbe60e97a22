"""How the kernels for Hopper find their tiles: descriptors for the copy engine, tables of packed segments, strides."""

from __future__ import annotations

import functools
import itertools

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vlm_kernels import reference

TILE = 128  # rows of a query tile in the forward pass and of a key tile in the backward pass, keys of a step
COLUMNS = gl.constexpr(4)  # of a pack's table
ALIGNMENT_BYTES = 16  # of all that the copy engine reads in one piece
MOST_COLUMNS = 2**31 - 1  # its coordinates have 32 bits
ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def copyable(x: Tensor) -> bool:
    """Whether the copy engine can address the heads of x [S, .., K] where they lie."""
    outer = [
        stride * x.element_size() for size, stride in zip(x.shape[1:-1], x.stride()[1:-1], strict=True) if size > 1
    ]
    return (
        x.stride(-1) == 1
        and x.stride(0) > 0
        and not any(step % ALIGNMENT_BYTES for step in (x.data_ptr(), x.stride(0) * x.element_size(), *outer))
        and _width(x) <= MOST_COLUMNS
    )


def _width(x: Tensor) -> int:
    """Columns of x [S, .., K] as a matrix of S rows, from the first element of a row to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))


def multiprocessors(x: Tensor) -> int:
    """How many programs x's device runs at least at the same time."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def rows_of(x: Tensor, rows: int) -> TensorDescriptor:
    """x [S, .., K] as a matrix of S rows in which a head is K columns, to be copied `rows` rows of a head at once."""
    block = [rows, x.shape[-1]]
    return TensorDescriptor(x, [len(x), _width(x)], [x.stride(0), 1], block, _layout(*block, x.dtype))


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], ELEMENTS[dtype])


_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def table_of(borders: Tensor, backward: bool) -> Tensor:
    """[tiles, 4] int32 of a pack: first row of the tile's segment, its length, the tile's number in it, its first tile.

    Those with most work come first: query tiles with most keys before them or, `backward`, key tiles with most queries
    after them. Made once per pack, from borders that `reference.check_attention` has looked at already.
    """
    version = None if borders.is_inference() else borders._version
    known = _tables.get(borders)
    if known is None or version is None or known[0] != version:
        tiles: list[tuple[int, int, int, int]] = []
        for start, end in itertools.pairwise(reference.values_of(borders)):
            first = len(tiles)
            tiles += [(start, end - start, number, first) for number in range(triton.cdiv(end - start, TILE))]
        forwards = sorted(tiles, key=lambda tile: -tile[2])
        backwards = sorted(tiles, key=lambda tile: tile[2] - triton.cdiv(tile[1], TILE))
        both = torch.tensor([forwards, backwards], dtype=torch.int32, pin_memory=borders.is_cuda)
        both = both.to(borders.device, non_blocking=True)
        known = _tables[borders] = (version, both)
    return known[1][int(backward)]


def strides_of(**tensors: Tensor) -> dict[str, int]:
    """stride_kb and stride_kh of k [S, B, G, K], and so on; of q [S, B, G, H / G, K] stride_qg too.

    The batch stride of a packed tensor is 0.
    """
    strides = {}
    for name, x in tensors.items():
        grouped = name == "q"
        strides[f"stride_{name}b"] = x.stride(1) if x.dim() == (5 if grouped else 4) else 0
        strides[f"stride_{name}h"] = x.stride(-2)
        if grouped:
            strides["stride_qg"] = x.stride(-3)
    return strides
