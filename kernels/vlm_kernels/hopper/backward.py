# mypy: allow-untyped-defs
# (the arguments of a Triton kernel have no Python types)
"""The backward pass of `vlm_kernels.attention` on Hopper: its equations, in five products per pair of tiles.

A program owns a tile of 128 keys and walks the query tiles that see them, for all query heads of the group. Two warp
groups hold dk and dv of 64 keys each in registers, one warp copies tiles from memory, and one adds dq up there in fp32.

The order of those additions is fixed, so that dq has the same bits every time: a counter per query tile says whose turn
it is. Waiting is rare, because every key tile begins with its own queries: in any step, the key tiles of a sequence are
at different query tiles, one behind the other. Programs take their tiles by ticket, so that whoever one waits for has
begun before it; all tickets of a sequence are neighbours. The counters cost 4 % at S 8192.

Scores are taken transposed, [N, M], so that p and t are left operands in registers for dv and dk; t also goes through
shared memory, for dq. The products for the scores and for t start from -L / scale and -delta instead of zero, which
spares the registers that would hold those. ptxas puts all products one behind the other if one is under way between
two rounds of a loop, or if a branch lies between two: masked steps have a loop of their own.

Memory, in elements beyond the gradients: sums S H K in fp32, delta S H. On an H200 at S 8192 (32/8 heads, K 128): 2.94
ms, where the portable kernels take 3.99, and cuDNN 2.61. By ncu's samples the warp groups wait 8 % of their time until
the sums of the last step have left shared memory; there is no room for a second tile of them.

Shapes: B batch, S sequence, T packed tokens, H query heads, G key/value heads, K head dim, M query tile, N key tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vlm_kernels.hopper.tiles import TILE, copyable, rows_of, strides_of, table_of

LOG2_E = math.log2(math.e)
STAGES = gl.constexpr(2)  # tiles of q and of w, and sets of statistics, in shared memory
QUERY_ROWS = {64: 128, 128: 64}  # of a step, by head dim: what fits into registers
LINE = 32  # fp32 of a row in which the sums leave shared memory: 128 bytes
ROWS = 32  # of a program of the kernels before and after
WAIT_FOR_ALL = gl.constexpr("cp.async.bulk.wait_group 0; mov.u32 $0, $1;")
WAIT_FOR_ALL_BUT_ONE = gl.constexpr("cp.async.bulk.wait_group 1; mov.u32 $0, $1;")


@triton.jit(do_not_specialize=["num_rows"])
def _delta_kernel(
    out_ptr, w_ptr, delta_ptr,  # [S, B, H, K] twice, [B, H, S] fp32
    stride_ot, stride_ob, stride_oh, stride_wt, stride_wb, stride_wh, num_heads, num_rows,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta_i = o_i . w_i"""
    head = tl.program_id(1) % num_heads
    batch = tl.program_id(1) // num_heads
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, HEAD_DIM)
    inside = row < num_rows
    row_64 = row.to(tl.int64)[:, None]
    out_ptr += batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    w_ptr += batch.to(tl.int64) * stride_wb + head.to(tl.int64) * stride_wh
    out = tl.load(out_ptr + row_64 * stride_ot + d[None, :], mask=inside[:, None], other=0.0)
    w = tl.load(w_ptr + row_64 * stride_wt + d[None, :], mask=inside[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * w.to(tl.float32), 1)
    tl.store(delta_ptr + tl.program_id(1).to(tl.int64) * num_rows + row, delta, mask=inside)


@triton.jit(do_not_specialize=["num_tiles", "num_rows"])
def _scale_kernel(
    sum_ptr, out_ptr, table_ptr,  # fp32 by tiles, [S, B, H, K] or packed without B
    stride_db, stride_dh, stride_dt, num_tiles, num_batches, num_rows, softmax_scale,
    PACKED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The query gradient from its sums."""
    tile = tl.program_id(0) // (TILE // ROWS)
    within = tl.program_id(0) % (TILE // ROWS) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1) // num_batches
    batch = tl.program_id(1) % num_batches
    if PACKED:
        start = tl.load(table_ptr + 3 * tile)
        length = tl.load(table_ptr + 3 * tile + 1)
        row = tl.load(table_ptr + 3 * tile + 2) * TILE + within
        place = (head * num_tiles + tile).to(tl.int64) * TILE
    else:
        start = tile * 0
        length = num_rows
        row = tile * TILE + within
        place = ((head * num_batches + batch) * num_tiles + tile).to(tl.int64) * TILE
    d = tl.arange(0, HEAD_DIM)
    # As `dq_tile` lies in shared memory, and as the copy engine then turns lines of 128 bytes.
    column = (d[None, :] // 8 ^ within[:, None] % 4) * 8 + d[None, :] % 8
    line = (within * (HEAD_DIM // 32))[:, None] + column // 32
    offset = line * 32 + (column % 32 // 4 ^ line % 8) * 4 + column % 4
    x = tl.load(sum_ptr + place * HEAD_DIM + offset) * softmax_scale
    out_ptr += batch.to(tl.int64) * stride_db + head.to(tl.int64) * stride_dh
    out_ptrs = out_ptr + (start + row).to(tl.int64)[:, None] * stride_dt + d[None, :]
    tl.store(out_ptrs, x.to(out_ptr.dtype.element_ty), mask=(row < length)[:, None])


@gluon.jit
def _key_tile(ticket, table_ptr, num_tiles, num_groups, q_len, PACKED: gl.constexpr):
    """Group, batch, first row of the sequence, its length, the key tile's number in it, and the sequence's first tile.

    The tickets of a sequence and group are neighbours, its last tile first.
    """
    tile = num_tiles - 1 - ticket % num_tiles
    outer = ticket // num_tiles
    group = outer % num_groups
    batch = outer // num_groups
    if PACKED:
        start = gl.load(table_ptr + 3 * tile)
        length = gl.load(table_ptr + 3 * tile + 1)
        number = gl.load(table_ptr + 3 * tile + 2)
        first_tile = tile - number
    else:
        start = tile * 0
        length = start + q_len
        number = tile
        first_tile = batch * num_tiles
    return group, batch, start, length, number, first_tile


@gluon.jit
def _query_order(step, number, length, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """Number of the query tile that key tile `number` meets in its `step`, and how many key tiles met it before.

    Each key tile begins at its own queries; a query tile meets first its own keys, then those before, and so on.
    """
    PER_KEY: gl.constexpr = BLOCK_N // BLOCK_M
    query = number * PER_KEY + step
    if not CAUSAL:
        key_tiles = gl.cdiv(length, BLOCK_N)
        query = query % (key_tiles * PER_KEY)
        rank = (query // PER_KEY - number + key_tiles) % key_tiles
    else:
        rank = query // PER_KEY - number
    return query, rank


@gluon.jit
def _num_steps(number, length, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    if CAUSAL:
        steps = gl.cdiv(length, BLOCK_M) - number * (BLOCK_N // BLOCK_M)
    else:
        steps = gl.cdiv(length, BLOCK_N) * (BLOCK_N // BLOCK_M)
    return steps


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, w_desc, lse_ptr, delta_ptr, q_tiles, w_tiles, statistics, k_tile, v_tile,
    kv_full, q_full, w_full, s_full, done,
    place, strides, num_groups, heads_per_group, num_rows, inverse_scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The warp that starts every copy from memory, and brings each query's L and delta."""
    group, batch, start, length, number, first_tile = place
    stride_qb, stride_qg, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_wb, stride_wh = strides
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    m = gl.arange(0, BLOCK_M, layout=ONE)
    row = start + number * BLOCK_N
    mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [row, batch * stride_kb + group * stride_kh], kv_full, k_tile)
    tma.async_copy_global_to_shared(v_desc, [row, batch * stride_vb + group * stride_vh], kv_full, v_tile)
    num_steps = _num_steps(number, length, BLOCK_M, BLOCK_N, CAUSAL)
    count = 0
    for member in range(heads_per_group):
        head = group * heads_per_group + member
        q_column = batch * stride_qb + group * stride_qg + member * stride_qh
        w_column = batch * stride_wb + head * stride_wh
        line = (batch * num_groups * heads_per_group + head).to(gl.int64) * num_rows + start
        for step in range(num_steps):
            query, rank = _query_order(step, number, length, BLOCK_M, BLOCK_N, CAUSAL)
            first_row = query * BLOCK_M
            stage = count % STAGES
            phase = (count // STAGES & 1) ^ 1
            mbarrier.wait(done.index(stage), phase)
            mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc, [start + first_row, q_column], q_full.index(stage), q_tiles.index(stage)
            )
            mbarrier.expect(w_full.index(stage), w_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                w_desc, [start + first_row, w_column], w_full.index(stage), w_tiles.index(stage)
            )
            seen = first_row + m < length
            lse = gl.load(lse_ptr + line + first_row + m, mask=seen, other=float("inf"))
            delta = gl.load(delta_ptr + line + first_row + m, mask=seen, other=0.0)
            statistics.index(2 * stage).store(-lse * inverse_scale)
            statistics.index(2 * stage + 1).store(-delta)
            mbarrier.arrive(s_full.index(stage))
            count += 1


@gluon.jit
def _steps(
    dk, dv, count, low, high, q_tiles, w_tiles, statistics, k_tile, v_tile, ds_tile, dq_tile,
    q_full, w_full, s_full, done, dq_free, number, length, scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Steps [low, high) of a key tile with one head's query tiles: dk and dv [N, K] with theirs added."""
    dtype: gl.constexpr = k_tile.dtype
    HEAD_DIM: gl.constexpr = k_tile.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    Q: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [BLOCK_M // 16, 128 // BLOCK_M], [16, HEAD_DIM * BLOCK_M // 128, 16]
    )
    for step in range(low, high):
        stage = count % STAGES
        phase = count // STAGES & 1
        q = q_tiles.index(stage)
        w = w_tiles.index(stage)
        mbarrier.wait(s_full.index(stage), phase)
        start_s = gl.expand_dims(statistics.index(2 * stage).load(gl.SliceLayout(0, S)), 0)
        start_s = start_s + gl.zeros([BLOCK_N, BLOCK_M], gl.float32, S)
        start_dp = gl.expand_dims(statistics.index(2 * stage + 1).load(gl.SliceLayout(0, S)), 0)
        start_dp = start_dp + gl.zeros([BLOCK_N, BLOCK_M], gl.float32, S)
        mbarrier.wait(q_full.index(stage), phase)
        s = warpgroup_mma(k_tile, q.permute((1, 0)), start_s, is_async=True)
        mbarrier.wait(w_full.index(stage), phase)
        dp = warpgroup_mma(v_tile, w.permute((1, 0)), start_dp, is_async=True)
        s = warpgroup_mma_wait(1, [s])
        p = gl.exp2(s * scale)
        if MASKED:
            query, rank = _query_order(step, number, length, BLOCK_M, BLOCK_N, CAUSAL)
            column = number * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, S))
            live = (column < length)[:, None]
            if CAUSAL:
                row = query * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S))
                live = live & (column[:, None] <= row[None, :])
            p = gl.where(live, p, 0.0)
        dv_token = warpgroup_mma(gl.convert_layout(p.to(dtype), OPERAND), w, dv, is_async=True)
        dp = warpgroup_mma_wait(1, [dp])
        ds = (p * dp).to(dtype)
        ds_tile.store(ds)
        fence_async_shared()
        dq = warpgroup_mma(
            ds_tile.permute((1, 0)), k_tile, gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, Q), use_acc=False, is_async=True
        )
        dk_token = warpgroup_mma(gl.convert_layout(ds, OPERAND), q, dk, is_async=True)
        dq, dv = warpgroup_mma_wait(1, [dq, dv_token])
        mbarrier.wait(dq_free, (count & 1) ^ 1)
        dq_tile.store(dq)
        dk = warpgroup_mma_wait(0, [dk_token])
        fence_async_shared()
        mbarrier.arrive(done.index(stage))
        count += 1
    return dk, dv, count


