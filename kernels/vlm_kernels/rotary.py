# mypy: allow-untyped-defs
# (the arguments of a Triton kernel have no Python types)
"""Rotary positions of a fused projection in one pass each way, its gradient put together on the way back.

Per token, with cosines c and sines s of its angles, channels i and i + K/2 of every query and key head turn by angle i
(Su et al., arXiv:2104.09864); values stay:

    y_i = c_i x_i - s_i x_{i + K/2}        y_{i + K/2} = c_i x_{i + K/2} + s_i x_i

and the gradient turns back, by -s. Attention could turn queries and keys as it loads them, but every query tile would
turn every key again, in the loop that has the least time to spare.

Memory, in elements per token: E = (H + 2G) K read and written each way. Saved for backward: the table. The attention
gradients of q, k and v lie apart, so that backward is also what joins them.

Shapes: T tokens, H query heads, G key/value heads, K head dim, M = H / G + 2 heads of a group: queries, key, value.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm_kernels import reference

INTERPRETED = triton.knobs.runtime.interpret  # as the decorators below read it
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADS = 16  # that one program turns


@triton.jit
def _table(cos_ptr, sin_ptr, token, head, d, member, MEMBERS: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines [heads, K/2]; a value's angle is 0."""
    cos = tl.load(cos_ptr + token * HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    turned = (member < MEMBERS - 1)[:, None]
    return tl.where(turned, cos, 1.0), tl.where(turned, sin, 0.0)


@triton.jit
def _forward_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr,  # [T, G M, K], [T, K/2] twice, [T, G M, K]
    num_heads, MEMBERS: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK)
    inside = (head < num_heads)[:, None] & (d < HALF)[None, :]
    place = (token * num_heads + head)[:, None] * (2 * HALF) + d[None, :]
    cos, sin = _table(cos_ptr, sin_ptr, token, head, d, head % MEMBERS, MEMBERS, HALF)
    low = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + place + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, low * cos - high * sin, mask=inside)
    tl.store(y_ptr + place + HALF, high * cos + low * sin, mask=inside)


@triton.jit
def _backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, dx_ptr,  # [T, H, K], [T, G, K] twice, [T, K/2] twice, [T, G M, K]
    num_heads, MEMBERS: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK)
    inside = (head < num_heads)[:, None] & (d < HALF)[None, :]
    group, member = head // MEMBERS, head % MEMBERS
    num_groups = num_heads // MEMBERS
    q_place = token * num_groups * (MEMBERS - 2) + group * (MEMBERS - 2) + member
    kv_place = token * num_groups + group
    is_q, is_k = member < MEMBERS - 2, member == MEMBERS - 2
    # The three tensors need not lie near each other: the choice is made on addresses, so that each is loaded once.
    start = tl.where(is_q, dq_ptr + q_place * (2 * HALF), dk_ptr + kv_place * (2 * HALF))
    start = tl.where(is_q | is_k, start, dv_ptr + kv_place * (2 * HALF))
    cos, sin = _table(cos_ptr, sin_ptr, token, head, d, member, MEMBERS, HALF)
    low = tl.load(start[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    high = tl.load(start[:, None] + HALF + d[None, :], mask=inside, other=0.0).to(tl.float32)
    place = (token * num_heads + head)[:, None] * (2 * HALF) + d[None, :]
    tl.store(dx_ptr + place, low * cos + high * sin, mask=inside)
    tl.store(dx_ptr + place + HALF, high * cos - low * sin, mask=inside)


class _RotateHeads(torch.autograd.Function):
    """The kernels as one differentiable operation on a contiguous x [T, G, M, K] and table [2, T, K/2]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.empty_like(x)
        grid, options = _launch(x)
        with torch.cuda.device_of(x):
            _forward_kernel[grid](x, table[0], table[1], y, **options)
        ctx.save_for_backward(table)
        return y[:, :, :-2], y[:, :, -2], y[:, :, -1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        tokens, groups, per_group, head_dim = dq.shape
        dx = dq.new_empty(tokens, groups, per_group + 2, head_dim)
        grid, options = _launch(dx)
        with torch.cuda.device_of(dx):
            _backward_kernel[grid](dq.contiguous(), dk.contiguous(), dv.contiguous(), table[0], table[1], dx, **options)
        return dx, None


def _launch(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    tokens, groups, members, head_dim = x.shape
    heads, half = groups * members, head_dim // 2
    options = {"MEMBERS": members, "HALF": half, "HEADS": HEADS, "BLOCK": triton.next_power_of_2(half)}
    return (tokens, triton.cdiv(heads, HEADS)), {"num_heads": heads, **options, "num_warps": 4}


def rotate_heads(qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of Megatron's fused projection, queries and keys turned by their positions' angles.

    On a CPU this is `reference.rotate_heads`, unless triton was imported with TRITON_INTERPRET=1.

    Args:
        qkv: [.., G, H / G + 2, K] bf16, fp16 or fp32: per group its query heads, its key and its value.
        table: [2, .., K / 2] of the same type, cosines and sines of each token's angles; not differentiated.

    Returns:
        [.., G, H / G, K], [.., G, K] and [.., G, K]: views of one tensor laid out as `qkv`.

    Raises:
        ValueError: naming the argument and what was received.
    """
    reference.check_rotate_heads(qkv, table)
    if qkv.numel() == 0 or (qkv.device.type == "cpu" and not INTERPRETED):
        return reference.rotate_heads(qkv, table)
    if qkv.dtype not in DTYPES:
        raise ValueError(f"qkv: dtype must be one of {DTYPES}, received {qkv.dtype}")
    tokens = qkv.shape[:-3]
    flat = table.reshape(2, -1, table.shape[-1]).contiguous()
    found = _RotateHeads.apply(qkv.reshape(-1, *qkv.shape[-3:]).contiguous(), flat)
    q, k, v = (x.unflatten(0, tokens) for x in found)
    return q, k, v
