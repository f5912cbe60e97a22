"""What lies between the products of a layer, at the sizes of a pretraining micro-batch: bound by the memory it moves.

Shapes: T tokens, D hidden, F MLP, N pictures.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels import reference

T, D, F = 9984, 4096, 14336
CLIP_ROWS, CLIP_F = 16 * 577, 4096
EPS = 1e-5
STAGES = pytest.mark.parametrize("stage", ["forward", "forward + backward"])


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def build(stage: str, forward: Callable[[], tuple[Tensor, ...]], leaves: list[Tensor]) -> Callable[[], object]:
    """The call of a stage, with an upstream gradient for each output."""
    if stage == "forward":
        return forward
    upstream = [torch.randn_like(y) for y in forward()]
    return lambda: torch.autograd.grad(forward(), leaves, upstream)


@STAGES
@pytest.mark.parametrize("provider", ["ours", "transformer_engine", "eager"])
def test_add_rms_norm(measure, provider, stage):
    """As in pretraining, the gain is frozen."""

    def make():
        torch.manual_seed(0)
        x, update = (random(T, D).requires_grad_() for _ in range(2))
        gain = random(D)
        if provider == "ours":
            return build(stage, lambda: vlm_kernels.add_rms_norm(x, update, gain, EPS), [x, update])
        if provider == "eager":
            return build(stage, lambda: reference.add_rms_norm(x, update, gain, EPS), [x, update])
        layer = importlib.import_module("transformer_engine.pytorch").RMSNorm(D, eps=EPS, dtype=x.dtype)
        layer.weight.requires_grad_(False)

        def by_engine():
            stream = x + update
            return stream, layer(stream)

        return build(stage, by_engine, [x, update])

    measure(
        make,
        provider=provider,
        operation="add_rms_norm",
        shape=f"T {T}, D {D}, gain frozen",
        dtype="bfloat16",
        stage=stage,
        flop=None,
        moved_bytes=2 * T * D * (4 if stage == "forward" else 8),
    )


@STAGES
@pytest.mark.parametrize("provider", ["ours", "liger", "eager"])
def test_swiglu(measure, provider, stage):
    def make():
        torch.manual_seed(0)
        x = random(T, 2 * F).requires_grad_()
        if provider == "liger":
            function = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
            halves = [half.contiguous().detach().requires_grad_() for half in x.chunk(2, -1)]
            return build(stage, lambda: (function.apply(*halves),), halves)
        swiglu = vlm_kernels.swiglu if provider == "ours" else reference.swiglu
        return build(stage, lambda: (swiglu(x),), [x])

    measure(
        make,
        provider=provider,
        operation="swiglu",
        shape=f"T {T}, F {F}",
        dtype="bfloat16",
        stage=stage,
        flop=None,
        moved_bytes=2 * T * F * (3 if stage == "forward" else 8),
    )


@STAGES
@pytest.mark.parametrize("provider", ["ours", "eager"])
def test_quick_gelu(measure, provider, stage):
    def make():
        torch.manual_seed(0)
        x = random(CLIP_ROWS, CLIP_F).requires_grad_()
        quick_gelu = vlm_kernels.quick_gelu if provider == "ours" else reference.quick_gelu
        return build(stage, lambda: (quick_gelu(x),), [x])

    measure(
        make,
        provider=provider,
        operation="quick_gelu",
        shape=f"N 16 x 577, F {CLIP_F}",
        dtype="bfloat16",
        stage=stage,
        flop=None,
        moved_bytes=2 * CLIP_ROWS * CLIP_F * (2 if stage == "forward" else 5),
    )


CASES: dict[str, tuple[Callable[..., object], Callable[..., object], list[tuple[int, ...]]]] = {
    "add_rms_norm": (vlm_kernels.add_rms_norm, reference.add_rms_norm, [(700, D), (700, D), (D,)]),
    "rms_norm": (
        lambda x, gain, eps: vlm_kernels.add_rms_norm(x, None, gain, eps)[1],
        lambda x, gain, eps: reference.add_rms_norm(x, None, gain, eps)[1],
        [(700, 576), (576,)],
    ),
    "swiglu": (lambda x, _: vlm_kernels.swiglu(x), lambda x, _: reference.swiglu(x), [(300, 2 * 1000)]),
    "quick_gelu": (lambda x, _: vlm_kernels.quick_gelu(x), lambda x, _: reference.quick_gelu(x), [(300, 1001)]),
}


@pytest.mark.parametrize("name", CASES)
def test_error(name):
    """Twice the error of plain PyTorch in bf16, and the same bits twice."""
    ours, plain, shapes = CASES[name]
    torch.manual_seed(0)
    inputs = [random(*shape) for shape in shapes]

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves, EPS)
        out = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(1)
        upstream = [random(*y.shape).to(dtype) for y in out]
        return [*(y.detach() for y in out), *torch.autograd.grad(out, leaves, upstream)]

    exact, other = run(plain, torch.float64), run(plain, torch.bfloat16)
    found, again = run(ours, torch.bfloat16), run(ours, torch.bfloat16)
    for mine, truth, eager in zip(found, exact, other, strict=True):
        ulps = 4 * torch.finfo(mine.dtype).eps * truth.abs().max()
        assert (mine - truth).abs().max() <= 2 * (eager - truth).abs().max() + ulps
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
