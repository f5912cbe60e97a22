# mypy: allow-untyped-defs
# (the arguments of a Triton kernel have no Python types)
"""The tile of a matrix product x w^T, for the kernels that do something with it before it reaches memory.

Shapes: M row tile, N column tile, K tile of the summed dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

BAND = 16  # row tiles that share a walk over the columns: 16 x 128 rows of 4096 are 16 MiB, a third of the L2 cache


class Tiles(NamedTuple):
    """Rows M, columns N and the summed dimension K of a tile, and how it is run."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def options(tiles: Tiles, dim: int) -> dict[str, Any]:
    """Constants of a kernel that sums over `dim`."""
    return {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "EVEN_K": dim % tiles.block_k == 0,
        "BAND": BAND,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


@triton.jit
def tile_of_program(row_tiles, column_tiles, BAND: tl.constexpr):
    """Row and column tile: neighbouring programs take the row tiles of a band, so that L2 holds what they share."""
    program = tl.program_id(0)
    band = program // (BAND * column_tiles)
    width = tl.minimum(row_tiles - band * BAND, BAND)
    within = program - band * BAND * column_tiles
    return band * BAND + within % width, within // width


@triton.jit
def product(
    x_ptrs, w_ptrs, dim,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """x w^T in fp32 for the rows that the pointers [M, K] and [K, N] begin at."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for low in tl.range(0, dim, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(low + k < dim)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(low + k < dim)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return acc
