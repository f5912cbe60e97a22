# mypy: allow-untyped-defs
# (the arguments of a Triton kernel have no Python types)
"""CLIP's activation in one pass each way: y = x s with s = sigmoid(1.702 x), and dx = w s (1 + 1.702 x (1 - s)).

Memory, in elements: forward reads and writes N; backward reads 2N and writes N. Saved for backward: x. PyTorch's three
operations read 4N and write 3N forwards.
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
BLOCK = 4096  # elements that one program takes, 16 bytes at once if x has a multiple of 16 of them


@triton.jit
def _forward_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < count, other=0.0).to(tl.float32)
    tl.store(y_ptr + index, x * tl.sigmoid(1.702 * x), mask=index < count)


@triton.jit
def _backward_kernel(x_ptr, w_ptr, dx_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < count, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + index, mask=index < count, other=0.0).to(tl.float32)
    s = tl.sigmoid(1.702 * x)
    tl.store(dx_ptr + index, w * s * (1.0 + 1.702 * x * (1.0 - s)), mask=index < count)


class _QuickGELU(torch.autograd.Function):
    """The kernels as one differentiable operation on a contiguous x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        with torch.cuda.device_of(x):
            _forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK, num_warps=8)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, w: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        with torch.cuda.device_of(x):
            _backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x, w.contiguous(), dx, x.numel(), BLOCK=BLOCK, num_warps=8
            )
        return dx


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), element by element, of bf16, fp16 or fp32.

    On a CPU this is `reference.quick_gelu`, unless triton was imported with TRITON_INTERPRET=1.

    Raises:
        ValueError: another type.
    """
    if x.numel() == 0 or (x.device.type == "cpu" and not INTERPRETED):
        return reference.quick_gelu(x)
    if x.dtype not in DTYPES:
        raise ValueError(f"x: dtype must be one of {DTYPES}, received {x.dtype}")
    return _QuickGELU.apply(x.contiguous())
