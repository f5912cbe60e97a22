# mypy: allow-untyped-defs
# (the arguments of a Triton kernel have no Python types)
"""RMSNorm of a residual stream together with the addition before it, and in backward with the sum of both gradients.

For a row x of the stream, an update u and a gain g (Zhang and Sennrich, arXiv:1910.07467), rounded as s is stored:

    s = x + u        r = 1 / sqrt(mean(s^2) + eps)        y = s r g

and backwards, for the upstream gradients v of s and w of y, with t = w g:

    dx = du = v + r t - s r^3 mean(t s)        dg = sum over rows of w s r

Memory, in elements per row: forward reads 2D and writes 2D (D and D without u); backward reads 3D and writes D. Saved
for backward: s, and r in fp32. Sum and norm by themselves read 3D and write 2D forwards; norm and the sum of gradients
read 4D and write 2D backwards. dg is added up by a fixed number of programs, each over rows of its own, so that it has
the same bits every time.

Shapes: R rows, D columns.
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
GAIN_PROGRAMS = 528  # that share the rows where the gain learns: four for each multiprocessor of an H100 or H200
NUM_WARPS = 8


@triton.jit(do_not_specialize=["eps"])
def _forward_kernel(
    x_ptr, update_ptr, gain_ptr, stream_ptr, y_ptr, r_ptr,  # [R, D] twice, [D], [R, D] twice, [R] fp32
    width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    s = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        s += tl.load(update_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        stored = s.to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + row * width + column, stored, mask=inside)
        s = stored.to(tl.float32)
    r = tl.rsqrt(tl.sum(s * s, 0) / width + eps)
    tl.store(r_ptr + row, r)
    gain = tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + column, s * r * gain, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    stream_ptr, w_ptr, v_ptr, gain_ptr, r_ptr, dx_ptr,  # [R, D] three times, [D], [R] fp32, [R, D]
    dg_ptr,  # [programs, D] fp32
    num_rows, width, PASSED: tl.constexpr, LEARNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PASSED: the stream itself has an upstream gradient, v."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    gain = tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dg = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        offset = tl.cast(row, tl.int64) * width + column
        s = tl.load(stream_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row)
        t = w * gain
        dx = r * t - s * (r * r * r * (tl.sum(t * s, 0) / width))
        if PASSED:
            dx += tl.load(v_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offset, dx, mask=inside)
        if LEARNS:
            dg += w * s * r
    if LEARNS:
        tl.store(dg_ptr + tl.program_id(0).to(tl.int64) * width + column, dg, mask=inside)


class _AddRMSNorm(torch.autograd.Function):
    """The kernels as one differentiable operation on contiguous x and update [R, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rows, width = x.shape
        stream = x if update is None else torch.empty_like(x)
        y, r = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
        with torch.cuda.device_of(x):
            _forward_kernel[(rows,)](
                x, update, gain, stream, y, r, width, eps,
                ADD=update is not None, BLOCK=triton.next_power_of_2(width), num_warps=NUM_WARPS,
            )  # fmt: skip
        ctx.save_for_backward(stream, gain, r)
        ctx.set_materialize_grads(False)
        return stream, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor | None, w: Tensor | None) -> tuple[Tensor | None, ...]:
        stream, gain, r = ctx.saved_tensors
        _, adds, learns, _ = ctx.needs_input_grad
        if w is None:
            return v, v if adds else None, None, None
        rows, width = stream.shape
        programs = min(rows, GAIN_PROGRAMS) if learns else rows
        dx = torch.empty_like(stream)
        dg = r.new_empty(programs, width) if learns else None
        with torch.cuda.device_of(stream):
            _backward_kernel[(programs,)](
                stream, w.contiguous(), None if v is None else v.contiguous(), gain, r, dx, dg, rows, width,
                PASSED=v is not None, LEARNS=learns, BLOCK=triton.next_power_of_2(width), num_warps=NUM_WARPS,
            )  # fmt: skip
        return dx, dx if adds else None, None if dg is None else dg.sum(0).to(gain.dtype), None


def add_rms_norm(x: Tensor, update: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The stream x + update, and its RMSNorm.

    On a CPU this is `reference.add_rms_norm`, unless triton was imported with TRITON_INTERPRET=1.

    Args:
        x: [.., D] bf16, fp16 or fp32.
        update: as x; None to take x as it is.
        gain: [D], as x.
        eps: added to the mean square.

    Returns:
        Two tensors as x. Without an update the first is x.

    Raises:
        ValueError: naming the argument and what was received.
    """
    reference.check_add_rms_norm(x, update, gain)
    if x.numel() == 0 or (x.device.type == "cpu" and not INTERPRETED):
        return reference.add_rms_norm(x, update, gain, eps)
    if x.dtype not in DTYPES:
        raise ValueError(f"x: dtype must be one of {DTYPES}, received {x.dtype}")
    flat = [None if y is None else y.reshape(-1, x.shape[-1]).contiguous() for y in (x, update)]
    stream, y = _AddRMSNorm.apply(*flat, gain.contiguous(), eps)
    return stream.view(x.shape), y.view(x.shape)
