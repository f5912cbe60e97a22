"""Rotary positions, norms and activations, in Triton's interpreter, against their formulas written out in fp64.

Outputs and gradients (of random upstream gradients) may be twice as far from the fp64 result as the same formula
evaluated in the tensors' own type, plus four units in the last place of the largest value.
"""

from __future__ import annotations

import sys

import aot
import pytest
import torch

from vlm_kernels import add_rms_norm, norm, reference, rotary
from vlm_kernels import quick_gelu as quick_gelu_function
from vlm_kernels import swiglu as swiglu_function
from vlm_kernels.rotary import rotate_heads

QUICK_GELU, SWIGLU = (sys.modules[f"vlm_kernels.{name}"] for name in ("quick_gelu", "swiglu"))
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


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("count", "dtype"),
    [
        pytest.param(1, FP32, id="one"),
        pytest.param(4097, FP32, id="one-in-the-second-block"),
        pytest.param(8192, BF16, id="bf16-whole-blocks"),
        pytest.param(300, FP16, id="fp16"),
    ],
)
def test_quick_gelu(count, dtype):
    x = random(count, 2, dtype=dtype) * 3
    compare(results(lambda y: quick_gelu_function(y[:, 1]), x), lambda y: _quick_gelu(y[:, 1]), x)


def _quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


EPS = 1e-3  # large enough to be seen


def _split(rows, update_too):
    """x, update and gain out of one tensor, so that all gradients are looked at together."""
    x, update, gain = rows.split([(len(rows) - 1) // 2] * 2 + [1])
    return x, update if update_too else None, gain[0]


def _add_rms_norm(x, update, gain, eps):
    stream = x if update is None else x + update
    return stream, stream / (stream.square().mean(-1, keepdim=True) + eps).sqrt() * gain


@pytest.mark.interpreted
@pytest.mark.parametrize("update_too", [True, False], ids=["update", "stream-alone"])
@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [
        pytest.param(3, 100, FP32, id="not-a-power-of-two"),
        pytest.param(1, 128, FP32, id="one-row"),
        pytest.param(530, 8, FP32, id="programs-with-two-rows"),
        pytest.param(5, 256, FP16, id="fp16"),
        pytest.param(5, 256, BF16, id="bf16"),
    ],
)
def test_add_rms_norm(rows, width, dtype, update_too):
    both = random(2 * rows + 1, width, dtype=dtype)
    mine = results(lambda y: add_rms_norm(*_split(y, update_too), EPS), both)
    compare(mine, lambda y: _add_rms_norm(*_split(y, update_too), EPS), both)


@pytest.mark.interpreted
def test_the_norm_is_that_of_the_stream_as_it_is_kept():
    """Its sum is rounded to bf16 once, and the norm sees what the next layer sees."""
    x, update, gain = random(4, 512, dtype=BF16), random(4, 512, dtype=BF16, seed=1), random(512, dtype=BF16)
    stream, y = add_rms_norm(x, update, gain, EPS)
    assert torch.equal(stream, x + update)
    exact = _add_rms_norm(stream.double(), None, gain.double(), EPS)[1]
    assert (y == exact.to(BF16)).float().mean() > 0.99


@pytest.mark.interpreted
@pytest.mark.parametrize("wanted", [0, 1], ids=["stream", "norm"])
@pytest.mark.parametrize("learning", ["x", "gain", "x update", "x update gain"])
def test_add_rms_norm_with_some_gradients_only(wanted, learning):
    leaves = {"x": random(6, 32), "update": random(6, 32, seed=1), "gain": random(32)}
    asked = [leaves[name].requires_grad_() for name in learning.split()]
    upstream = random(6, 32, seed=3)

    def gradients(function):
        out = function(*leaves.values(), EPS)[wanted]
        if not out.requires_grad:
            return [None] * len(asked)
        return torch.autograd.grad(out, asked, upstream, allow_unused=True)

    for mine, plain in zip(gradients(add_rms_norm), gradients(_add_rms_norm), strict=True):
        assert mine is plain is None or torch.allclose(mine, plain, rtol=1e-5, atol=1e-6)


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
    assert torch.equal(quick_gelu_function(x), reference.quick_gelu(x))
    compare(results(reference.quick_gelu, x), _quick_gelu, x)
    arguments = (*_split(random(9, 16), True), EPS)
    mine, twin, exact = (call(*arguments) for call in (add_rms_norm, reference.add_rms_norm, _add_rms_norm))
    assert all(torch.equal(x, y) for x, y in zip(mine, twin, strict=True))
    torch.testing.assert_close(twin, exact)


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
    with pytest.raises(ValueError, match="x: dtype must be one of .* received torch.float64"):
        quick_gelu_function(torch.zeros(4).double())
    with pytest.raises(ValueError, match="x: dtype must be one of .* received torch.float64"):
        add_rms_norm(torch.zeros(4, 8).double(), None, torch.zeros(8).double(), EPS)
    with pytest.raises(ValueError, match=r"update: expected \(4, 8\) for x \(4, 8\), received \(8,\)"):
        add_rms_norm(torch.zeros(4, 8), torch.zeros(8), torch.zeros(8), EPS)
    with pytest.raises(ValueError, match="gain: torch.bfloat16 on cpu differs from x, torch.float32"):
        add_rms_norm(torch.zeros(4, 8), None, torch.zeros(8, dtype=BF16), EPS)


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

    def norm_both_ways(learns):
        def run():
            both = [torch.empty(64, 4096, dtype=dtype, requires_grad=True) for _ in range(2)]
            gain = torch.empty(4096, dtype=dtype, requires_grad=learns)
            out = norm._AddRMSNorm.apply(*both, gain, 1e-5)
            torch.autograd.grad(out, [*both, gain] if learns else both, [torch.empty_like(y) for y in out])

        return run

    table = torch.empty(2, 64, 64, dtype=dtype)
    label = str(dtype)[6:]
    compiled = [
        *aot.compile_launches(f"rotary {label}", rotary, both_ways(lambda y: rotary._RotateHeads.apply(y, table), qkv)),
        *aot.compile_launches(f"swiglu {label}", SWIGLU, both_ways(SWIGLU._SwiGLU.apply, x)),
        *aot.compile_launches(f"quick_gelu {label}", QUICK_GELU, both_ways(QUICK_GELU._QuickGELU.apply, x)),
        *aot.compile_launches(f"norm {label}", norm, norm_both_ways(learns=False)),
        *aot.compile_launches(f"norm {label} gain learns", norm, norm_both_ways(learns=True)),
    ]
    assert len(compiled) == 10
    aot.check(compiled, matrix=False)
    assert not any(kernel.narrow for kernel in compiled)
    aot.check_recorded(compiled)
