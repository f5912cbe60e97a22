# mypy: allow-untyped-defs
# (the arguments of a Triton kernel have no Python types)
"""Fused attention for training and decoding, so that no [S, S] matrix and no transposed copy ever reaches memory.

Per head, with log2 statistics (c = softmax_scale * log2 e, query head h reading key/value head g = h // (H / G)):

    s_ij = c q_i . k_j        L_i = log2 sum_j 2^s_ij        p_ij = 2^(s_ij - L_i)        o_i = sum_j p_ij v_j

over the live pairs: j <= i within a segment if causal, all j of the segment if not. Keys are walked in tiles with a
running maximum and sum (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135). Backwards, for the
upstream gradient w and delta_i = o_i . w_i,

    t_ij = p_ij (w_i . v_j - delta_i)
    dv_j = sum_i p_ij w_i        dq_i = scale sum_j t_ij k_j        dk_j = scale sum_i t_ij q_i

where the sums over i of dv and dk run through all H / G query heads of the group.

On Hopper, `vlm_kernels.hopper` computes what training asks for in 16 bits, with fewer products backwards; these kernels
compute the rest, and everything elsewhere.

Memory, in elements per sequence: forward reads q once and k, v once per query tile (mostly from L2) and writes o
(S H K) and L (S H, fp32). Saved for backward: q, k, v, o, L. Backward is two kernels and no atomics, so a gradient has
the same bits every time: one owns query tiles (dq and delta), one owns key tiles (dk, dv). That is seven matrix
products per pair of tiles instead of the five of a backward pass that adds dq up in memory. Decoding (one query row)
reads each key and value once for all heads of a group, and writes o and L by parts of the keys for a kernel that joins
them.

Shapes: B batch, S sequence, T packed tokens, H query heads, G key/value heads, K head dim, M query tile, N key tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm_kernels import hopper, reference

INTERPRETED = triton.knobs.runtime.interpret  # as the decorators below read it
HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2_E = 1.4426950408889634
SEGMENTS_AT_ONCE = tl.constexpr(64)  # borders read per step of the tile's search for its segment


class Tiles(NamedTuple):
    """Query rows M and keys N of a tile, and how it is run."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By pass, head dim and whether products are exact fp32. Of the tiles that ptxas compiles for sm_90 without a spill
# (kernels/compiled.txt), the fastest on an H200, by `kernels/benches/check_gpu.py attention tune`; the time of forward,
# or of both gradients, with the next best in brackets.
TILES = {
    ("forward", 64, False): Tiles(128, 64, 8, 3),  # CLIP 0.178 ms (64 x 64: 0.185)
    ("forward", 128, False): Tiles(128, 128, 8, 2),  # Mistral S 4096 0.703 ms (3 stages: 0.706)
    ("packed forward", 128, False): Tiles(64, 64, 4, 3),  # segments of 610 tokens 0.405 ms (128 x 128: 0.454)
    ("query gradient", 64, False): Tiles(128, 64, 8, 3),  # 0.698 ms (64 x 64: 0.709)
    ("query gradient", 128, False): Tiles(64, 64, 4, 2),  # 2.226 ms (128 x 64: 2.342)
    ("key gradient", 64, False): Tiles(64, 128, 8, 3),  # 0.782 ms (64 x 64: 0.793)
    ("key gradient", 128, False): Tiles(32, 128, 8, 3),  # 2.348 ms (with spills 64 x 128: 2.260, 32 x 64: 2.295)
    # The products run on ordinary arithmetic units, one operand element per register.
    ("forward", 64, True): Tiles(64, 32, 8, 1),
    ("forward", 128, True): Tiles(32, 16, 8, 1),
    ("query gradient", 64, True): Tiles(32, 32, 8, 1),
    ("query gradient", 128, True): Tiles(32, 32, 16, 1),
    ("key gradient", 64, True): Tiles(32, 32, 8, 1),
    ("key gradient", 128, True): Tiles(32, 32, 8, 1),
    # M is one group's heads, so the matrix unit's smallest tile; reading the cache is all that counts.
    ("decode", 64, False): Tiles(16, 64, 4, 4),
    ("decode", 128, False): Tiles(16, 64, 4, 4),
    ("decode", 64, True): Tiles(16, 32, 4, 1),
    ("decode", 128, True): Tiles(16, 32, 4, 1),
}
# The keys of a decoding step are split until there are two programs for each of an H100's or H200's 132
# multiprocessors, but into no more parts than the kernel that joins them holds in registers.
DECODE_PROGRAMS = 264
DECODE_PARTS = 64


