# mypy: allow-untyped-defs
# (the arguments of a Triton kernel have no Python types)
"""The forward pass of `vlm_kernels.attention` on Hopper: its equations, with warps that do one thing each.

A program takes query tiles of 128 rows one after another, the longest first, by turns from the front and from the back,
so that all programs get the same number of keys. One warp copies q, k and v into rings of tiles in shared memory; two
warp groups take 64 of the rows each. A group starts the products for the scores of its next keys and for the values of
the last ones together, then computes the softmax: with two groups out of step, the matrix unit works for one while the
other one computes.

On an H200, with the portable kernel's time in brackets: 0.77 ms (1.23) at S 8192, 0.160 (0.164) for CLIP, 0.28 (0.44)
for a pack of 16,384 tokens. Tried and left out: a turn for each group, two tiles of q, and keeping ptxas from moving
the wait for the values up over the softmax. Together they gained 4 % at S 1024, nothing at S 8192, and cost 7 % for
CLIP.

Shapes: B batch, S sequence, T packed tokens, H query heads, G key/value heads, K head dim, M rows, N keys of a tile.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vlm_kernels.hopper.tiles import COLUMNS, TILE, multiprocessors, rows_of, strides_of, table_of

LOG2_E = math.log2(math.e)
GROUP_ROWS = TILE // 2  # of each warp group
STAGES = 2  # tiles of keys, and of values, in shared memory


@gluon.jit
def _tile_of(turn, program, PROGRAMS: gl.constexpr):
    """The tile that a program takes in its `turn`: to and fro, so that who had the longest gets the shortest next."""
    return turn * PROGRAMS + program + (turn & 1) * (PROGRAMS - 1 - 2 * program)


@gluon.jit
def _num_turns(total, program, PROGRAMS: gl.constexpr):
    """How many of `total` tiles a program takes."""
    full = total // PROGRAMS
    place = _tile_of(full, program, PROGRAMS) - full * PROGRAMS
    return full + (total - full * PROGRAMS - place + PROGRAMS - 1) // PROGRAMS


@gluon.jit
def _query_tile(index, table_ptr, sizes, BLOCK_M: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr):
    """Head, batch, first row of the sequence, the tile's first row in it, the sequence's length, and the keys seen.

    Neighbours are the same tile of all heads, the last tiles first, since those of a causal sequence see most keys.
    """
    _, num_tiles, num_batches, num_heads, q_len = sizes
    head = index % num_heads
    tile = index // num_heads
    if PACKED:
        batch = tile * 0
        start = gl.load(table_ptr + COLUMNS * tile)
        length = gl.load(table_ptr + COLUMNS * tile + 1)
        row = gl.load(table_ptr + COLUMNS * tile + 2) * BLOCK_M
    else:
        batch = tile % num_batches
        start = tile * 0
        length = start + q_len
        row = tile // num_batches
        if CAUSAL:
            row = num_tiles - 1 - row
        row = row * BLOCK_M
    keys = length
    if CAUSAL:
        keys = gl.minimum(row + BLOCK_M, length)
    return head, batch, start, row, length, keys


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, tiles, barriers, table_ptr, strides, sizes, heads_per_group,
    PROGRAMS: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that starts every copy from memory."""
    M: gl.constexpr = q_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[0]
    q_tile, k_tiles, v_tiles = tiles
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    stride_qb, stride_qg, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh = strides
    count = 0
    program = gl.program_id(0)
    for turn in range(_num_turns(sizes[0], program, PROGRAMS)):
        index = _tile_of(turn, program, PROGRAMS)
        head, batch, start, row, length, keys = _query_tile(index, table_ptr, sizes, 2 * M, CAUSAL, PACKED)
        group = head // heads_per_group
        q_column = batch * stride_qb + group * stride_qg + head % heads_per_group * stride_qh
        k_column = batch * stride_kb + group * stride_kh
        v_column = batch * stride_vb + group * stride_vh
        for half in gl.static_range(2):
            mbarrier.wait(q_free.index(half), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc, [start + row + half * M, q_column], q_full.index(half), q_tile.index(half)
            )
        num_steps = gl.cdiv(keys, BLOCK_N)
        for i in range(num_steps):
            column = start + (num_steps - 1 - i) * BLOCK_N
            stage = count % STAGES
            phase = (count // STAGES & 1) ^ 1
            mbarrier.wait(k_free.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [column, k_column], k_full.index(stage), k_tiles.index(stage))
            mbarrier.wait(v_free.index(stage), phase)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [column, v_column], v_full.index(stage), v_tiles.index(stage))
            count += 1


