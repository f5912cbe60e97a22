"""Rotary positions and SwiGLU, in Triton's interpreter, against their formulas written out in fp64.

Outputs and gradients (of random upstream gradients) may be twice as far from the fp64 result as the same formula
evaluated in the tensors' own type, plus four units in the last place of the largest value.
"""

from __future__ import annotations

import sys

import aot
import pytest
import torch

from vlm_kernels import reference, rotary
from vlm_kernels import swiglu as swiglu_function
from vlm_kernels.rotary import rotate_heads

SWIGLU = sys.modules["vlm_kernels.swiglu"]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def random(*shape, dtype=FP32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def results(call, x, dtype=None):
    """Outputs, and the gradient of a random weighting of all of them."""
    leaf = x.detach().to(dtype or x.dtype).requires_grad_()
    out = call(leaf)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [random(*one.shape, seed=9 + i).to(one.dtype) for i, one in enumerate(out)]
    return [*(one.detach() for one in out), *torch.autograd.grad(out, leaf, upstream)]


def compare(got, oracle, x):
    for mine, truth, plain in zip(got, results(oracle, x, torch.float64), results(oracle, x), strict=True):
        assert mine.shape == truth.shape and mine.dtype == x.dtype
        ulps = 4 * torch.finfo(mine.dtype).eps * truth.abs().max().item()
        bound = 2 * (plain - truth).abs().max().item() + ulps
        error = (mine - truth).abs().max().item()
        assert error <= bound, f"error {error:.3g}, allowed {bound:.3g}"


def turned(table):
    """Each pair of channels as a complex number times e^(i angle)."""

    def run(qkv):
        cos, sin = (part[..., None, None, :].to(qkv.dtype) for part in table)
        low, high = qkv.chunk(2, dim=-1)
        both = torch.cat([low * cos - high * sin, low * sin + high * cos], -1)
        return both[..., :-2, :], both[..., -2, :], qkv[..., -1, :]

    return run


def table_of(*tokens, head_dim, dtype=FP32):
    angles = random(*tokens, head_dim // 2, seed=5) * 3
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("tokens", "groups", "per_group", "head_dim", "dtype"),
    [
        pytest.param((7, 2), 2, 4, 128, FP32, id="mistral's-heads:12-of-16"),
        pytest.param((9, 1), 8, 4, 64, FP32, id="three-programs-a-token"),
        pytest.param((3,), 3, 1, 20, FP32, id="packed:half-of-10-channels,-one-query-a-group"),
        pytest.param((5, 2), 2, 4, 64, BF16, id="bf16"),
        pytest.param((5, 2), 2, 2, 64, FP16, id="fp16"),
    ],
)
def test_rotate_heads(tokens, groups, per_group, head_dim, dtype):
    qkv = random(*tokens, groups, per_group + 2, head_dim, dtype=dtype)
    table = table_of(*tokens, head_dim=head_dim, dtype=dtype)
    compare(results(lambda x: rotate_heads(x, table), qkv), turned(table), qkv)


@pytest.mark.interpreted
def test_rotated_heads_lie_as_in_the_projection_and_the_projection_is_left_alone():
    """Attention reads them in place; gradients that come in other layouts are read rightly too."""
    qkv, table = random(6, 2, 2, 5, 64), table_of(6, 2, head_dim=64)
    before = qkv.clone()
    q, k, v = rotate_heads(qkv, table)
    assert torch.equal(qkv, before)
    assert q.stride() == qkv.stride() and k.data_ptr() == q.data_ptr() + 3 * 64 * 4 and v.stride() == k.stride()
    wide = qkv.repeat_interleave(2, 0)[::2].requires_grad_()
    assert not wide.is_contiguous()
    q, k, v = rotate_heads(wide, table)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), rotate_heads(qkv, table), strict=True))
    upstream = [random(*x.shape).transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    (mine,) = torch.autograd.grad((q, k, v), wide, upstream)
    plain = qkv.clone().requires_grad_()
    torch.testing.assert_close(mine, torch.autograd.grad(turned(table)(plain), plain, upstream)[0])


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param((3, 2, 14), FP32, id="smaller-than-a-block"),
        pytest.param((2, 2 * 2049), FP32, id="one-column-in-the-second-block"),
        pytest.param((2, 8192), BF16, id="bf16-whole-blocks"),
        pytest.param((5, 300), FP16, id="fp16"),
    ],
)
def test_swiglu(shape, dtype):
    x = random(*shape, dtype=dtype) * 3
    compare(results(swiglu_function, x), lambda y: _swiglu(y), x)


