# mypy: allow-untyped-defs
# (the arguments of a Triton kernel have no Python types)
"""The language-model head and its loss, so that no [R, V] logits stay in memory and untrained rows cost nothing.

For row r, target t and vocabulary entry v, with log2 statistics (e = log2 e):

    x_rv = e h_r . w_v      L_r = log2 sum_v 2^x_rv      loss_r = (L_r - x_rt) / e

and backwards, for the upstream gradient g,

    z_rv = g_r (2^(x_rv - L_r) - [v = t])      dh_r = sum_v z_rv w_v      dw_v = sum_r z_rv h_r

The gradients are computed with the loss, for g = 1, piece by piece: the logits of some rows (a plain product, which
torch's cuBLAS computes as fast as the chip allows), their statistics, z in place of them, and from z two more plain
products. Backward multiplies dh by g row by row, and dw by the one number that all g are where the losses are summed.
Where they are weighted row by row and the weight learns, all is computed once more; but where one piece holds all rows,
z is kept instead of dw, and takes any g. So there are three products, where computing the logits again backwards takes
four. Over a tensor-parallel group a piece's maxima travel in one all-reduce, its sums and its targets' logits in a
second one.

A piece has PIECE_BYTES. Where the weight learns it may be a quarter of the logits, since dw adds up over pieces in its
own type: four roundings instead of one.

Memory, in elements: per piece of P rows, P V written and read by the products, read and written once in between.
Saved for backward: dh without the ignored rows, dw or z, and for a second backward h, w and the targets.
`vocab_parallel_cross_entropy` reads given logits once each way and saves them with L.

Shapes: R rows, D hidden, V vocabulary on this rank, P rows of a piece.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm_kernels import reference

INTERPRETED = triton.knobs.runtime.interpret  # as the decorators below read it
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = math.log(2)
PIECE_BYTES = 128 * 2**20  # in bf16, 2048 rows of 32768 words: what cuBLAS multiplies as fast as all rows together
MOST_PIECES = 4  # that add up in dw


NONE_IGNORED = -(2**31)  # where ignored rows were left out before
WORDS = 4096  # logits of one row that a program of the plain loss reads at once


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


@triton.jit
def _row_kernel(
    x_ptr, target_ptr, g_ptr,  # [R, V], in whose place z is written, [R] int64, [R] fp32
    loss_ptr,  # fp32 [R]
    num_words, stride_x,
    BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Where one rank has the whole vocabulary: a row's statistics, then z, for which the L2 cache still has the row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    x_ptr += row * stride_x
    # Before the sums below, at which all threads meet: z takes its place afterwards.
    picked = tl.load(x_ptr + target).to(tl.float32) * LOG2_E
    column = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, num_words, BLOCK):
        word = first + column
        x = tl.load(x_ptr + word, mask=word < num_words, other=float("-inf")).to(tl.float32) * LOG2_E
        new_top = tl.maximum(top, x)
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - anchor) + tl.exp2(x - anchor)
        top = new_top
    row_top = tl.max(top, 0)
    log_sum = tl.log2(tl.sum(total * tl.exp2(top - row_top), 0))
    tl.store(loss_ptr + row, (row_top - picked + log_sum) / LOG2_E)
    if GRADIENT:
        g = tl.load(g_ptr + row)
        for first in tl.range(0, num_words, BLOCK):
            word = first + column
            x = tl.load(x_ptr + word, mask=word < num_words, other=0.0).to(tl.float32) * LOG2_E
            p = tl.exp2(x - (row_top + log_sum))
            z = g * tl.where(word == target, p - 1.0, p)
            tl.store(x_ptr + word, z.to(x_ptr.dtype.element_ty), mask=word < num_words)


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
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        group: Any,
        ignore_index: int,
        num_kept: int,
        differentiated: bool,
    ) -> Tensor:
        num_rows = len(hidden)
        kept = None
        if num_kept < num_rows:
            # The kept rows in order, without asking the device how many: that is known.
            kept = torch.nonzero_static(target != ignore_index, size=num_kept).squeeze(1)
            hidden, target = hidden.index_select(0, kept), target.index_select(0, kept)
        ctx.group, ctx.num_rows = group, num_rows
        needed = [differentiated and need for need in ctx.needs_input_grad[:2]]
        loss, ctx.found = _loss_and_gradients(hidden, weight, target, group, None, *needed)
        ctx.save_for_backward(hidden, weight, target, kept)
        return loss if kept is None else loss.new_zeros(num_rows).index_copy_(0, kept, loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, kept = ctx.saved_tensors
        # What a sum hands down is one number, laid out as many; autograd is the one that does so.
        summed = len(g) > 0 and g.stride(0) == 0
        scale = g[:1].contiguous() if summed else None
        g = g.contiguous() if kept is None else g.index_select(0, kept)
        # In place and only once, which a second backward of the same graph would find multiplied already.
        found, ctx.found = ctx.found, None
        if found is None or (found.dw is not None and scale is None):
            needed = ctx.needs_input_grad[:2]
            _, found = _loss_and_gradients(hidden, weight, target, ctx.group, g, *needed)
            g, scale = None, None
        dh, dw = found.dh, found.dw
        if dh is not None and g is not None:
            dh.mul_(g.unsqueeze(1))
        if found.z is not None:
            dw = torch.mm(found.z.T, hidden if g is None else hidden * g.unsqueeze(1).to(hidden.dtype))
        elif dw is not None and scale is not None:
            dw.mul_(scale)
        if dh is not None:
            if ctx.group is not None and ctx.group.size() > 1:
                torch.distributed.all_reduce(dh, group=ctx.group)
            if kept is not None:
                dh = dh.new_zeros(ctx.num_rows, dh.shape[1]).index_copy_(0, kept, dh)
        return dh, dw, None, None, None, None, None


class _Found(NamedTuple):
    """Gradients that the forward pass found; of the weight's, where all rows were one piece, z [R, V] instead."""

    dh: Tensor | None
    dw: Tensor | None
    z: Tensor | None


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, target: Tensor, group: Any, g: Tensor | None, need_h: bool, need_w: bool
) -> tuple[Tensor, _Found]:
    """Losses, fp32 [R], and for g (None: ones) dh [R, D] (this rank's share) and dw [V, D], where they are needed."""
    num_rows, num_words = len(hidden), len(weight)
    losses = hidden.new_empty(num_rows, dtype=torch.float32)
    g = torch.ones_like(losses) if g is None else g
    step = max(PIECE_BYTES // (hidden.element_size() * num_words), 1)
    if need_w:
        step = max(step, triton.cdiv(num_rows, MOST_PIECES))
    dh = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_h else None
    whole = need_w and num_rows <= step
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_w and not whole else None
    x = hidden.new_empty(min(step, num_rows), num_words)
    for low in range(0, num_rows, step):
        rows = slice(low, min(low + step, num_rows))
        h, t, x = hidden[rows], target[rows], x[: rows.stop - low]
        torch.mm(h, weight.T, out=x)
        _loss_of_piece(x, t, g[rows], losses[rows], group, need_h or need_w)
        if dh is not None:
            torch.mm(x, weight, out=dh[rows])
        if dw is not None:
            torch.addmm(dw, x.T, h, beta=float(low > 0), out=dw)
    return losses, _Found(dh, dw, x if whole else None)


def _loss_of_piece(logits: Tensor, target: Tensor, g: Tensor, losses: Tensor, group: Any, gradient: bool) -> None:
    """Losses of the rows of [R, V] logits, whose place z takes if `gradient`."""
    if group is None or group.size() == 1:
        with torch.cuda.device_of(logits):
            _row_kernel[(len(logits),)](
                logits, target, g, losses, logits.shape[1], logits.stride(0), BLOCK=WORDS, GRADIENT=gradient,
                num_warps=8,
            )  # fmt: skip
        return
    losses[:], lse = _losses(logits, target, group, NONE_IGNORED)
    if gradient:
        _gradient_of_logits(logits, target, lse, g, logits, _first_word(logits.shape[1], group), NONE_IGNORED)


def _losses(logits: Tensor, target: Tensor, group: Any, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Loss and L, fp32 [R], of a slice of logits [R, V]; ignored rows, which are not read, give anything finite."""
    num_rows, num_words = logits.shape
    statistics = logits.new_zeros(3, num_rows, dtype=torch.float32)
    statistics[1] = 1.0
    with torch.cuda.device_of(logits):
        _row_statistics_kernel[(num_rows,)](
            logits, target, *statistics.unbind(), num_words, logits.stride(0), _first_word(num_words, group),
            ignore_index, BLOCK=WORDS, num_warps=8,
        )  # fmt: skip
    return _combine(statistics, num_words, group)


def _gradient_of_logits(
    logits: Tensor, target: Tensor, lse: Tensor, g: Tensor, z: Tensor, first_word: int, ignore_index: int
) -> None:
    """z [R, V], contiguous; it may be `logits` itself, since every entry is read once, by who then writes it."""
    num_rows, num_words = logits.shape
    with torch.cuda.device_of(logits):
        _row_gradient_kernel[(num_rows, triton.cdiv(num_words, WORDS))](
            logits, target, lse, g, z, num_words, logits.stride(0), first_word, ignore_index,
            BLOCK=WORDS, num_warps=8,
        )  # fmt: skip


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """The loss of given logits; its caller has checked the arguments."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: Any, ignore_index: int) -> Tensor:
        loss, lse = _losses(logits, target, group, ignore_index)
        ctx.save_for_backward(logits, target, lse)
        ctx.first_word, ctx.ignore_index = _first_word(logits.shape[1], group), ignore_index
        return loss.masked_fill_(target == ignore_index, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, lse = ctx.saved_tensors
        z = torch.empty_like(logits, memory_format=torch.contiguous_format)
        _gradient_of_logits(logits, target, lse, g.contiguous(), z, ctx.first_word, ctx.ignore_index)
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
    """Loss of the language-model head, logsumexp(h W^T) - (h W^T)[target], row by row, never storing the logits.

    On a CPU this is `reference.linear_cross_entropy`, unless triton was imported with TRITON_INTERPRET=1.

    Args:
        hidden: [R, D] bf16, fp16 or fp32, equal on all ranks of `group`; so is its gradient. Last dimension contiguous.
        weight: [V, D] of the same type, this rank's slice of the vocabulary, in rank order.
        target: int64 [R], indices into the whole vocabulary; `ignore_index` rows give 0 and no gradient, and are
            never multiplied. How many those are, and that the others lie in the vocabulary, is looked at once per
            tensor, which on a GPU waits for the device unless they are `known_on_host`.
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
    differentiated = torch.is_grad_enabled()  # inside the Function it never is
    return _LinearCrossEntropy.apply(hidden, weight, target.contiguous(), group, ignore_index, num_kept, differentiated)


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
