# mypy: allow-untyped-defs
# (the arguments of a Triton kernel have no Python types)
"""The language-model head and its loss, so that no [R, V] logits ever reach memory and untrained rows cost nothing.

For row r, target t and vocabulary entry v, with log2 statistics (e = log2 e):

    x_rv = e h_r . w_v      L_r = log2 sum_v 2^x_rv      loss_r = (L_r - x_rt) / e

and backwards, for the upstream gradient g,

    z_rv = g_r (2^(x_rv - L_r) - [v = t])      dh_r = sum_v z_rv w_v      dw_v = sum_r z_rv h_r

Forward: a program keeps a tile of rows and walks a run of vocabulary tiles with a running maximum and sum (Milakov and
Gimelshein, arXiv:1805.02867); a second kernel merges the runs' statistics. Over a tensor-parallel group the maxima
travel in one all-reduce, the sums and the targets' logits in a second one.

Backward computes the logits again, in pieces of at most PIECE_BYTES: a kernel turns a piece into z, and two plain
products take it from there. Those are torch's (cuBLAS): nothing is left to fuse, and dh for a tile of rows does not fit
into registers at D = 4096. They add up in fp32. Pieces are columns where the weight learns, so that each entry of dw is
one complete sum and only dh is carried along, in fp32; they are rows where it does not, and nothing is carried at all.

Memory, in elements: forward reads h (R D) and w (V D, once per band of row tiles) and writes the statistics, 2 R per
run. Saved for backward: h without the ignored rows, w, L. Backward reads them and writes and reads z (R V) piece by
piece. `vocab_parallel_cross_entropy` reads the logits once each way and saves them with L.

Shapes: R rows, D hidden, V vocabulary on this rank, S runs of vocabulary tiles, M row tile, N vocabulary tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm_kernels import reference
from vlm_kernels.product import BAND, PROGRAMS, Tiles, aligned, descriptor, options, product, tile_at

INTERPRETED = triton.knobs.runtime.interpret  # as the decorators below read it
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = math.log(2)
PIECE_BYTES = 64 * 2**20  # of z in backward, not tuned yet: in bf16, 1024 rows of 32768 words are one piece


# By "fp32?". The widest tile whose accumulator (128 registers of a thread) and softmax fit without a spill on sm_90, as
# tests/kernels/test_cross_entropy.py compiles it.
LOGITS = {False: Tiles(128, 256, 64, 8, 3), True: Tiles(32, 32, 32, 4, 2)}
WORDS = 4096  # logits of one row that a program of the plain loss reads at once


# The number of trained rows changes from step to step: neither it nor where a row of statistics then begins may compile
# a kernel anew.
@triton.jit(
    do_not_specialize=["num_rows", "num_words", "num_runs", "run_words", "first_word"],
    do_not_specialize_on_alignment=["picked_ptr", "top_ptr", "total_ptr"],
)
def _statistics_kernel(
    h, w, target_ptr,  # [R, D], [V, D], [R] int64 into the whole vocabulary
    top_ptr, total_ptr, picked_ptr,  # fp32 [S, R], [S, R], [R]
    num_rows, num_words, dim, num_runs, run_words, first_word,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row_tile, run = tile_at(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), num_runs, BAND)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < num_rows
    target = tl.load(target_ptr + row, mask=inside, other=0) - first_word

    low = run * run_words
    high = tl.minimum(low + run_words, num_words)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    picked = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(low, high, BLOCK_N):
        word = first + tl.arange(0, BLOCK_N)
        x = product(h, w, row_tile * BLOCK_M, first, dim, BLOCK_M, BLOCK_N, BLOCK_K) * LOG2_E
        x = tl.where((word < high)[None, :], x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x - new_top[:, None]), 1)
        picked += tl.sum(tl.where(word[None, :] == target[:, None], x, 0.0), 1)
        top = new_top
    place = run.to(tl.int64) * num_rows + row
    tl.store(top_ptr + place, top, mask=inside)
    tl.store(total_ptr + place, total, mask=inside)
    tl.store(picked_ptr + row, picked, mask=inside & (target >= low) & (target < high))


@triton.jit(
    do_not_specialize=["num_rows", "num_runs"],
    do_not_specialize_on_alignment=["top_ptr", "total_ptr", "merged_top_ptr", "merged_total_ptr"],
)
def _merge_kernel(
    top_ptr, total_ptr,  # fp32 [S, R] of the runs
    merged_top_ptr, merged_total_ptr,  # fp32 [R]
    num_rows, num_runs,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for run in tl.range(0, num_runs):
        place = tl.cast(run, tl.int64) * num_rows + row
        run_top = tl.load(top_ptr + place, mask=inside, other=0.0)
        new_top = tl.maximum(top, run_top)
        run_total = tl.load(total_ptr + place, mask=inside, other=0.0)
        total = total * tl.exp2(top - new_top) + run_total * tl.exp2(run_top - new_top)
        top = new_top
    tl.store(merged_top_ptr + row, top, mask=inside)
    tl.store(merged_total_ptr + row, total, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "first_word"])
def _logit_gradient_kernel(
    h, w, target_ptr, lse_ptr, g_ptr,  # [R, D], [V, D], [R] int64, [R] fp32 (log2), [R] fp32
    z_out,  # [R, V]
    num_rows, num_words, dim, first_word,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    word_tiles = tl.cdiv(num_words, BLOCK_N)
    for index in tl.range(tl.program_id(0), row_tiles * word_tiles, PROGRAMS, flatten=True):
        row_tile, word_tile = tile_at(index, row_tiles, word_tiles, BAND)
        x = product(h, w, row_tile * BLOCK_M, word_tile * BLOCK_N, dim, BLOCK_M, BLOCK_N, BLOCK_K) * LOG2_E
        row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        word = word_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = row < num_rows
        target = tl.load(target_ptr + row, mask=inside, other=0) - first_word
        lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
        g = tl.load(g_ptr + row, mask=inside, other=0.0)
        p = tl.exp2(x - lse[:, None])
        z = g[:, None] * tl.where(word[None, :] == target[:, None], p - 1.0, p)
        z_out.store([row_tile * BLOCK_M, word_tile * BLOCK_N], z.to(z_out.dtype))


@triton.jit(do_not_specialize=["first_word", "ignored"])
def _row_statistics_kernel(
    x_ptr, target_ptr,  # [R, V], [R] int64
    top_ptr, total_ptr, picked_ptr,  # fp32 [R] each; left at 0, 1, 0 for an ignored row, which is not read
    num_words, stride_x, first_word, ignored,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    if target == ignored:
        return
    column = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, num_words, BLOCK):
        word = first + column
        x = tl.load(x_ptr + row * stride_x + word, mask=word < num_words, other=float("-inf")).to(tl.float32) * LOG2_E
        # A lane may have seen nothing but -inf so far: its exponents must not become -inf - (-inf) = nan.
        new_top = tl.maximum(top, x)
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - anchor) + tl.exp2(x - anchor)
        top = new_top
    row_top = tl.max(top, 0)
    tl.store(top_ptr + row, row_top)
    tl.store(total_ptr + row, tl.sum(total * tl.exp2(top - row_top), 0))
    local = target - first_word
    mine = (local >= 0) & (local < num_words)
    picked = tl.load(x_ptr + row * stride_x + local, mask=mine, other=0.0).to(tl.float32) * LOG2_E
    tl.store(picked_ptr + row, picked)


@triton.jit(do_not_specialize=["first_word", "ignored"])
def _row_gradient_kernel(
    x_ptr, target_ptr, lse_ptr, g_ptr,  # [R, V], [R] int64, [R] fp32 (log2), [R] fp32
    z_ptr,  # [R, V], contiguous
    num_words, stride_x, first_word, ignored,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = word < num_words
    target = tl.load(target_ptr + row)
    z = tl.zeros([BLOCK], tl.float32)
    if target != ignored:
        x = tl.load(x_ptr + row * stride_x + word, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        p = tl.exp2(x - tl.load(lse_ptr + row))
        z = tl.load(g_ptr + row) * tl.where(word == target - first_word, p - 1.0, p)
    tl.store(z_ptr + row * num_words + word, z.to(z_ptr.dtype.element_ty), mask=inside)


def _first_word(width: int, group: Any) -> int:
    return group.rank() * width if group is not None else 0


def _combine(statistics: Tensor, width: int, group: Any) -> tuple[Tensor, Tensor]:
    """Loss and L, float32 [R], from statistics [3, R]: maximum, sum and the target's x, all of this rank's slice."""
    top, sums = statistics[0], statistics[1:]
    if group is not None and group.size() > 1:
        highest = reference.reduce_maxima(top, width, group)
        sums[0] *= torch.exp2(top - highest)
        torch.distributed.all_reduce(sums, group=group)
        top = highest
    log_sum = sums[0].log2()
    # In this order a target that is the maximum loses no digits.
    return (top - sums[1] + log_sum) * LN_2, top + log_sum


class _LinearCrossEntropy(torch.autograd.Function):
    """Head and loss as one differentiable operation; its caller has checked the arguments."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, group: Any, ignore_index: int, num_kept: int
    ) -> Tensor:
        num_rows = len(hidden)
        kept = None
        if num_kept < num_rows:
            # The kept rows in order, without asking the device how many: that is known.
            kept = torch.nonzero_static(target != ignore_index, size=num_kept).squeeze(1)
            hidden, target = hidden.index_select(0, kept), target.index_select(0, kept)
        ctx.group, ctx.num_rows = group, num_rows
        if not num_kept:
            ctx.save_for_backward(hidden, weight, target, None, None)
            return hidden.new_zeros(num_rows, dtype=torch.float32)
        statistics = _statistics(hidden, weight, target, _first_word(len(weight), group))
        loss, lse = _combine(statistics, len(weight), group)
        ctx.save_for_backward(hidden, weight, target, kept, lse)
        return loss if kept is None else loss.new_zeros(num_rows).index_copy_(0, kept, loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, kept, lse = ctx.saved_tensors
        need_h, need_w = ctx.needs_input_grad[:2]
        if not len(hidden):
            dh = hidden.new_zeros(ctx.num_rows, hidden.shape[1]) if need_h else None
            return dh, torch.zeros_like(weight) if need_w else None, None, None, None, None
        g = g.contiguous() if kept is None else g.index_select(0, kept)
        dh, dw = _gradients(hidden, weight, target, lse, g, _first_word(len(weight), ctx.group), need_h, need_w)
        if dh is not None:
            if ctx.group is not None and ctx.group.size() > 1:
                torch.distributed.all_reduce(dh, group=ctx.group)
            if kept is not None:
                dh = dh.new_zeros(ctx.num_rows, dh.shape[1]).index_copy_(0, kept, dh)
        return dh, dw, None, None, None, None


def _statistics(hidden: Tensor, weight: Tensor, target: Tensor, first_word: int) -> Tensor:
    """[3, R] fp32: maximum and sum of the slice's 2^x, and the target's x where the slice holds it, else 0."""
    (num_rows, dim), num_words = hidden.shape, len(weight)
    tiles = LOGITS[hidden.dtype == torch.float32]
    row_tiles, word_tiles = triton.cdiv(num_rows, tiles.block_m), triton.cdiv(num_words, tiles.block_n)
    # Each program takes a run of words for its row tile. The runs of one band of row tiles fill the GPU once.
    run_words = tiles.block_n * triton.cdiv(word_tiles, max(PROGRAMS // min(row_tiles, BAND), 1))
    num_runs = triton.cdiv(num_words, run_words)
    out = hidden.new_zeros(3, num_rows, dtype=torch.float32)
    top, total = out.new_empty(2, num_runs, num_rows).unbind()
    with torch.cuda.device_of(hidden):
        _statistics_kernel[(row_tiles * num_runs,)](
            descriptor(hidden, tiles.block_m, tiles.block_k), descriptor(weight, tiles.block_n, tiles.block_k),
            target, top, total, out[2], num_rows, num_words, dim, num_runs, run_words, first_word, **options(tiles),
        )  # fmt: skip
        _merge_kernel[(triton.cdiv(num_rows, 128),)](
            top, total, out[0], out[1], num_rows, num_runs, BLOCK=128, num_warps=4
        )
    return out


def _gradients(
    hidden: Tensor, weight: Tensor, target: Tensor, lse: Tensor, g: Tensor, first_word: int, need_h: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dh [R, D] (this rank's share) and dw [V, D], each in its tensor's type or None."""
    (num_rows, dim), num_words = hidden.shape, len(weight)
    tiles = LOGITS[hidden.dtype == torch.float32]
    pieces = list(_pieces(num_rows, num_words, hidden.element_size(), tiles, by_word=need_w))
    dh = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_h else None
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_w else None
    carried = hidden.new_zeros(hidden.shape, dtype=torch.float32) if need_h and need_w and len(pieces) > 1 else None
    for rows, words in pieces:
        h, w, t = hidden[rows], weight[words], target[rows]
        z = aligned(h, len(w))
        grid = (min(PROGRAMS, triton.cdiv(len(h), tiles.block_m) * triton.cdiv(len(w), tiles.block_n)),)
        with torch.cuda.device_of(hidden):
            _logit_gradient_kernel[grid](
                descriptor(h, tiles.block_m, tiles.block_k), descriptor(w, tiles.block_n, tiles.block_k),
                t, lse[rows], g[rows], descriptor(z, tiles.block_m, tiles.block_n),
                len(h), len(w), dim, first_word + words.start, PROGRAMS=PROGRAMS, **options(tiles),
            )  # fmt: skip
        if dw is not None:
            torch.mm(z.T, h, out=dw[words])
        if carried is not None:
            _add_product(carried, z, w)
        elif dh is not None:
            torch.mm(z, w, out=dh[rows])
    return (carried.to(hidden.dtype) if carried is not None else dh), dw


def _pieces(
    num_rows: int, num_words: int, element_size: int, tiles: Tiles, by_word: bool
) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and words that cover [R, V], each of whole tiles and at most PIECE_BYTES (or one row of tiles)."""
    whole, split, tile = (num_rows, num_words, tiles.block_n) if by_word else (num_words, num_rows, tiles.block_m)
    step = max(PIECE_BYTES // (element_size * whole * tile), 1) * tile
    for low in range(0, split, step):
        part = slice(low, min(low + step, split))
        yield (slice(0, num_rows), part) if by_word else (part, slice(0, num_words))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, float32 throughout though a and b may be narrower."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.float(), b.float())


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """The loss of given logits; its caller has checked the arguments."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: Any, ignore_index: int) -> Tensor:
        num_rows, num_words = logits.shape
        first_word = _first_word(num_words, group)
        statistics = logits.new_zeros(3, num_rows, dtype=torch.float32)
        statistics[1] = 1.0
        with torch.cuda.device_of(logits):
            _row_statistics_kernel[(num_rows,)](
                logits, target, *statistics.unbind(), num_words, logits.stride(0), first_word, ignore_index,
                BLOCK=WORDS, num_warps=8,
            )  # fmt: skip
        loss, lse = _combine(statistics, num_words, group)
        ctx.save_for_backward(logits, target, lse)
        ctx.first_word, ctx.ignore_index = first_word, ignore_index
        return loss.masked_fill_(target == ignore_index, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, lse = ctx.saved_tensors
        num_rows, num_words = logits.shape
        z = torch.empty_like(logits, memory_format=torch.contiguous_format)
        with torch.cuda.device_of(logits):
            _row_gradient_kernel[(num_rows, triton.cdiv(num_words, WORDS))](
                logits, target, lse, g.contiguous(), z, num_words, logits.stride(0), ctx.first_word, ctx.ignore_index,
                BLOCK=WORDS, num_warps=8,
            )  # fmt: skip
        return z, None, None, None


def _check_layout(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise ValueError(f"{name}: dtype must be one of {DTYPES}, received {x.dtype}")
        if x.stride(-1) != 1:
            raise ValueError(f"{name}: the last dimension must be contiguous, received strides {x.stride()}")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, group: Any = None, ignore_index: int = -100
) -> Tensor:
    """Loss of the language-model head, logsumexp(h W^T) - (h W^T)[target], row by row; logits are never stored.

    On a CPU this is `reference.linear_cross_entropy`, unless triton was imported with TRITON_INTERPRET=1.

    Args:
        hidden: [R, D] bf16, fp16 or fp32, equal on all ranks of `group`; so is its gradient. Last dimension contiguous.
        weight: [V, D] of the same type, this rank's slice of the vocabulary, in rank order.
        target: int64 [R], indices into the whole vocabulary; `ignore_index` rows give 0 and no gradient, and are
            never multiplied. How many those are, and that the others lie in the vocabulary, is looked at once per
            tensor, which on a GPU waits for the device.
        group: tensor-parallel process group, None for one rank. Its ranks hold slices of one width.

    Returns:
        float32 [R].

    Raises:
        ValueError: naming the argument and what was received; also for a target outside the vocabulary.
    """
    num_kept = reference.check_linear_cross_entropy(hidden, weight, target, group, ignore_index)
    if hidden.device.type == "cpu" and not INTERPRETED:
        return reference.linear_cross_entropy(hidden, weight, target, group=group, ignore_index=ignore_index)
    _check_layout(hidden=hidden, weight=weight)
    return _LinearCrossEntropy.apply(hidden, weight, target.contiguous(), group, ignore_index, num_kept)


def vocab_parallel_cross_entropy(
    logits: Tensor, target: Tensor, *, group: Any = None, ignore_index: int = -100
) -> Tensor:
    """Cross-entropy from logits whose vocabulary is split over `group`.

    On a CPU this is `reference.vocab_parallel_cross_entropy`, unless triton was imported with TRITON_INTERPRET=1.

    Args:
        logits: [R, V] bf16, fp16 or fp32, this rank's slice, last dimension contiguous. Kept, not modified.
        target: int64 [R], indices into the whole vocabulary; `ignore_index` rows give 0 and no gradient, and are not
            read. Looked at once per tensor, as in `linear_cross_entropy`.
        group: tensor-parallel process group, None for one rank. Its ranks hold slices of one width.

    Returns:
        float32 [R], equal on all ranks.

    Raises:
        ValueError: naming the argument and what was received; also for a target outside the vocabulary.
    """
    reference.check_vocab_parallel_cross_entropy(logits, target, group, ignore_index)
    if logits.device.type == "cpu" and not INTERPRETED:
        return reference.vocab_parallel_cross_entropy(logits, target, group=group, ignore_index=ignore_index)
    _check_layout(logits=logits)
    if not len(logits):
        return logits.sum(1, dtype=torch.float32)
    return _VocabParallelCrossEntropy.apply(logits, target.contiguous(), group, ignore_index)