def _swiglu(y):
    gate, up = y.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore:overflow")  # exp in sigmoid, whose limit 0 is meant
def test_swiglu_of_large_gates_and_with_strides():
    x = random(4, 40) * 60
    compare(results(lambda y: swiglu_function(y[:, 10:30]), x), lambda y: _swiglu(y[:, 10:30]), x)


def test_without_a_gpu_they_are_the_twins():
    qkv, table, x = random(6, 2, 2, 5, 64), table_of(6, 2, head_dim=64), random(3, 8)
    pairs = zip(
        results(lambda y: rotate_heads(y, table), qkv),
        results(lambda y: reference.rotate_heads(y, table), qkv),
        strict=True,
    )
    assert all(torch.equal(mine, twin) for mine, twin in pairs)
    compare(results(lambda y: reference.rotate_heads(y, table), qkv), turned(table), qkv)
    assert torch.equal(swiglu_function(x), reference.swiglu(x))
    compare(results(reference.swiglu, x), _swiglu, x)


@pytest.mark.parametrize("twin", [False, True], ids=["kernel", "twin"])
@pytest.mark.parametrize(
    ("qkv", "table", "message"),
    [
        ((4, 2, 2, 8), (2, 4, 4), r"qkv: expected \[.., G, H / G \+ 2, K\] with K even, received \(4, 2, 2, 8\)"),
        ((4, 2, 3, 7), (2, 4, 3), r"with K even, received \(4, 2, 3, 7\)"),
        ((4, 2, 3, 8), (2, 5, 4), r"table: expected \(2, 4, 4\) for qkv \(4, 2, 3, 8\), received \(2, 5, 4\)"),
    ],
)
def test_bad_shapes_are_refused_by_name(qkv, table, message, twin):
    with pytest.raises(ValueError, match=message):
        (reference.rotate_heads if twin else rotate_heads)(torch.zeros(qkv), torch.zeros(table))


@pytest.mark.interpreted
def test_bad_types_are_refused_by_name():
    with pytest.raises(ValueError, match="table: torch.bfloat16 on cpu differs from qkv, torch.float32"):
        rotate_heads(torch.zeros(4, 2, 3, 8), torch.zeros(2, 4, 4, dtype=BF16))
    with pytest.raises(ValueError, match="qkv: dtype must be one of .* received torch.float64"):
        rotate_heads(torch.zeros(4, 2, 3, 8).double(), torch.zeros(2, 4, 4).double())
    with pytest.raises(ValueError, match="x: dtype must be one of .* received torch.float64"):
        swiglu_function(torch.zeros(4, 8).double())
    with pytest.raises(ValueError, match=r"x: expected \[.., 2F\], received \(4, 7\)"):
        swiglu_function(torch.zeros(4, 7))


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_compiled_for_hopper(dtype):
    qkv = torch.empty(64, 8, 6, 128, dtype=dtype, requires_grad=True)
    x = torch.empty(64, 2 * 14336, dtype=dtype, requires_grad=True)

    def both_ways(call, leaf):
        def run():
            out = call(leaf)
            torch.autograd.grad(out, leaf, [torch.empty_like(y) for y in (out if isinstance(out, tuple) else (out,))])

        return run

    table = torch.empty(2, 64, 64, dtype=dtype)
    label = str(dtype)[6:]
    heads = aot.compile_launches(
        f"rotary {label}", rotary, both_ways(lambda y: rotary._RotateHeads.apply(y, table), qkv)
    )
    gated = aot.compile_launches(f"swiglu {label}", SWIGLU, both_ways(SWIGLU._SwiGLU.apply, x))
    assert len(heads) == len(gated) == 2
    aot.check([*heads, *gated], matrix=False)
    aot.check_recorded([*heads, *gated])