@triton.jit
def _segment_of(tile, cu_ptr, num_segments, BLOCK: tl.constexpr):
    """Start and length of the segment that `tile` lies in, and the tile's number there; length 0 beyond the last tile.

    Segment s has ceil(length / BLOCK) tiles. Each program counts the segments that end before its tile, from the
    borders alone: no host synchronisation, no table, and a grid of T // BLOCK + n programs covers every case.
    """
    segment = 0
    first = 0  # the segment's first tile
    total = 0
    for low in tl.range(0, num_segments, SEGMENTS_AT_ONCE):
        index = low + tl.arange(0, SEGMENTS_AT_ONCE)
        inside = index < num_segments
        begin = tl.load(cu_ptr + index, mask=inside, other=0)
        end = tl.load(cu_ptr + index + 1, mask=inside, other=0)
        tiles = (end - begin + BLOCK - 1) // BLOCK
        ends = total + tl.cumsum(tiles, 0)
        passed = inside & (ends <= tile)
        segment += tl.sum(passed.to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(passed, ends, 0), 0))
        total += tl.sum(tiles, 0)
    alive = segment < num_segments
    start = tl.load(cu_ptr + segment, mask=alive, other=0)
    end = tl.load(cu_ptr + segment + 1, mask=alive, other=0)
    return start, end - start, tile - first