@gluon.jit
def _multiply(
    dk_ptr, dv_ptr, q_tiles, w_tiles, statistics, k_tile, v_tile, ds_tile, dq_tile,
    kv_full, q_full, w_full, s_full, done, dq_free,
    place, strides, heads_per_group, scale, softmax_scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Two warp groups: 64 keys each for the scores and their gradients, half of the columns each for those of q."""
    dtype: gl.constexpr = k_tile.dtype
    HEAD_DIM: gl.constexpr = k_tile.shape[1]
    KV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, HEAD_DIM, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [8, 1], [1, 0])
    group, batch, start, length, number, first_tile = place
    dk = gl.zeros([BLOCK_N, HEAD_DIM], gl.float32, KV)
    dv = gl.zeros([BLOCK_N, HEAD_DIM], gl.float32, KV)
    num_steps = _num_steps(number, length, BLOCK_M, BLOCK_N, CAUSAL)
    if CAUSAL:  # the tile's own queries; the last tile, which may be ragged, meets no others
        masked = gl.minimum(num_steps, BLOCK_N // BLOCK_M)
    else:
        masked = gl.where((number + 1) * BLOCK_N > length, num_steps, 0)
    count = 0
    mbarrier.wait(kv_full, 0)
    for _ in range(heads_per_group):
        dk, dv, count = _steps(
            dk, dv, count, 0, masked, q_tiles, w_tiles, statistics, k_tile, v_tile, ds_tile, dq_tile,
            q_full, w_full, s_full, done, dq_free, number, length, scale,
            BLOCK_M, BLOCK_N, CAUSAL, True,
        )  # fmt: skip
        dk, dv, count = _steps(
            dk, dv, count, masked, num_steps, q_tiles, w_tiles, statistics, k_tile, v_tile, ds_tile, dq_tile,
            q_full, w_full, s_full, done, dq_free, number, length, scale,
            BLOCK_M, BLOCK_N, CAUSAL, False,
        )  # fmt: skip
    stride_dkt, stride_dkb, stride_dkh, stride_dvt, stride_dvb, stride_dvh = strides
    row = number * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, ROWS))
    d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ROWS))
    alive = (row < length)[:, None]
    place_64 = (start + row).to(gl.int64)[:, None]
    dv_out = gl.convert_layout(dv.to(dtype), ROWS)
    dv_ptr += batch.to(gl.int64) * stride_dvb + group.to(gl.int64) * stride_dvh
    gl.store(dv_ptr + place_64 * stride_dvt + d[None, :], dv_out, mask=alive)
    dk_out = gl.convert_layout((dk * softmax_scale).to(dtype), ROWS)
    dk_ptr += batch.to(gl.int64) * stride_dkb + group.to(gl.int64) * stride_dkh
    gl.store(dk_ptr + place_64 * stride_dkt + d[None, :], dk_out, mask=alive)


@builtin
def _async_add_to_global(tensor_desc, coord, src, _semantic=None):
    """tma.async_copy_shared_to_global that adds to what is there; Gluon has the instruction but no name for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


@gluon.jit
def _wait_for_adds(PENDING: gl.constexpr):
    """Wait until all but the last PENDING copies from shared memory of this warp have reached memory.

    `tma.store_wait` waits until shared memory was read.
    """
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    gl.inline_asm_elementwise(
        WAIT_FOR_ALL if PENDING == 0 else WAIT_FOR_ALL_BUT_ONE, "=r,r", [gl.full([32], 0, gl.int32, LANES)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _sum_of(
    count, place, num_steps, tiles_of_head, heads_per_group,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Number of the query tile of step `count`, and how many key tiles add to it before this one."""
    group, batch, start, length, number, first_tile = place
    member = count // num_steps
    query, rank = _query_order(count - member * num_steps, number, length, BLOCK_M, BLOCK_N, CAUSAL)
    head = group * heads_per_group + member
    return (head * tiles_of_head + first_tile) * (BLOCK_N // BLOCK_M) + query, rank


@gluon.jit
def _add(
    sum_desc, turn_ptr, dq_tile, done, dq_free, place, num_tiles, num_batches, heads_per_group,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """The warp that adds a query tile's gradient up in memory, key tile after key tile in one order.

    The first one writes, so that nothing has to be zero before. A step's sum is announced when the next one is on its
    way, or earlier if this warp has to wait for others, who may be waiting for it.
    """
    LINES: gl.constexpr = sum_desc.block_type.shape[0]
    lines = dq_tile._reinterpret(gl.float32, sum_desc.block_type.shape, sum_desc.layout)
    group, batch, start, length, number, first_tile = place
    num_steps = _num_steps(number, length, BLOCK_M, BLOCK_N, CAUSAL)
    tiles_of_head = num_tiles
    if not PACKED:
        tiles_of_head = num_tiles * num_batches
    total = num_steps * heads_per_group
    announced = -1
    index, rank = _sum_of(0, place, num_steps, tiles_of_head, heads_per_group, BLOCK_M, BLOCK_N, CAUSAL)
    turn = gl.load(turn_ptr + index, volatile=True)
    for count in range(total):
        if turn < rank:
            if announced >= 0:
                _wait_for_adds(0)
                gl.atomic_add(turn_ptr + announced, 1, sem="release", scope="gpu")
                announced = -1
            while turn < rank:
                turn = gl.load(turn_ptr + index, volatile=True)
        mbarrier.wait(done.index(count % STAGES), count // STAGES & 1)
        if rank > 0:
            _async_add_to_global(sum_desc, [index * LINES, 0], lines)
        else:
            tma.async_copy_shared_to_global(sum_desc, [index * LINES, 0], lines)
        next_index, next_rank = _sum_of(
            gl.minimum(count + 1, total - 1), place, num_steps, tiles_of_head, heads_per_group, BLOCK_M, BLOCK_N, CAUSAL
        )
        turn = gl.load(turn_ptr + next_index, volatile=True)
        tma.store_wait(0)
        mbarrier.arrive(dq_free)
        if announced >= 0:
            _wait_for_adds(1)
            gl.atomic_add(turn_ptr + announced, 1, sem="release", scope="gpu")
        announced = index
        index = next_index
        rank = next_rank
    _wait_for_adds(0)
    gl.atomic_add(turn_ptr + announced, 1, sem="release", scope="gpu")


@gluon.jit(do_not_specialize=["num_tiles", "num_batches", "q_len", "num_rows"])
def _backward_kernel(
    q_desc, k_desc, v_desc, w_desc,
    sum_desc,  # fp32 [query tiles of all heads * M * K / 32, 32]: tiles as they lie in shared memory
    lse_ptr, delta_ptr,  # [B, H, num_rows] fp32
    dk_ptr, dv_ptr,
    turn_ptr,  # int32, zeros: how many key tiles each query tile has met; the first entry counts tickets
    table_ptr,
    stride_qb, stride_qg, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_wb, stride_wh,
    stride_dkt, stride_dkb, stride_dkh, stride_dvt, stride_dvb, stride_dvh,
    num_tiles, num_batches, num_groups, heads_per_group, q_len, num_rows, scale, softmax_scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    HEAD_DIM: gl.constexpr = q_desc.block_type.shape[1]
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, HEAD_DIM], q_desc.layout)
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, HEAD_DIM], w_desc.layout)
    k_tile = gl.allocate_shared_memory(dtype, [BLOCK_N, HEAD_DIM], k_desc.layout)
    v_tile = gl.allocate_shared_memory(dtype, [BLOCK_N, HEAD_DIM], v_desc.layout)
    ds_tile = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_M], DS)
    dq_tile = gl.allocate_shared_memory(gl.float32, [BLOCK_M, HEAD_DIM], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    statistics = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    dq_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    s_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    mbarrier.init(dq_free, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(w_full.index(i), count=1)
        mbarrier.init(s_full.index(i), count=1)
        mbarrier.init(done.index(i), count=1)
    fence_async_shared()
    # In the order in which programs really start: whom one waits for has begun before it.
    ticket = gl.atomic_add(turn_ptr, 1, sem="relaxed", scope="gpu")
    place = _key_tile(ticket, table_ptr, num_tiles, num_groups, q_len, PACKED)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    dk_ptr, dv_ptr, q_tiles, w_tiles, statistics, k_tile, v_tile, ds_tile, dq_tile,
                    kv_full, q_full, w_full, s_full, done, dq_free, place,
                    (stride_dkt, stride_dkb, stride_dkh, stride_dvt, stride_dvb, stride_dvh),
                    heads_per_group, scale, softmax_scale, BLOCK_M, BLOCK_N, CAUSAL,
                ),
            ),
            (
                _add,
                (
                    sum_desc, turn_ptr + 1, dq_tile, done, dq_free, place, num_tiles, num_batches, heads_per_group,
                    BLOCK_M, BLOCK_N, CAUSAL, PACKED,
                ),
            ),
            (
                _load,
                (
                    q_desc, k_desc, v_desc, w_desc, lse_ptr, delta_ptr, q_tiles, w_tiles, statistics, k_tile, v_tile,
                    kv_full, q_full, w_full, s_full, done, place,
                    (stride_qb, stride_qg, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_wb, stride_wh),
                    num_groups, heads_per_group, num_rows, 1.0 / scale, BLOCK_M, BLOCK_N, CAUSAL,
                ),
            ),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, w: Tensor,
    causal: bool, borders: Tensor | None, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv, contiguous, for the upstream gradient w of `attention_forward`'s out, and its L."""
    groups, per_group, head_dim = q.shape[-3:]
    if not copyable(w):
        w = w.contiguous()
    table = table_of(borders, longest_first=False) if borders is not None else None
    num_batches = q.shape[1] if table is None else 1
    num_tiles = len(table) if table is not None else triton.cdiv(len(q), TILE)
    num_rows, heads, block = len(q), groups * per_group, QUERY_ROWS[head_dim]
    delta = torch.empty_like(lse)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    sums = torch.empty((num_tiles * heads * num_batches * TILE * head_dim // LINE, LINE), device=q.device)
    turns = torch.zeros(1 + num_tiles * heads * num_batches * (TILE // block), dtype=torch.int32, device=q.device)
    _delta_kernel[(triton.cdiv(num_rows, ROWS), heads * num_batches)](
        out, w, delta, **strides_of(o=out, w=w), stride_ot=out.stride(0), stride_wt=w.stride(0),
        num_heads=heads, num_rows=num_rows, HEAD_DIM=head_dim, BLOCK=ROWS, num_warps=4,
    )  # fmt: skip
    _backward_kernel[(num_tiles * groups * num_batches,)](
        rows_of(q, block), rows_of(k, TILE), rows_of(v, TILE), rows_of(w, block),
        rows_of(sums, block * head_dim // LINE), lse, delta, dk, dv, turns, table,
        **strides_of(q=q, k=k, v=v, w=w, dk=dk, dv=dv), stride_dkt=dk.stride(0), stride_dvt=dv.stride(0),
        num_tiles=num_tiles, num_batches=num_batches, num_groups=groups, heads_per_group=per_group,
        q_len=num_rows, num_rows=num_rows, scale=softmax_scale * LOG2_E, softmax_scale=softmax_scale,
        BLOCK_M=block, BLOCK_N=TILE, CAUSAL=causal, PACKED=table is not None, num_warps=8,
    )  # fmt: skip
    flat = dq.flatten(-3, -2)
    _scale_kernel[(num_tiles * (TILE // ROWS), heads * num_batches)](
        sums, dq, table, **strides_of(d=flat), stride_dt=flat.stride(0),
        num_tiles=num_tiles, num_batches=num_batches, num_rows=num_rows, softmax_scale=softmax_scale,
        PACKED=table is not None, TILE=TILE, ROWS=ROWS, HEAD_DIM=head_dim, num_warps=4,
    )  # fmt: skip
    return dq, dk, dv
