# mypy: allow-untyped-defs
# (the arguments of a Triton kernel have no Python types)
"""A tile of the product x w^T, for the kernels that do something with it before it reaches memory.

Operands are tensor descriptors, which Hopper's copy engine (TMA) reads without a register or an address computation of
the program's own, and which give zeros beyond the tensor's edges. Kernels walk their tiles with as many programs as the
GPU has multiprocessors, so that the loads of the next tile run under the end of the last one. On an H200 a product of
9232 x 4096 x 4096 in bf16 runs at 684 TFLOP/s this way, 710 in cuBLAS; with a program per tile it was 586, and with
ordinary loads 490.

Shapes: M row tile, N column tile, K tile of the summed dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BAND = 16  # row tiles that share a walk over the columns: 16 x 128 rows of 4096 are 16 MiB, a third of the L2 cache
PROGRAMS = 132  # multiprocessors of an H100 or H200
ALIGNMENT_BYTES = 16  # of a descriptor's first element and of its rows


class Tiles(NamedTuple):
    """Rows M, columns N and the summed dimension K of a tile, and how it is run."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def options(tiles: Tiles) -> dict[str, Any]:
    """Constants of a kernel that computes products in such tiles."""
    return {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "BAND": BAND,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x [.., ..] as tiles of rows x columns. What the copy engine cannot address (ALIGNMENT_BYTES) is copied first."""
    if x.data_ptr() % ALIGNMENT_BYTES or x.stride(0) * x.element_size() % ALIGNMENT_BYTES:
        x = aligned(x, x.shape[1]).copy_(x)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def aligned(x: Tensor, columns: int) -> Tensor:
    """An empty [len(x), columns] of x's type that a descriptor can address."""
    words = ALIGNMENT_BYTES // x.element_size()
    return x.new_empty(len(x), triton.cdiv(columns, words) * words)[:, :columns]


@triton.jit
def tile_at(index, row_tiles, column_tiles, BAND: tl.constexpr):
    """Row and column tile number `index`: neighbours are the row tiles of a band, so that L2 holds what they share."""
    band = index // (BAND * column_tiles)
    width = tl.minimum(row_tiles - band * BAND, BAND)
    within = index - band * BAND * column_tiles
    return band * BAND + within % width, within // width


@triton.jit
def product(x, w, row, column, dim, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """x w^T in fp32 for the tile that begins at `row` of x [.., dim] and `column` of w [.., dim]."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, dim, BLOCK_K):
        acc = tl.dot(x.load([row, k]), w.load([column, k]).T, acc, input_precision="ieee")
    return acc