@triton.jit
def _place(
    num_tiles, cu_ptr, ranges_ptr, num_batches, num_heads, q_len, k_len,
    BLOCK: tl.constexpr, HEADS_FIRST: tl.constexpr, PACKED: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """This program's head, batch and tile, and where the queries and keys of its sequence start and how many they are.

    HEADS_FIRST gives neighbouring programs the same tile of all heads, which lets the caller order tiles by their work;
    otherwise neighbours share a head's keys.
    """
    program = tl.program_id(0)
    if HEADS_FIRST:
        head = program % num_heads
        tile = program // num_heads
        batch = tile * 0
        if not PACKED:
            batch = tile % num_batches
            tile = tile // num_batches
    else:
        tile = program % num_tiles
        head = program // num_tiles % num_heads
        batch = program // num_tiles // num_heads
    q_start = tl.cast(0, tl.int64)
    k_start = tl.cast(0, tl.int64)
    if PACKED:
        start, q_len, tile = _segment_of(tile, cu_ptr, num_batches, BLOCK)
        q_start = start.to(tl.int64)
        k_start = q_start
        k_len = q_len
    if RANGED:
        k_begin = tl.load(ranges_ptr + 2 * batch)
        k_len = tl.load(ranges_ptr + 2 * batch + 1) - k_begin
        k_start = k_begin.to(tl.int64)
    return head, batch, tile, q_start, q_len, k_start, k_len


@triton.jit
def _forward_tiles(
    acc, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, row, low, high, k_len, scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the key tiles of [low, high) to acc [M, K], running maximum `top` and sum `total` [M].

    Only scalar pointers go round the loop: a tile of them costs so many registers that the kernel spills.
    """
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, HEAD_DIM)
    for first_column in tl.range(low, high, BLOCK_N):
        column = first_column + n
        k_ptrs = k_ptr + n[:, None] * stride_kt + d[None, :]
        v_ptrs = v_ptr + n[:, None] * stride_vt + d[None, :]
        k = tl.load(k_ptrs, mask=(column < k_len)[:, None], other=0.0) if MASKED else tl.load(k_ptrs)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            live = (column < k_len)[None, :]
            if CAUSAL:
                live = live & (column[None, :] <= row[:, None])
            s = tl.where(live, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new_top[:, None])  # one fused multiply-add per score, because scale > 0
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = tl.load(v_ptrs, mask=(column < k_len)[:, None], other=0.0) if MASKED else tl.load(v_ptrs)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        top = new_top
        k_ptr += BLOCK_N * stride_kt
        v_ptr += BLOCK_N * stride_vt
    return acc, top, total, k_ptr, v_ptr


@triton.jit(do_not_specialize=["num_tiles", "num_batches", "q_len", "k_len", "num_rows"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,  # [S, B, G, H / G, K], [S', B, G, K] twice, [S, B, H, K], or packed without B
    lse_ptr,  # [B, H, num_rows] fp32
    cu_ptr, ranges_ptr,  # [n + 1] int32, [B, 2] int32
    stride_qt, stride_qb, stride_qg, stride_qh, stride_kt, stride_kb, stride_kh,
    stride_vt, stride_vb, stride_vh, stride_ot, stride_ob, stride_oh,
    num_tiles, num_batches, num_heads, heads_per_group, q_len, k_len, num_rows, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    head, batch, tile, q_start, q_len, k_start, k_len = _place(
        num_tiles, cu_ptr, ranges_ptr, num_batches, num_heads, q_len, k_len, BLOCK_M, CAUSAL, PACKED, RANGED
    )
    if tile * BLOCK_M >= q_len:
        return
    if CAUSAL:  # the last queries see the most keys: longest work first
        tile = tl.cdiv(q_len, BLOCK_M) - 1 - tile
    first_row = tile * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD_DIM)
    row = first_row + m
    group = (head // heads_per_group).to(tl.int64)
    member = (head % heads_per_group).to(tl.int64)
    q_ptr += batch.to(tl.int64) * stride_qb + group * stride_qg + member * stride_qh + (q_start + first_row) * stride_qt
    k_ptr += batch.to(tl.int64) * stride_kb + group * stride_kh + k_start * stride_kt
    v_ptr += batch.to(tl.int64) * stride_vb + group * stride_vh + k_start * stride_vt
    q = tl.load(q_ptr + m[:, None] * stride_qt + d[None, :], mask=(row < q_len)[:, None], other=0.0)

    if CAUSAL:
        whole = first_row // BLOCK_N * BLOCK_N  # keys up to here are seen by every query of the tile
        high = tl.minimum(first_row + BLOCK_M, k_len)
    else:
        whole = k_len // BLOCK_N * BLOCK_N
        high = k_len
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, top, total, k_ptr, v_ptr = _forward_tiles(
        acc, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, row, 0, whole, k_len, scale,
        HEAD_DIM, BLOCK_N, CAUSAL, False,
    )  # fmt: skip
    acc, top, total, k_ptr, v_ptr = _forward_tiles(
        acc, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, row, whole, high, k_len, scale,
        HEAD_DIM, BLOCK_N, CAUSAL, True,
    )  # fmt: skip
    # A sample whose key range is empty has total 0: its output is 0, and L = inf makes every p zero in backward.
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = tl.where(total == 0.0, float("inf"), top + tl.log2(total))
    out_ptr += batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + (q_start + first_row) * stride_ot
    tl.store(out_ptr + m[:, None] * stride_ot + d[None, :], out, mask=(row < q_len)[:, None])
    lse_ptr += (batch * num_heads + head).to(tl.int64) * num_rows + q_start
    tl.store(lse_ptr + row, lse, mask=row < q_len)


@triton.jit
def _query_gradient_tiles(
    dq, q, w, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, row, low, high, k_len, scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add sum_j t_ij k_j over the key tiles of [low, high) to dq [M, K]."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, HEAD_DIM)
    for first_column in tl.range(low, high, BLOCK_N):
        column = first_column + n
        k_ptrs = k_ptr + n[:, None] * stride_kt + d[None, :]
        v_ptrs = v_ptr + n[:, None] * stride_vt + d[None, :]
        if MASKED:
            k = tl.load(k_ptrs, mask=(column < k_len)[:, None], other=0.0)
            v = tl.load(v_ptrs, mask=(column < k_len)[:, None], other=0.0)
        else:
            k = tl.load(k_ptrs)
            v = tl.load(v_ptrs)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.exp2(s * scale - lse[:, None])
        if MASKED:
            live = (column < k_len)[None, :]
            if CAUSAL:
                live = live & (column[None, :] <= row[:, None])
            p = tl.where(live, p, 0.0)
        dp = tl.dot(w, tl.trans(v), input_precision="ieee")
        t = p * (dp - delta[:, None])
        dq = tl.dot(t.to(k.dtype), k, dq, input_precision="ieee")
        k_ptr += BLOCK_N * stride_kt
        v_ptr += BLOCK_N * stride_vt
    return dq, k_ptr, v_ptr


@triton.jit(do_not_specialize=["num_tiles", "num_batches", "q_len", "k_len", "num_rows"])
def _query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, w_ptr,  # w is the upstream gradient, shaped like out
    lse_ptr, delta_ptr,  # [B, H, num_rows] fp32; delta is written
    dq_ptr,
    cu_ptr, ranges_ptr,
    stride_qt, stride_qb, stride_qg, stride_qh,
    stride_kt, stride_kb, stride_kh, stride_vt, stride_vb, stride_vh,
    stride_ot, stride_ob, stride_oh, stride_wt, stride_wb, stride_wh, stride_dqt, stride_dqb, stride_dqh,
    num_tiles, num_batches, num_heads, heads_per_group, q_len, k_len, num_rows, scale, softmax_scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    head, batch, tile, q_start, q_len, k_start, k_len = _place(
        num_tiles, cu_ptr, ranges_ptr, num_batches, num_heads, q_len, k_len, BLOCK_M, CAUSAL, PACKED, RANGED
    )
    if tile * BLOCK_M >= q_len:
        return
    if CAUSAL:
        tile = tl.cdiv(q_len, BLOCK_M) - 1 - tile
    first_row = tile * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD_DIM)
    row = first_row + m
    alive = row < q_len
    group = (head // heads_per_group).to(tl.int64)
    position = q_start + first_row
    batch_64 = batch.to(tl.int64)
    head_64 = head.to(tl.int64)
    member = (head % heads_per_group).to(tl.int64)
    q_ptr += batch_64 * stride_qb + group * stride_qg + member * stride_qh + position * stride_qt
    out_ptr += batch_64 * stride_ob + head_64 * stride_oh + position * stride_ot
    w_ptr += batch_64 * stride_wb + head_64 * stride_wh + position * stride_wt
    dq_ptr += batch_64 * stride_dqb + head_64 * stride_dqh + position * stride_dqt
    k_ptr += batch_64 * stride_kb + group * stride_kh + k_start * stride_kt
    v_ptr += batch_64 * stride_vb + group * stride_vh + k_start * stride_vt
    statistics = (batch * num_heads + head).to(tl.int64) * num_rows + q_start

    w = tl.load(w_ptr + m[:, None] * stride_wt + d[None, :], mask=alive[:, None], other=0.0)
    out = tl.load(out_ptr + m[:, None] * stride_ot + d[None, :], mask=alive[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * w.to(tl.float32), 1)
    tl.store(delta_ptr + statistics + row, delta, mask=alive)
    q = tl.load(q_ptr + m[:, None] * stride_qt + d[None, :], mask=alive[:, None], other=0.0)
    lse = tl.load(lse_ptr + statistics + row, mask=alive, other=float("inf"))

    if CAUSAL:
        whole = first_row // BLOCK_N * BLOCK_N
        high = tl.minimum(first_row + BLOCK_M, k_len)
    else:
        whole = k_len // BLOCK_N * BLOCK_N
        high = k_len
    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    dq, k_ptr, v_ptr = _query_gradient_tiles(
        dq, q, w, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, row, 0, whole, k_len, scale,
        HEAD_DIM, BLOCK_N, CAUSAL, False,
    )  # fmt: skip
    dq, k_ptr, v_ptr = _query_gradient_tiles(
        dq, q, w, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, row, whole, high, k_len, scale,
        HEAD_DIM, BLOCK_N, CAUSAL, True,
    )  # fmt: skip
    tl.store(dq_ptr + m[:, None] * stride_dqt + d[None, :], dq * softmax_scale, mask=alive[:, None])


@triton.jit(do_not_specialize=["num_tiles", "num_batches", "q_len", "k_len", "num_rows"])
def _key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, w_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr,  # [S', B, G, K] or packed
    cu_ptr, ranges_ptr,
    stride_qt, stride_qb, stride_qg, stride_qh,
    stride_kt, stride_kb, stride_kh, stride_vt, stride_vb, stride_vh,
    stride_wt, stride_wb, stride_wh, stride_dkt, stride_dkb, stride_dkh, stride_dvt, stride_dvb, stride_dvh,
    num_tiles, num_batches, num_heads, heads_per_group, q_len, k_len, num_rows, scale, softmax_scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """One key tile of one key/value head (`num_heads` are those): the group's query heads are summed in registers.

    One loop over all query tiles of all those heads: with a loop per head, and one for the tiles on the diagonal, the
    two accumulators did not stay in registers (1164 bytes spilled at K = 128). Scores are taken transposed, [N, M], so
    that p and t are left operands, which the matrix unit reads from registers; -delta is where the product for t starts
    from, for the same reason. Rows beyond q_len have L = inf, hence p = 0.
    """
    group, batch, tile, q_start, q_len, k_start, k_len = _place(
        num_tiles, cu_ptr, ranges_ptr, num_batches, num_heads, q_len, k_len, BLOCK_N, CAUSAL, PACKED, RANGED
    )
    first_column = tile * BLOCK_N  # the first keys are seen by the most queries: already longest work first
    if first_column >= k_len:
        return
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, HEAD_DIM)
    column = first_column + n
    alive = (column < k_len)[:, None]
    position = k_start + first_column
    batch_64 = batch.to(tl.int64)
    group_64 = group.to(tl.int64)
    k_ptr += batch_64 * stride_kb + group_64 * stride_kh + position * stride_kt
    v_ptr += batch_64 * stride_vb + group_64 * stride_vh + position * stride_vt
    dk_ptr += batch_64 * stride_dkb + group_64 * stride_dkh + position * stride_dkt
    dv_ptr += batch_64 * stride_dvb + group_64 * stride_dvh + position * stride_dvt
    q_ptr += batch_64 * stride_qb + group_64 * stride_qg + q_start * stride_qt
    w_ptr += batch_64 * stride_wb + group_64 * heads_per_group * stride_wh + q_start * stride_wt
    statistics = (batch * num_heads + group).to(tl.int64) * heads_per_group * num_rows + q_start
    k = tl.load(k_ptr + n[:, None] * stride_kt + d[None, :], mask=alive, other=0.0)
    v = tl.load(v_ptr + n[:, None] * stride_vt + d[None, :], mask=alive, other=0.0)
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    low = tile * 0
    if CAUSAL:
        low = first_column  # BLOCK_M divides BLOCK_N
    num_query_tiles = tl.cdiv(q_len - low, BLOCK_M)
    first_row = low
    statistics += low
    q_ptr += low.to(tl.int64) * stride_qt
    w_ptr += low.to(tl.int64) * stride_wt
    back = ((num_query_tiles - 1) * BLOCK_M).to(tl.int64)  # from a head's last tile to its first
    for _ in tl.range(0, heads_per_group * num_query_tiles):
        row = first_row + m
        seen = row < q_len
        q = tl.load(q_ptr + m[:, None] * stride_qt + d[None, :], mask=seen[:, None], other=0.0)
        lse = tl.load(lse_ptr + statistics + m, mask=seen, other=float("inf"))
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = tl.exp2(s * scale - lse[None, :])
        if CAUSAL:
            p = tl.where(column[:, None] <= row[None, :], p, 0.0)
        w = tl.load(w_ptr + m[:, None] * stride_wt + d[None, :], mask=seen[:, None], other=0.0)
        delta = tl.load(delta_ptr + statistics + m, mask=seen, other=0.0)
        dv = tl.dot(p.to(w.dtype), w, dv, input_precision="ieee")
        minus_delta = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) - delta[None, :]
        t = p * tl.dot(v, tl.trans(w), minus_delta, input_precision="ieee")
        dk = tl.dot(t.to(q.dtype), q, dk, input_precision="ieee")
        last = first_row + BLOCK_M >= q_len  # then on to the next head
        q_ptr += tl.where(last, stride_qh - back * stride_qt, BLOCK_M * stride_qt)
        w_ptr += tl.where(last, stride_wh - back * stride_wt, BLOCK_M * stride_wt)
        statistics += tl.where(last, num_rows - back, BLOCK_M)
        first_row = tl.where(last, low, first_row + BLOCK_M)
    tl.store(dk_ptr + n[:, None] * stride_dkt + d[None, :], dk * softmax_scale, mask=alive)
    tl.store(dv_ptr + n[:, None] * stride_dvt + d[None, :], dv, mask=alive)


@triton.jit(do_not_specialize=["k_len", "keys_per_split", "num_splits"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr,  # [1, B, G, H / G, K], [S', B, G, K] twice
    part_ptr, lse_ptr,  # [B, H, splits, K], [B, H, splits], fp32
    ranges_ptr,
    stride_qb, stride_qg, stride_qh, stride_kt, stride_kb, stride_kh, stride_vt, stride_vb, stride_vh,
    num_groups, heads_per_group, k_len, keys_per_split, num_splits, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """One group's query heads, as the rows of a tile, against one part of its keys: each key is read once."""
    group = tl.program_id(0) % num_groups
    batch = tl.program_id(0) // num_groups
    split = tl.program_id(1)
    k_start = tl.cast(0, tl.int64)
    if RANGED:
        k_begin = tl.load(ranges_ptr + 2 * batch)
        k_len = tl.load(ranges_ptr + 2 * batch + 1) - k_begin
        k_start = k_begin.to(tl.int64)
    low = split * keys_per_split
    high = tl.minimum(low + keys_per_split, k_len)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD_DIM)
    alive = m < heads_per_group
    batch_64 = batch.to(tl.int64)
    group_64 = group.to(tl.int64)
    q_ptr += batch_64 * stride_qb + group_64 * stride_qg
    k_ptr += batch_64 * stride_kb + group_64 * stride_kh + (k_start + low) * stride_kt
    v_ptr += batch_64 * stride_vb + group_64 * stride_vh + (k_start + low) * stride_vt
    q = tl.load(q_ptr + m[:, None] * stride_qh + d[None, :], mask=alive[:, None], other=0.0)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, top, total, k_ptr, v_ptr = _forward_tiles(
        acc, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, m, low, high, high, scale,
        HEAD_DIM, BLOCK_N, False, True,
    )  # fmt: skip
    # Parts beyond a sample's keys have top = -inf, which the sum below gives no weight.
    part = ((batch_64 * num_groups + group_64) * heads_per_group + m) * num_splits + split
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(part_ptr + part[:, None] * HEAD_DIM + d[None, :], acc / total[:, None], mask=alive[:, None])
    tl.store(lse_ptr + part, top + tl.log2(total), mask=alive)


@triton.jit(do_not_specialize=["num_splits"])
def _join_kernel(
    part_ptr, lse_ptr, out_ptr,  # [rows, splits, K], [rows, splits], [rows, K]
    num_splits, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The parts of one query head weighted by 2^L: sum_s 2^(L_s - L) o_s."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, HEAD_DIM)
    lse = tl.load(lse_ptr + row * num_splits + split, mask=split < num_splits, other=float("-inf"))
    parts = tl.load(
        part_ptr + (row * num_splits + split)[:, None] * HEAD_DIM + d[None, :],
        mask=(split < num_splits)[:, None], other=0.0,
    )  # fmt: skip
    top = tl.max(lse, 0)
    weight = tl.where(lse == float("-inf"), 0.0, tl.exp2(lse - top))
    total = tl.sum(weight, 0)
    out = tl.sum(weight[:, None] * parts, 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * HEAD_DIM + d, out)


def _decode(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor | None, softmax_scale: float) -> Tensor:
    """One query row per sample, q [1, B, G, H / G, K], without a gradient."""
    _, num_batches, groups, heads_per_group, head_dim = q.shape
    tiles = TILES["decode", head_dim, q.dtype == torch.float32]
    wanted = min(triton.cdiv(DECODE_PROGRAMS, num_batches * groups), DECODE_PARTS)
    keys_per_split = triton.cdiv(triton.cdiv(len(k), wanted), tiles.block_n) * tiles.block_n
    num_splits = triton.cdiv(len(k), keys_per_split)
    rows = num_batches * groups * heads_per_group
    part = torch.empty((rows, num_splits, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((rows, num_splits), dtype=torch.float32, device=q.device)
    strides = _strides(q, k=k, v=v)
    del strides["stride_qt"]
    _decode_kernel[num_batches * groups, num_splits](
        q, k, v, part, lse, ranges, **strides, num_groups=groups, heads_per_group=heads_per_group,
        k_len=len(k), keys_per_split=keys_per_split, num_splits=num_splits,
        scale=softmax_scale * LOG2_E, HEAD_DIM=head_dim,
        BLOCK_M=max(tiles.block_m, triton.next_power_of_2(heads_per_group)), BLOCK_N=tiles.block_n,
        RANGED=ranges is not None, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    out = torch.empty((1, num_batches, groups * heads_per_group, head_dim), dtype=q.dtype, device=q.device)
    _join_kernel[(rows,)](
        part, lse, out, num_splits, HEAD_DIM=head_dim, SPLITS=triton.next_power_of_2(num_splits), num_warps=4
    )
    return out


class _Attention(torch.autograd.Function):
    """The kernels as one differentiable operation on q [.., G, H / G, K]; its caller has checked the arguments."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, borders: Tensor | None, ranges: Tensor | None, c: float
    ) -> Tensor:
        ctx.causal, ctx.softmax_scale = causal, c
        ctx.on_hopper = hopper.usable(q, k, v, causal, borders, ranges)
        if ctx.on_hopper:
            out, lse = hopper.attention_forward(q, k, v, causal, borders, c)
            ctx.save_for_backward(q, k, v, out, lse, borders, None)
            return out
        heads = q.shape[-3] * q.shape[-2]
        out = torch.empty((*q.shape[:-3], heads, q.shape[-1]), dtype=q.dtype, device=q.device)
        lse = torch.empty((*q.shape[1:-3], heads, q.shape[0]), dtype=torch.float32, device=q.device)
        case = (q.shape[-1], q.dtype == torch.float32)
        tiles = TILES["forward", *case]
        if borders is not None:
            tiles = TILES.get(("packed forward", *case), tiles)
        grid, arguments = _geometry(q, k, borders, ranges, causal, tiles, by_query=True)
        strides = _strides(q, k=k, v=v, o=out)
        _forward_kernel[grid](q, k, v, out, lse, **strides, **arguments, scale=c * LOG2_E)
        ctx.save_for_backward(q, k, v, out, lse, borders, ranges)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, borders, ranges = ctx.saved_tensors
        if ctx.on_hopper:
            with torch.cuda.device_of(q):
                return *hopper.attention_backward(q, k, v, out, lse, w, ctx.causal, borders, ctx.softmax_scale), *[
                    None
                ] * 4
        w = w if w.stride(-1) == 1 else w.contiguous()
        delta = torch.empty_like(lse)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        # Keys outside their sample's range belong to no tile.
        new = torch.zeros if ranges is not None else torch.empty
        dk, dv = (new(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        scales = {"scale": ctx.softmax_scale * LOG2_E, "softmax_scale": ctx.softmax_scale}
        with torch.cuda.device_of(q):
            tiles = TILES["query gradient", q.shape[-1], q.dtype == torch.float32]
            grid, arguments = _geometry(q, k, borders, ranges, ctx.causal, tiles, by_query=True)
            strides = _strides(q, k=k, v=v, o=out, w=w, dq=dq.flatten(-3, -2))
            _query_gradient_kernel[grid](q, k, v, out, w, lse, delta, dq, **strides, **arguments, **scales)
            tiles = TILES["key gradient", q.shape[-1], q.dtype == torch.float32]
            grid, arguments = _geometry(q, k, borders, ranges, ctx.causal, tiles, by_query=False)
            strides = _strides(q, k=k, v=v, w=w, dk=dk, dv=dv)
            _key_gradient_kernel[grid](q, k, v, w, lse, delta, dk, dv, **strides, **arguments, **scales)
        return dq, dk, dv, None, None, None, None


def _geometry(
    q: Tensor, k: Tensor, borders: Tensor | None, ranges: Tensor | None, causal: bool, tiles: Tiles, by_query: bool
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid of a kernel whose programs own query tiles (or key tiles), and what says where they lie."""
    groups, heads_per_group = q.shape[-3:-1]
    rows, heads, block = (
        (len(q), groups * heads_per_group, tiles.block_m) if by_query else (len(k), groups, tiles.block_n)
    )
    packed = borders is not None
    # Each segment wastes less than one tile, so T // block + n tiles hold them all; programs beyond the last one leave.
    num_batches = len(borders) - 1 if borders is not None else q.shape[1]
    num_tiles = rows // block + num_batches if packed else triton.cdiv(rows, block)
    arguments = {
        "cu_ptr": borders,
        "ranges_ptr": ranges,
        "num_tiles": num_tiles,
        "num_batches": num_batches,
        "num_heads": heads,
        "heads_per_group": heads_per_group,
        "q_len": q.shape[0],
        "k_len": k.shape[0],
        "num_rows": q.shape[0],
        "HEAD_DIM": q.shape[-1],
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "CAUSAL": causal,
        "PACKED": packed,
        "RANGED": ranges is not None,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    return (num_tiles * heads * (1 if packed else num_batches),), arguments


def _strides(q: Tensor, **tensors: Tensor) -> dict[str, int]:
    """stride_kt, stride_kb, stride_kh of k, and so on; the head dim's is 1, a packed tensor's batch stride 0.

    q has one more, stride_qg from group to group: between the query heads of a fused projection lie keys and values.
    """
    strides = {"stride_qg": q.stride(-3)}
    for name, x in {"q": q, **tensors}.items():
        strides[f"stride_{name}t"] = x.stride(0)
        strides[f"stride_{name}b"] = x.stride(1) if x.dim() == (5 if name == "q" else 4) else 0
        strides[f"stride_{name}h"] = x.stride(-2)
    return strides


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    key_ranges: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v per head, query head h reading key/value head h * G // H (grouped-query attention).

    On a CPU this is `reference.attention`, unless triton was imported with TRITON_INTERPRET=1. One query row per sample
    that nothing differentiates, as in decoding, has kernels that split the keys.

    Args:
        q: [S, B, H, K], or packed [T, H, K] with `cu_seqlens`; K is 64 or 128. Or with its heads by group, as [S, B,
            G, H / G, K] or [T, G, H / G, K]. Any strides but the last, which is 1: slices of Megatron's fused [S, B, G,
            H / G + 2, K] projection are read where they lie.
        k, v: [S', B, G, K], or [T, G, K]; H is a multiple of G. `causal` needs S' = S.
        causal: query i of a sequence sees its keys 0..i only.
        cu_seqlens: int32 [n + 1] from 0 to T; tokens attend within [cu_seqlens[i], cu_seqlens[i + 1]) only. Its values
            are looked at once per tensor, which on a GPU waits for the device unless they are `known_on_host`.
        max_seqlen: upper bound on the segments' lengths; only checked, the kernels do not need it.
        softmax_scale: positive, default K ** -0.5.
        key_ranges: int32 [B, 2], without `causal` and `cu_seqlens`: sample b sees keys key_ranges[b, 0] up to, not
            including, key_ranges[b, 1], as in a cache of prompts of unequal lengths. An empty range gives 0. Looked at
            like `cu_seqlens`.

    Returns:
        [S, B, H, K] or [T, H, K], contiguous.

    Raises:
        ValueError: naming the argument and what was received.
    """
    if q.device.type == "cpu" and not INTERPRETED:
        options = {"softmax_scale": softmax_scale, "key_ranges": key_ranges}
        return reference.attention(q, k, v, causal=causal, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **options)
    reference.check_attention(q, k, v, causal, cu_seqlens, max_seqlen, softmax_scale, key_ranges)
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"q: head dim must be one of {HEAD_DIMS}, received {q.shape[-1]} in {tuple(q.shape)}")
    if q.dtype not in DTYPES:
        raise ValueError(f"q: dtype must be one of {DTYPES}, received {q.dtype}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1:
            raise ValueError(f"{name}: the last dimension must be contiguous, received strides {x.stride()}")
    if q.dim() == k.dim():
        q = q.unflatten(-2, (k.shape[-2], -1))
    if q.numel() == 0:
        return q.flatten(-3, -2)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    with torch.cuda.device_of(q):
        if len(q) == 1 and cu_seqlens is None and not causal and not differentiated:
            return _decode(q, k, v, key_ranges, scale)
        return _Attention.apply(q, k, v, causal, cu_seqlens, key_ranges, scale)
