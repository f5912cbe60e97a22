"""What lies between the products of a layer, at the sizes of a pretraining micro-batch: bound by the memory it moves.

Shapes: T tokens, D hidden, F MLP, N pictures.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels import reference

T, D, F = 9984, 4096, 14336
CLIP_ROWS, CLIP_F = 16 * 577, 4096
EPS = 1e-5
Forward = tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").to(torch.bfloat16)


def add_rms_norm(provider: str) -> Forward:
    """As in pretraining, the gain is frozen."""
    x, update = leaves = [random(T, D).requires_grad_() for _ in range(2)]
    gain = random(D)
    if provider != "transformer_engine":
        function = vlm_kernels.add_rms_norm if provider == "ours" else reference.add_rms_norm
        return lambda: function(x, update, gain, EPS), leaves
    layer = importlib.import_module("transformer_engine.pytorch").RMSNorm(D, eps=EPS, dtype=x.dtype)
    layer.weight.requires_grad_(False)

    def by_engine() -> tuple[Tensor, Tensor]:
        stream = x + update
        return stream, layer(stream)

    return by_engine, leaves


def swiglu(provider: str) -> Forward:
    x = random(T, 2 * F).requires_grad_()
    if provider == "liger":
        function = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        halves = [half.contiguous().detach().requires_grad_() for half in x.chunk(2, -1)]
        return lambda: (function.apply(*halves),), halves
    ours = vlm_kernels.swiglu if provider == "ours" else reference.swiglu
    return lambda: (ours(x),), [x]


def quick_gelu(provider: str) -> Forward:
    x = random(CLIP_ROWS, CLIP_F).requires_grad_()
    function = vlm_kernels.quick_gelu if provider == "ours" else reference.quick_gelu
    return lambda: (function(x),), [x]


class Operation(NamedTuple):
    """What is measured, and the elements that must be moved forward and both ways."""

    make: Callable[[str], Forward]
    shape: str
    forward: int
    both: int


OPERATIONS = {
    "add_rms_norm": Operation(add_rms_norm, f"T {T}, D {D}, gain frozen", 4 * T * D, 8 * T * D),
    "swiglu": Operation(swiglu, f"T {T}, F {F}", 3 * T * F, 8 * T * F),
    "quick_gelu": Operation(quick_gelu, f"N 16 x 577, F {CLIP_F}", 2 * CLIP_ROWS * CLIP_F, 5 * CLIP_ROWS * CLIP_F),
}
PROVIDERS = {
    "add_rms_norm": ("ours", "transformer_engine", "eager"),
    "swiglu": ("ours", "liger", "eager"),
    "quick_gelu": ("ours", "eager"),
}


@pytest.mark.parametrize("stage", ["forward", "forward + backward"])
@pytest.mark.parametrize(("name", "provider"), [(name, one) for name, several in PROVIDERS.items() for one in several])
def test_elementwise(measure, name, provider, stage):
    operation = OPERATIONS[name]

    def make() -> Callable[[], object]:
        torch.manual_seed(0)
        forward, leaves = operation.make(provider)
        if stage == "forward":
            return forward
        upstream = [torch.randn_like(y) for y in forward()]
        return lambda: torch.autograd.grad(forward(), leaves, upstream)

    measure(
        make,
        provider=provider,
        operation=name,
        shape=operation.shape,
        dtype="bfloat16",
        stage=stage,
        flop=None,
        moved_bytes=2 * (operation.forward if stage == "forward" else operation.both),
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