@gluon.jit
def _multiply(
    HALF: gl.constexpr, k_desc, outputs, tiles, barriers, table_ptr, sizes, scale,
    PROGRAMS: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warp group: its half of each query tile, the last key tile first, which alone has keys that a row must not see.

    Keys are walked with a running maximum `top` and sum `total`, as in `attention`.
    """
    dtype: gl.constexpr = k_desc.dtype
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[0]
    HEAD_DIM: gl.constexpr = k_desc.block_type.shape[1]
    M: gl.constexpr = 64
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    # 16 bytes of a row per thread
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    q_tile, k_tiles, v_tiles = tiles
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    out_ptr, lse_ptr, stride_ot, stride_ob, stride_oh, num_rows = outputs
    m = gl.arange(0, M, layout=gl.SliceLayout(1, S))
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S))
    q = q_tile.index(HALF)
    count = 0
    program = gl.program_id(0)
    for turn in range(_num_turns(sizes[0], program, PROGRAMS)):
        index = _tile_of(turn, program, PROGRAMS)
        head, batch, start, first_row, length, keys = _query_tile(index, table_ptr, sizes, 2 * M, CAUSAL, PACKED)
        num_steps = gl.cdiv(keys, BLOCK_N)
        row = first_row + HALF * M + m
        acc = gl.zeros([M, HEAD_DIM], gl.float32, OUT)

        stage = count % STAGES
        phase = count // STAGES & 1
        mbarrier.wait(q_full.index(HALF), turn & 1)
        mbarrier.wait(k_full.index(stage), phase)
        s = warpgroup_mma(
            q, k_tiles.index(stage).permute((1, 0)), gl.zeros([M, BLOCK_N], gl.float32, S), use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_free.index(stage))
        column = (num_steps - 1) * BLOCK_N + n
        live = (column < length)[None, :]
        if CAUSAL:
            live = live & (column[None, :] <= row[:, None])
        s = gl.where(live, s, float("-inf"))
        top = gl.max(s, 1) * scale
        p = gl.exp2(s * scale - top[:, None])
        total = gl.sum(p, 1)
        operand = gl.convert_layout(p.to(dtype), P)

        for _ in range(1, num_steps):
            next_stage = (count + 1) % STAGES
            next_phase = (count + 1) // STAGES & 1
            mbarrier.wait(k_full.index(next_stage), next_phase)
            s = warpgroup_mma(
                q, k_tiles.index(next_stage).permute((1, 0)), gl.zeros([M, BLOCK_N], gl.float32, S),
                use_acc=False, is_async=True,
            )  # fmt: skip
            mbarrier.wait(v_full.index(stage), phase)
            acc = warpgroup_mma(operand, v_tiles.index(stage), acc, is_async=True)
            s = warpgroup_mma_wait(1, [s])
            mbarrier.arrive(k_free.index(next_stage))
            new_top = gl.maximum(top, gl.max(s, 1) * scale)
            p = gl.exp2(s * scale - new_top[:, None])
            shrink = gl.exp2(top - new_top)
            total = total * shrink + gl.sum(p, 1)
            top = new_top
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(v_free.index(stage))
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
            operand = gl.convert_layout(p.to(dtype), P)
            count += 1
            stage = next_stage
            phase = next_phase

        mbarrier.wait(v_full.index(stage), phase)
        acc = warpgroup_mma(operand, v_tiles.index(stage), acc, is_async=True)
        mbarrier.arrive(q_free.index(HALF))
        lse_ptrs = lse_ptr + (batch * sizes[3] + head).to(gl.int64) * num_rows + start + row
        gl.store(lse_ptrs, top + gl.log2(total), mask=row < length)
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(v_free.index(stage))
        count += 1
        out = acc / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
        out = gl.convert_layout(out.to(dtype), ROWS)
        out_row = first_row + HALF * M + gl.arange(0, M, layout=gl.SliceLayout(1, ROWS))
        d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ROWS))
        out_ptrs = out_ptr + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
        out_ptrs += (start + out_row).to(gl.int64)[:, None] * stride_ot + d[None, :]
        gl.store(out_ptrs, out, mask=(out_row < length)[:, None])


@gluon.jit(do_not_specialize=["total_tiles", "num_tiles", "num_batches", "q_len", "num_rows"])
def _forward_kernel(
    q_desc, k_desc, v_desc,  # [S, everything], [S', everything] twice: a head's rows are columns of it
    out_ptr,  # [S, B, H, K] or packed without B
    lse_ptr,  # [B, H, num_rows] fp32
    table_ptr,  # as `tiles.table_of` makes it
    stride_qb, stride_qg, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_ot, stride_ob, stride_oh,
    total_tiles, num_tiles, num_batches, num_heads, heads_per_group, q_len, num_rows, scale,
    PROGRAMS: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_tile = gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_tiles = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)  # by both warp groups
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    tiles = (q_tile, k_tiles, v_tiles)
    barriers = (q_full, q_free, k_full, k_free, v_full, v_free)
    sizes = (total_tiles, num_tiles, num_batches, num_heads, q_len)
    outputs = (out_ptr, lse_ptr, stride_ot, stride_ob, stride_oh, num_rows)
    strides = (stride_qb, stride_qg, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh)
    gl.warp_specialize(
        [
            (
                _multiply,
                (0, k_desc, outputs, tiles, barriers, table_ptr, sizes, scale, PROGRAMS, CAUSAL, PACKED, STAGES),
            ),
            (
                _multiply,
                (1, k_desc, outputs, tiles, barriers, table_ptr, sizes, scale, PROGRAMS, CAUSAL, PACKED, STAGES),
            ),
            (
                _load,
                (
                    q_desc, k_desc, v_desc, tiles, barriers, table_ptr, strides, sizes, heads_per_group,
                    PROGRAMS, CAUSAL, PACKED, STAGES,
                ),
            ),
        ],
        [4, 1],  # warps of the second and third; the first has the kernel's own
        [240, 24],  # their registers per thread
    )  # fmt: skip


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, borders: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """out [S, B, H, K] and log2 statistics L [B, H, S], fp32, of q [S, B, G, H / G, K] and k, v [S, B, G, K].

    Packed, all are without B, and L is [1, H, T].
    """
    groups, per_group, head_dim = q.shape[-3:]
    heads = groups * per_group
    table = table_of(borders, backward=False) if borders is not None else None
    num_batches = q.shape[1] if table is None else 1
    out = torch.empty((*q.shape[:-3], heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_batches, heads, len(q)), dtype=torch.float32, device=q.device)
    num_tiles = len(table) if table is not None else triton.cdiv(len(q), TILE)
    programs = multiprocessors(q)
    _forward_kernel[(programs,)](
        rows_of(q, GROUP_ROWS), rows_of(k, TILE), rows_of(v, TILE), out, lse, table,
        **strides_of(q=q, k=k, v=v, o=out), stride_ot=out.stride(0),
        total_tiles=num_tiles * heads * num_batches, num_tiles=num_tiles, num_batches=num_batches, num_heads=heads,
        heads_per_group=per_group, q_len=len(q), num_rows=len(q), scale=softmax_scale * LOG2_E,
        PROGRAMS=programs, CAUSAL=causal, PACKED=table is not None, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    return out, lse
