# mypy: allow-untyped-defs
# (the arguments of a Triton kernel have no Python types)
"""SwiGLU in one pass each way, so that neither silu(gate) nor the halves of the gradient are stored and read again.

For a row of fc1's output, gate g and up u side by side (Shazeer, arXiv:2002.05202), with s = sigmoid(g):

    y = g s u        and backwards, for the upstream gradient w,        dg = w u s (1 + g (1 - s))        du = w g s

Memory, in elements per row: forward reads 2F and writes F; backward reads 3F and writes 2F, both halves to their places
in one tensor. Saved for backward: the input. PyTorch's operations read and write 5F and 12F.

Shapes: R rows, F columns of each half.
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
BLOCK = 2048  # columns of a row that one program takes


@triton.jit
def _forward_kernel(x_ptr, y_ptr, width, BLOCK: tl.constexpr):  # [R, 2F], [R, F]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + column, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _backward_kernel(x_ptr, w_ptr, dx_ptr, width, BLOCK: tl.constexpr):  # [R, 2F], [R, F], [R, 2F]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dx_ptr += row * 2 * width + column
    tl.store(dx_ptr, w * up * s * (1.0 + gate * (1.0 - s)), mask=inside)
    tl.store(dx_ptr + width, w * gate * s, mask=inside)


class _SwiGLU(torch.autograd.Function):
    """The kernels as one differentiable operation on a contiguous x [R, 2F]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows, width = len(x), x.shape[1] // 2
        y = x.new_empty(rows, width)
        with torch.cuda.device_of(x):
            _forward_kernel[(rows, triton.cdiv(width, BLOCK))](x, y, width, BLOCK=BLOCK, num_warps=8)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, w: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx, width = torch.empty_like(x), x.shape[1] // 2
        with torch.cuda.device_of(x):
            _backward_kernel[(len(x), triton.cdiv(width, BLOCK))](
                x, w.contiguous(), dx, width, BLOCK=BLOCK, num_warps=8
            )
        return dx


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up.

    On a CPU this is `reference.swiglu`, unless triton was imported with TRITON_INTERPRET=1.

    Args:
        x: [.., 2F] bf16, fp16 or fp32, gate and up side by side.

    Returns:
        [.., F]

    Raises:
        ValueError: naming the argument and what was received.
    """
    reference.check_swiglu(x)
    if x.numel() == 0 or (x.device.type == "cpu" and not INTERPRETED):
        return reference.swiglu(x)
    if x.dtype not in DTYPES:
        raise ValueError(f"x: dtype must be one of {DTYPES}, received {x.dtype}")
    return _SwiGLU.apply(x.reshape(-1, x.shape[-1]).contiguous()).view(*x.shape[:-1], -1)
