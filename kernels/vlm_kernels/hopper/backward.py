# mypy: allow-untyped-defs
# (the arguments of a Triton kernel have no Python types)
"""The backward pass of `vlm_kernels.attention` on Hopper: its equations, in five products per pair of tiles.

A program owns a tile of 128 keys and walks the query tiles that see them, for all query heads of the group. Two warp
groups hold dk and dv of 64 keys each in registers, one warp copies tiles from memory, and one adds dq up there in fp32.
Without causal order a program owns all key tiles of a sequence and head, one after the other.

The order of those additions is fixed, from the first keys to the last, so that dq has the same bits every time: a
counter per query tile says whose turn it is. Key tiles of one sequence that begin together seldom wait, because all
walk its queries from the last to the first. The tile's own queries, which no later keys see, then come at its end:
there the warp groups fetch the sums, and write dq. Programs take their tiles by ticket, those with most queries first,
so that whoever one waits for has begun before it, and that the last to begin have least to do. That matters: with the
shortest first, as a walk from a tile's own queries on would need, a quarter of the multiprocessors' time is lost.

Scores are taken transposed, [N, M], so that p and ds are left operands in registers for dv and dk; ds also goes through
shared memory, for dq. ptxas puts all products one behind the other if one is under way between two rounds of a loop, or
if a branch lies between two: a tile's own queries have a loop of their own.

Memory, in elements beyond the gradients: sums S H K in fp32, S rounded up to whole tiles per segment; delta S H. On an
H200, with cuDNN's time in brackets: 2.44 ms (2.62) at S 8192 with 32/8 heads of 128, 1.32 (1.47) for two of S 4096,
0.39 (0.45) for CLIP.

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

from vlm_kernels.hopper.tiles import COLUMNS, TILE, copyable, multiprocessors, rows_of, strides_of, table_of

LOG2_E = math.log2(math.e)
STAGES = gl.constexpr(2)  # tiles of q, of w and of sums, and sets of statistics, in shared memory
QUERY_ROWS = {64: 128, 128: 64}  # of a step, by head dim: what fits into registers
LINE = 32  # fp32 of a row in which the sums leave shared memory: 128 bytes
DELTA_ROWS = 32  # of a program of the kernel before
FULL_WINDOW = 0.9  # of the multiprocessors busy with the first tiles of a window
WAIT_FOR_ALL = gl.constexpr("cp.async.bulk.wait_group 0; bar.warp.sync -1; mov.u32 $0, $1;")
WAIT_FOR_ALL_BUT_ONE = gl.constexpr("cp.async.bulk.wait_group 1; bar.warp.sync -1; mov.u32 $0, $1;")
SEE_WHAT_WAS_ADDED = gl.constexpr("fence.acq_rel.gpu; fence.proxy.async; mov.u32 $0, $1;")


@triton.jit(do_not_specialize=["num_rows"])
def _delta_kernel(
    out_ptr, w_ptr, delta_ptr,  # [S, B, H, K] twice, [B, H, S] fp32
    stride_ot, stride_ob, stride_oh, stride_wt, stride_wb, stride_wh, num_heads, num_rows,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta_i = o_i . w_i"""
    head = tl.program_id(0) % num_heads
    batch = tl.program_id(0) // num_heads
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, HEAD_DIM)
    inside = row < num_rows
    row_64 = row.to(tl.int64)[:, None]
    out_ptr += batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    w_ptr += batch.to(tl.int64) * stride_wb + head.to(tl.int64) * stride_wh
    out = tl.load(out_ptr + row_64 * stride_ot + d[None, :], mask=inside[:, None], other=0.0)
    w = tl.load(w_ptr + row_64 * stride_wt + d[None, :], mask=inside[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * w.to(tl.float32), 1)
    tl.store(delta_ptr + tl.program_id(0).to(tl.int64) * num_rows + row, delta, mask=inside)


@gluon.jit
def _place(
    ticket, table_ptr, num_tiles, num_batches, num_groups, together, q_len, CAUSAL: gl.constexpr, PACKED: gl.constexpr
):
    """Group, batch, first row of the sequence, its length, its first tile of all, and its key tiles [first, last].

    In causal order that is one tile. Windows of `together` sequences and groups follow one another; within one, all
    first tiles come first.
    """
    tile = ticket * 0
    sequence = ticket
    if CAUSAL:
        window = ticket // (together * num_tiles)
        within = ticket - window * together * num_tiles
        width = gl.minimum(together, num_groups * num_batches - window * together)
        tile = within // width
        sequence = window * together + within % width
    group = sequence % num_groups
    batch = sequence // num_groups
    if PACKED:
        start = gl.load(table_ptr + COLUMNS * tile)
        length = gl.load(table_ptr + COLUMNS * tile + 1)
        first = gl.load(table_ptr + COLUMNS * tile + 2)
        first_tile = gl.load(table_ptr + COLUMNS * tile + 3)
    else:
        start = tile * 0
        length = start + q_len
        first = tile
        first_tile = batch * num_tiles
    last = first
    if not CAUSAL:
        last = num_tiles - 1
    return group, batch, start, length, first_tile, first, last


@gluon.jit
def _num_steps(number, length, heads_per_group, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """Of a key tile: query tiles that see it, each with every head of the group."""
    query_tiles = gl.cdiv(length, BLOCK_M)
    if CAUSAL:
        query_tiles -= number * (BLOCK_N // BLOCK_M)
    return query_tiles * heads_per_group


@gluon.jit
def _num_adds(num_steps, heads_per_group, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """Of the steps of a program's last key tile, those with queries that see later keys too; 0 without causal order."""
    adds = num_steps * 0
    if CAUSAL:
        adds = gl.maximum(num_steps - BLOCK_N // BLOCK_M * heads_per_group, 0)
    return adds


@gluon.jit
def _query_tile(step, length, heads_per_group, BLOCK_M: gl.constexpr):
    """Number of a step's query tile, from the last of a sequence to the first, and its head in the group."""
    turn = step // heads_per_group
    return gl.cdiv(length, BLOCK_M) - 1 - turn, step - turn * heads_per_group


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, w_desc, lse_ptr, delta_ptr, place, tiles, barriers, strides,
    num_groups, heads_per_group, num_rows,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The warp that starts every copy from memory, and brings each query's L and delta."""
    group, batch, start, length, first_tile, first, last = place
    q_tiles, w_tiles, statistics, k_tiles, v_tiles, ds_tile, dq_tiles = tiles
    kv_full, kv_free, q_full, w_full, s_full, done, dq_free, sum_full = barriers
    stride_qb, stride_qg, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_wb, stride_wh = strides
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    KV_STAGES: gl.constexpr = k_tiles.shape[0]
    m = gl.arange(0, BLOCK_M, layout=ONE)
    count = 0
    for number in range(first, last + 1):
        kv_stage = (last - number) % KV_STAGES
        row = start + number * BLOCK_N
        mbarrier.wait(kv_free.index(kv_stage), ((number - first) // KV_STAGES & 1) ^ 1)
        full = kv_full.index(kv_stage)
        mbarrier.expect(full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        k_column = batch * stride_kb + group * stride_kh
        tma.async_copy_global_to_shared(k_desc, [row, k_column], full, k_tiles.index(kv_stage))
        v_column = batch * stride_vb + group * stride_vh
        tma.async_copy_global_to_shared(v_desc, [row, v_column], full, v_tiles.index(kv_stage))
        for step in range(_num_steps(number, length, heads_per_group, BLOCK_M, BLOCK_N, CAUSAL)):
            query, member = _query_tile(step, length, heads_per_group, BLOCK_M)
            first_row = query * BLOCK_M
            head = group * heads_per_group + member
            stage = count % STAGES
            mbarrier.wait(done.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes)
            q_column = batch * stride_qb + group * stride_qg + member * stride_qh
            tma.async_copy_global_to_shared(
                q_desc, [start + first_row, q_column], q_full.index(stage), q_tiles.index(stage)
            )
            mbarrier.expect(w_full.index(stage), w_desc.block_type.nbytes)
            w_column = batch * stride_wb + head * stride_wh
            tma.async_copy_global_to_shared(
                w_desc, [start + first_row, w_column], w_full.index(stage), w_tiles.index(stage)
            )
            seen = first_row + m < length
            line = (batch * num_groups * heads_per_group + head).to(gl.int64) * num_rows + start + first_row
            lse = gl.load(lse_ptr + line + m, mask=seen, other=float("inf"))
            delta = gl.load(delta_ptr + line + m, mask=seen, other=0.0)
            statistics.index(2 * stage).store(lse)
            statistics.index(2 * stage + 1).store(delta)
            mbarrier.arrive(s_full.index(stage))
            count += 1


@gluon.jit
def _steps(
    dk, dv, count, low, high, number, place, tiles, barriers, outputs, heads_per_group, scale, softmax_scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, LAST: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Steps [low, high) of a key tile: dk and dv [N, K] with theirs added.

    LAST where no keys come after it for these queries, and their sums are complete; in causal order they see only those
    keys of it that are not after them.
    """
    group, batch, start, length, first_tile, first, last = place
    q_tiles, w_tiles, statistics, k_tile, v_tile, ds_tile, dq_tiles = tiles
    q_full, w_full, s_full, done, dq_free, sum_full = barriers
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
        mbarrier.wait(q_full.index(stage), phase)
        s = warpgroup_mma(
            k_tile, q.permute((1, 0)), gl.zeros([BLOCK_N, BLOCK_M], gl.float32, S), use_acc=False, is_async=True
        )
        mbarrier.wait(s_full.index(stage), phase)
        mbarrier.wait(w_full.index(stage), phase)
        dp = warpgroup_mma(
            v_tile, w.permute((1, 0)), gl.zeros([BLOCK_N, BLOCK_M], gl.float32, S), use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(1, [s])
        lse = statistics.index(2 * stage).load(gl.SliceLayout(0, S))
        p = gl.exp2(s * scale - lse[None, :])
        if LAST:
            column = number * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, S))
            if CAUSAL:  # keys of a ragged tile that are no keys come after all queries
                query, member = _query_tile(step, length, heads_per_group, BLOCK_M)
                row = query * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S))
                p = gl.where(column[:, None] <= row[None, :], p, 0.0)
            else:
                p = gl.where((column < length)[:, None], p, 0.0)
        dv_token = warpgroup_mma(gl.convert_layout(p.to(dtype), OPERAND), w, dv, is_async=True)
        dp = warpgroup_mma_wait(1, [dp])
        delta = statistics.index(2 * stage + 1).load(gl.SliceLayout(0, S))
        ds = (p * (dp - delta[None, :])).to(dtype)
        ds_tile.store(ds)
        fence_async_shared()
        dq = warpgroup_mma(
            ds_tile.permute((1, 0)), k_tile, gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, Q), use_acc=False, is_async=True
        )
        dk_token = warpgroup_mma(gl.convert_layout(ds, OPERAND), q, dk, is_async=True)
        dq, dv = warpgroup_mma_wait(1, [dq, dv_token])
        if LAST:
            mbarrier.wait(sum_full.index(stage), (step - low) // STAGES & 1)
            dq += gl.where(number > 0, dq_tiles.index(stage).load(Q), 0.0)
        else:
            mbarrier.wait(dq_free.index(stage), phase ^ 1)
            dq_tiles.index(stage).store(dq)
        dk = warpgroup_mma_wait(0, [dk_token])
        if LAST:  # through the tile of ds, which has been multiplied, into rows
            dq_tile = ds_tile._reinterpret(dtype, [BLOCK_M, HEAD_DIM], q.layout)
            dq_tile.store((dq * softmax_scale).to(dtype))
            dq_rows = dq_tile.load(ROWS)
        fence_async_shared()
        mbarrier.arrive(done.index(stage))
        if LAST:
            query, member = _query_tile(step, length, heads_per_group, BLOCK_M)
            _write(dq_rows, query * BLOCK_M, group * heads_per_group + member, place, outputs[0], ROWS)
        count += 1
    return dk, dv, count


@gluon.jit
def _write(x, first_row, head, place, output, ROWS: gl.constexpr):
    """x [.., K] to a head's gradient, from that row of the sequence on, as far as the sequence goes."""
    batch, start, length = place[1], place[2], place[3]
    ptr, stride_t, stride_b, stride_h = output
    row = first_row + gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, ROWS))
    d = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, ROWS))
    ptr += batch.to(gl.int64) * stride_b + head.to(gl.int64) * stride_h
    gl.store(ptr + (start + row).to(gl.int64)[:, None] * stride_t + d[None, :], x, mask=(row < length)[:, None])


@gluon.jit
def _key_tile(
    count, number, place, tiles, barriers, kv_free, outputs, heads_per_group, scale, softmax_scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """All steps of a key tile, LAST of its program or not, and its gradients to memory; gives `count` after them."""
    q_tiles, w_tiles, statistics, k_tile, v_tile, ds_tile, dq_tiles = tiles
    length = place[3]
    dtype: gl.constexpr = k_tile.dtype
    HEAD_DIM: gl.constexpr = k_tile.shape[1]
    KV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, HEAD_DIM, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [8, 1], [1, 0])
    dk = gl.zeros([BLOCK_N, HEAD_DIM], gl.float32, KV)
    dv = gl.zeros([BLOCK_N, HEAD_DIM], gl.float32, KV)
    num_steps = _num_steps(number, length, heads_per_group, BLOCK_M, BLOCK_N, CAUSAL)
    adds = num_steps
    if LAST:
        adds = _num_adds(num_steps, heads_per_group, BLOCK_M, BLOCK_N, CAUSAL)
    if CAUSAL or not LAST:
        dk, dv, count = _steps(
            dk, dv, count, 0, adds, number, place, tiles, barriers, outputs, heads_per_group, scale, softmax_scale,
            BLOCK_M, BLOCK_N, CAUSAL, False, ROWS,
        )  # fmt: skip
    if LAST:
        dk, dv, count = _steps(
            dk, dv, count, adds, num_steps, number, place, tiles, barriers, outputs, heads_per_group, scale,
            softmax_scale, BLOCK_M, BLOCK_N, CAUSAL, True, ROWS,
        )  # fmt: skip
    # Through the tiles, which nobody reads any more, into rows.
    v_tile.store(dv.to(dtype))
    k_tile.store((dk * softmax_scale).to(dtype))
    dv_rows = v_tile.load(ROWS)
    dk_rows = k_tile.load(ROWS)
    fence_async_shared()
    mbarrier.arrive(kv_free)
    _write(dk_rows, number * BLOCK_N, place[0], place, outputs[1], ROWS)
    _write(dv_rows, number * BLOCK_N, place[0], place, outputs[2], ROWS)
    return count


@gluon.jit
def _multiply(
    place, tiles, barriers, outputs, heads_per_group, scale, softmax_scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Two warp groups: 64 keys each for the scores and their gradients, half of the columns each for those of q.

    Each place of k and v in shared memory has code of its own: with one that varied, ptxas has computed its address in
    a branch that was not taken.
    """
    q_tiles, w_tiles, statistics, k_tiles, v_tiles, ds_tile, dq_tiles = tiles
    kv_full, kv_free, q_full, w_full, s_full, done, dq_free, sum_full = barriers
    first, last = place[5], place[6]
    KV_STAGES: gl.constexpr = k_tiles.shape[0]
    count = 0
    if not CAUSAL:
        before = (last - first) % KV_STAGES
        for turn in range(gl.cdiv(last - first, KV_STAGES)):
            for stage in gl.static_range(KV_STAGES):
                number = first + KV_STAGES * turn + stage - before
                if number >= first:
                    mbarrier.wait(kv_full.index(stage), (number - first) // KV_STAGES & 1)
                    count = _key_tile(
                        count, number, place,
                        (q_tiles, w_tiles, statistics, k_tiles.index(stage), v_tiles.index(stage), ds_tile, dq_tiles),
                        (q_full, w_full, s_full, done, dq_free, sum_full), kv_free.index(stage),
                        outputs, heads_per_group, scale, softmax_scale, BLOCK_M, BLOCK_N, CAUSAL, False,
                    )  # fmt: skip
    mbarrier.wait(kv_full.index(0), (last - first) // KV_STAGES & 1)
    _key_tile(
        count, last, place,
        (q_tiles, w_tiles, statistics, k_tiles.index(0), v_tiles.index(0), ds_tile, dq_tiles),
        (q_full, w_full, s_full, done, dq_free, sum_full), kv_free.index(0),
        outputs, heads_per_group, scale, softmax_scale, BLOCK_M, BLOCK_N, CAUSAL, True,
    )  # fmt: skip


@builtin
def _async_add_to_global(tensor_desc, coord, src, _semantic=None):
    """tma.async_copy_shared_to_global that adds to what is there; Gluon has the instruction but no name for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


@gluon.jit
def _asm(CODE: gl.constexpr):
    """Instructions for each lane of this warp, which give nothing."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    gl.inline_asm_elementwise(CODE, "=r,r", [gl.full([32], 0, gl.int32, LANES)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _sum_of(step, place, tiles_of_head, heads_per_group, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Where the sums of a step's query tile are, in tiles of M."""
    group, batch, start, length, first_tile, first, last = place
    query, member = _query_tile(step, length, heads_per_group, BLOCK_M)
    head = group * heads_per_group + member
    return (head * tiles_of_head + first_tile) * (BLOCK_N // BLOCK_M) + query


@gluon.jit
def _announce(turn_ptr, index, CAUSAL: gl.constexpr):
    """Tell that one more key tile has added to the sums at `index`."""
    if CAUSAL:
        gl.atomic_add(turn_ptr + index, 1, sem="release", scope="gpu")


@gluon.jit
def _turn(turn_ptr, index, number, CAUSAL: gl.constexpr):
    """How many key tiles have added to the sums at `index`, if others than this program do."""
    turn = number
    if CAUSAL:
        turn = gl.load(turn_ptr + index, volatile=True)
    return turn


@gluon.jit
def _add(
    sum_desc, turn_ptr, place, tiles, barriers, num_tiles, num_batches, heads_per_group,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """The warp that adds a query tile's gradient up in memory, key tile after key tile.

    The first one writes, so that nothing has to be zero before, and for the last one the sums are fetched, if others
    have added to them. A step's sum is announced when the next one is on its way, or earlier if this warp has to wait
    for others, who may be waiting for it. `tma.store_wait` would only wait until shared memory was read.

    An addition has no fence between its turn and itself, on which PTX insists: it starts after the load that saw the
    turn, and adds where what was announced before has arrived. The fetch has one.
    """
    q_tiles, w_tiles, statistics, k_tiles, v_tiles, ds_tile, dq_tiles = tiles
    kv_full, kv_free, q_full, w_full, s_full, done, dq_free, sum_full = barriers
    group, batch, start, length, first_tile, number, last = place
    LINES: gl.constexpr = sum_desc.block_type.shape[0]
    tiles_of_head = num_tiles
    if not PACKED:
        tiles_of_head = num_tiles * num_batches
    num_steps = _num_steps(number, length, heads_per_group, BLOCK_M, BLOCK_N, CAUSAL)
    adds = (last - number) * num_steps + _num_adds(num_steps, heads_per_group, BLOCK_M, BLOCK_N, CAUSAL)
    total = (last - number + 1) * num_steps
    step = 0
    announced = -1
    index = _sum_of(step, place, tiles_of_head, heads_per_group, BLOCK_M, BLOCK_N)
    turn = _turn(turn_ptr, index, number, CAUSAL)
    for count in range(adds):
        stage = count % STAGES
        if turn < number:
            if announced >= 0:
                _asm(WAIT_FOR_ALL)
                mbarrier.arrive(dq_free.index(1 - stage))
                _announce(turn_ptr, announced, CAUSAL)
                announced = -1
            while turn < number:
                turn = _turn(turn_ptr, index, number, CAUSAL)
        mbarrier.wait(done.index(stage), count // STAGES & 1)
        lines = dq_tiles.index(stage)._reinterpret(gl.float32, sum_desc.block_type.shape, sum_desc.layout)
        if number > 0:
            _async_add_to_global(sum_desc, [index * LINES, 0], lines)
        else:
            tma.async_copy_shared_to_global(sum_desc, [index * LINES, 0], lines)
        step += 1
        if step == num_steps:
            step = 0
            number += 1
        next_index = _sum_of(step, place, tiles_of_head, heads_per_group, BLOCK_M, BLOCK_N)
        turn = _turn(turn_ptr, next_index, number, CAUSAL)
        if announced >= 0:
            _asm(WAIT_FOR_ALL_BUT_ONE)
            mbarrier.arrive(dq_free.index(1 - stage))
            _announce(turn_ptr, announced, CAUSAL)
        announced = index
        index = next_index
    _asm(WAIT_FOR_ALL)
    if announced >= 0:
        _announce(turn_ptr, announced, CAUSAL)
    for count in range(adds, total):
        stage = count % STAGES
        if count >= adds + STAGES:  # the step before the last has read its sums
            mbarrier.wait(done.index(stage), (count // STAGES & 1) ^ 1)
        while turn < number:
            turn = _turn(turn_ptr, index, number, CAUSAL)
        _asm(SEE_WHAT_WAS_ADDED)
        if number > 0:
            lines = dq_tiles.index(stage)._reinterpret(gl.float32, sum_desc.block_type.shape, sum_desc.layout)
            mbarrier.expect(sum_full.index(stage), sum_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(sum_desc, [index * LINES, 0], sum_full.index(stage), lines)
        else:
            mbarrier.arrive(sum_full.index(stage))
        step = gl.minimum(step + 1, num_steps - 1)
        index = _sum_of(step, place, tiles_of_head, heads_per_group, BLOCK_M, BLOCK_N)
        turn = _turn(turn_ptr, index, number, CAUSAL)


@gluon.jit(do_not_specialize=["num_tiles", "num_batches", "together", "q_len", "num_rows"])
def _backward_kernel(
    q_desc, k_desc, v_desc, w_desc,
    sum_desc,  # fp32 [query tiles of all heads * M * K / 32, 32]: tiles as they lie in shared memory
    lse_ptr, delta_ptr,  # [B, H, num_rows] fp32
    dq_ptr, dk_ptr, dv_ptr,
    turn_ptr,  # int32, zeros: how many key tiles each query tile has met; the first entry counts tickets
    table_ptr,  # as `tiles.table_of` makes it
    stride_qb, stride_qg, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_wb, stride_wh,
    stride_dqt, stride_dqb, stride_dqh, stride_dkt, stride_dkb, stride_dkh, stride_dvt, stride_dvb, stride_dvh,
    num_tiles, num_batches, num_groups, heads_per_group, together, q_len, num_rows, scale, softmax_scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    # A key tile after another meets a query tile again two steps later at the earliest, when its addition has arrived.
    gl.static_assert(BLOCK_N % BLOCK_M == 0)
    dtype: gl.constexpr = q_desc.dtype
    HEAD_DIM: gl.constexpr = q_desc.block_type.shape[1]
    KV_STAGES: gl.constexpr = 1 if CAUSAL or HEAD_DIM > 64 else 2  # only one program owns several, and there is room
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    DQ: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = (
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, HEAD_DIM], q_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, HEAD_DIM], w_desc.layout),
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(dtype, [KV_STAGES, BLOCK_N, HEAD_DIM], k_desc.layout),
        gl.allocate_shared_memory(dtype, [KV_STAGES, BLOCK_N, HEAD_DIM], v_desc.layout),
        gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_M], DS),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M, HEAD_DIM], DQ),
    )
    kv_full = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], BARRIER)
    kv_free = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    w_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    s_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    dq_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    sum_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(KV_STAGES):
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(kv_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(w_full.index(i), count=1)
        mbarrier.init(s_full.index(i), count=1)
        mbarrier.init(done.index(i), count=1)
        mbarrier.init(dq_free.index(i), count=1)
        mbarrier.init(sum_full.index(i), count=1)
    fence_async_shared()
    barriers = (kv_full, kv_free, q_full, w_full, s_full, done, dq_free, sum_full)
    ticket = gl.program_id(0)
    if CAUSAL:  # in the order in which programs really start
        ticket = gl.atomic_add(turn_ptr, 1, sem="relaxed", scope="gpu")
    place = _place(ticket, table_ptr, num_tiles, num_batches, num_groups, together, q_len, CAUSAL, PACKED)
    outputs = (
        (dq_ptr, stride_dqt, stride_dqb, stride_dqh),
        (dk_ptr, stride_dkt, stride_dkb, stride_dkh),
        (dv_ptr, stride_dvt, stride_dvb, stride_dvh),
    )
    strides = (stride_qb, stride_qg, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_wb, stride_wh)
    gl.warp_specialize(
        [
            (
                _multiply,
                (place, tiles, barriers, outputs, heads_per_group, scale, softmax_scale, BLOCK_M, BLOCK_N, CAUSAL),
            ),
            (
                _add,
                (
                    sum_desc, turn_ptr + 1, place, tiles, barriers, num_tiles, num_batches, heads_per_group,
                    BLOCK_M, BLOCK_N, CAUSAL, PACKED,
                ),
            ),
            (
                _load,
                (
                    q_desc, k_desc, v_desc, w_desc, lse_ptr, delta_ptr, place, tiles, barriers, strides,
                    num_groups, heads_per_group, num_rows, BLOCK_M, BLOCK_N, CAUSAL,
                ),
            ),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip


def window(sequences: int, num_tiles: int, programs: int) -> int:
    """How many sequences of `num_tiles` key tiles each take turns: as many as run at once, for what the cache holds.

    All, if those do not divide them or leave programs without a tile: the longest tiles must not start last.
    """
    fitting = programs // num_tiles
    if fitting * num_tiles < FULL_WINDOW * programs or sequences % fitting:
        return sequences
    return fitting


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, w: Tensor,
    causal: bool, borders: Tensor | None, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv, contiguous, for the upstream gradient w of `attention_forward`'s out, and its L."""
    groups, per_group, head_dim = q.shape[-3:]
    if not copyable(w):
        w = w.clone(memory_format=torch.contiguous_format)
    table = table_of(borders, backward=True) if borders is not None else None
    num_batches = q.shape[1] if table is None else 1
    num_tiles = len(table) if table is not None else triton.cdiv(len(q), TILE)
    num_rows, heads, block = len(q), groups * per_group, QUERY_ROWS[head_dim]
    delta = torch.empty_like(lse)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    sums = torch.empty((num_tiles * heads * num_batches * TILE * head_dim // LINE, LINE), device=q.device)
    turns = torch.zeros(1 + num_tiles * heads * num_batches * (TILE // block), dtype=torch.int32, device=q.device)
    _delta_kernel[(heads * num_batches, triton.cdiv(num_rows, DELTA_ROWS))](
        out, w, delta, **strides_of(o=out, w=w), stride_ot=out.stride(0), stride_wt=w.stride(0),
        num_heads=heads, num_rows=num_rows, HEAD_DIM=head_dim, BLOCK=DELTA_ROWS, num_warps=4,
    )  # fmt: skip
    sequences = groups * num_batches
    flat = dq.flatten(-3, -2)
    _backward_kernel[(sequences * (num_tiles if causal else 1),)](
        rows_of(q, block), rows_of(k, TILE), rows_of(v, TILE), rows_of(w, block),
        rows_of(sums, block * head_dim // LINE), lse, delta, dq, dk, dv, turns, table,
        **strides_of(q=q, k=k, v=v, w=w, dq=flat, dk=dk, dv=dv),
        stride_dqt=flat.stride(0), stride_dkt=dk.stride(0), stride_dvt=dv.stride(0),
        num_tiles=num_tiles, num_batches=num_batches, num_groups=groups, heads_per_group=per_group,
        together=window(sequences, num_tiles, multiprocessors(q)) if table is None else 1,
        q_len=num_rows, num_rows=num_rows, scale=softmax_scale * LOG2_E, softmax_scale=softmax_scale,
        BLOCK_M=block, BLOCK_N=TILE, CAUSAL=causal, PACKED=table is not None, num_warps=8,
    )  # fmt: skip
    return dq, dk, dv
