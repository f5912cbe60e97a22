"""The attention kernels, in Triton's interpreter, against attention written out in fp64.

Outputs and gradients (of a random upstream gradient) may be twice as far from the fp64 result as the same formula
evaluated in the tensors' own type, plus one unit in the last place of the largest value and, because a sum may cancel,
four fp32 units of the largest of all results. Most cases are fp32, where that is tight enough for any wrong index to
show; bf16 and fp16 have tile sizes of their own.
"""

from __future__ import annotations

import sys

import aot
import pytest
import torch

from vlm_kernels import reference
from vlm_kernels.attention import attention

MODULE = sys.modules[attention.__module__]


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def written_out(live, scale=None):
    """Attention over the pairs that are True in live [B or 1, S, S'], for q [S, B, H, K] or packed [T, H, K]."""

    def run(q, k, v):
        packed = q.dim() == 3
        q, k, v = (x.unsqueeze(1) if packed else x for x in (q, k, v))
        q = q.unflatten(2, (k.shape[2], -1))  # [S, B, G, H / G, K]
        scores = torch.einsum("sbghk,tbgk->bghst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        weights = scores.masked_fill(~live[:, None, None], -torch.inf).softmax(-1)
        weights = weights.masked_fill(~live.any(-1)[:, None, None, :, None], 0.0)  # softmax of nothing is nan
        out = torch.einsum("bghst,tbgk->sbghk", weights, v).flatten(2, 3)
        return out.squeeze(1) if packed else out

    return run


def live_pairs(lengths, causal):
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    live = segment[:, None] == segment
    return (live.tril() if causal else live)[None]


def compare(function, oracle, inputs, seed=9):
    """Outputs and gradients of `function` against `oracle` in fp64, and `oracle` in the inputs' own type."""

    def run(call, dtype):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        out = call(*leaves)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(inputs[0].dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    got, exact, eager = run(function, None), run(oracle, torch.float64), run(oracle, None)
    largest = max(x.abs().max().item() for x in exact)
    for name, mine, truth, plain in zip(("out", "dq", "dk", "dv"), got, exact, eager, strict=False):
        assert mine.shape == truth.shape
        assert mine.dtype == plain.dtype
        ulps = torch.finfo(mine.dtype).eps * truth.abs().max().item() + 4 * torch.finfo(torch.float32).eps * largest
        bound = 2 * (plain - truth).abs().max().item() + ulps
        error = (mine - truth).abs().max().item()
        assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"


def borders_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("length", "batch", "heads", "groups", "head_dim", "causal", "dtype"),
    [
        pytest.param(577, 1, 1, 1, 64, False, FP32, id="clip-577=9x64+1:one-row-and-one-key-in-the-last-tiles"),
        pytest.param(200, 2, 4, 1, 128, True, FP32, id="mistral-gqa-4:two-samples"),
        pytest.param(65, 1, 8, 1, 64, True, FP32, id="one-kv-head-for-8:ragged-by-one"),
        pytest.param(33, 1, 6, 2, 64, True, FP32, id="gqa-3:no-power-of-two"),
        pytest.param(128, 2, 3, 3, 64, True, FP32, id="no-gqa:whole-tiles-only"),
        pytest.param(1, 2, 4, 2, 128, True, FP32, id="one-token"),
        pytest.param(50, 1, 4, 2, 128, False, FP32, id="full-gqa:fewer-keys-than-a-tile"),
        pytest.param(300, 1, 2, 1, 128, True, BF16, id="bf16-tiles-of-128"),
        pytest.param(300, 1, 2, 1, 128, False, FP16, id="fp16-tiles-of-128"),
        pytest.param(300, 1, 2, 2, 64, True, FP16, id="fp16-tiles-of-64"),
        pytest.param(300, 1, 2, 2, 64, False, BF16, id="bf16-tiles-of-64"),
    ],
)
def test_megatron_layout(length, batch, heads, groups, head_dim, causal, dtype):
    inputs = [random(length, batch, n, head_dim, dtype=dtype, seed=i) for i, n in enumerate((heads, groups, groups))]
    compare(lambda q, k, v: attention(q, k, v, causal=causal), written_out(live_pairs([length], causal)), inputs)


@pytest.mark.interpreted
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "head_dim", "dtype"),
    [
        pytest.param([64, 33, 1, 0, 70], 2, 1, 64, FP32, id="whole-tiles,ragged,one-token,empty"),
        pytest.param([3] * 33 + [35] + [1] * 33, 1, 1, 64, FP32, id="more-segments-than-are-read-at-once"),
        pytest.param([31, 97], 4, 2, 128, FP32, id="gqa-128"),
        pytest.param([100, 1, 140], 2, 1, 128, BF16, id="bf16-segments-around-a-tile"),
    ],
)
def test_packed(lengths, heads, groups, head_dim, dtype, causal):
    borders, tokens = borders_of(lengths), sum(lengths)
    inputs = [random(tokens, n, head_dim, dtype=dtype, seed=i) for i, n in enumerate((heads, groups, groups))]
    compare(
        lambda q, k, v: attention(q, k, v, causal=causal, cu_seqlens=borders, max_seqlen=max(lengths)),
        written_out(live_pairs(lengths, causal)),
        inputs,
    )


@pytest.mark.interpreted
@pytest.mark.parametrize("packed", [False, True], ids=["sbhk", "packed"])
def test_slices_of_a_fused_projection_are_read_in_place(packed):
    """q, k, v as views of Megatron's [S, B, G, H / G + 2, K]; also a scale and a strided upstream gradient."""
    groups, per_group, head_dim = 2, 2, 64
    shape = (70,) if packed else (35, 2)
    fused = random(*shape, groups, per_group + 2, head_dim)
    borders = borders_of([30, 40])

    def split(x):
        return x[..., :per_group, :], x[..., per_group, :], x[..., per_group + 1, :]

    def mine(x):
        q, k, v = split(x)  # q [.., G, H / G, K]
        options = {"cu_seqlens": borders} if packed else {}
        return attention(q, k, v, causal=True, softmax_scale=0.3, **options).transpose(-1, -2)

    oracle = written_out(live_pairs([30, 40] if packed else [35], True), 0.3)
    compare(mine, lambda x: oracle(split(x)[0].flatten(-3, -2), *split(x)[1:]).transpose(-1, -2), [fused])


@pytest.mark.interpreted
def test_queries_and_keys_differ_in_number_and_keys_have_ranges():
    """Ranges that leave the end, the beginning and everything away; without ranges, S' = 90 keys for S = 40 queries."""
    inputs = [random(40, 3, 4, 64), random(90, 3, 2, 64, seed=1), random(90, 3, 2, 64, seed=2)]
    compare(lambda q, k, v: attention(q, k, v, causal=False), written_out(torch.ones(1, 40, 90).bool()), inputs)
    ranges = torch.tensor([[0, 41], [17, 90], [5, 5]], dtype=torch.int32)
    index = torch.arange(90)
    live = ((index >= ranges[:, :1]) & (index < ranges[:, 1:]))[:, None].expand(3, 40, 90)
    compare(lambda q, k, v: attention(q, k, v, causal=False, key_ranges=ranges), written_out(live), inputs)


@pytest.mark.interpreted
@pytest.mark.parametrize("ranged", [True, False], ids=["unequal-lengths", "equal-lengths"])
@pytest.mark.parametrize(
    ("batch", "keys", "groups", "per_group", "head_dim", "dtype"),
    [
        pytest.param(3, 300, 2, 4, 128, FP32, id="mistral-gqa-4:many-parts"),
        pytest.param(3, 7, 1, 1, 64, FP16, id="one-part,one-head"),
        pytest.param(3, 150, 1, 20, 64, FP32, id="more-heads-in-a-group-than-a-small-tile"),
        pytest.param(3, 200, 2, 4, 128, BF16, id="bf16"),
    ],
)
def test_decode(batch, keys, groups, per_group, head_dim, dtype, ranged):
    """One query row against the first keys of a longer cache; ranges end, begin and are empty within it."""
    cache = random(2, keys + 5, batch + 1, groups, head_dim, dtype=dtype)
    q, k, v = (
        random(1, batch, groups, per_group, head_dim, dtype=dtype),
        cache[0, :keys, :batch],
        cache[1, :keys, :batch],
    )
    cache[:, keys:] = torch.nan
    ranges = torch.tensor([[0, keys - 3], [keys // 2, keys], [2, 2]], dtype=torch.int32)
    index = torch.arange(keys)
    live = ((index >= ranges[:, :1]) & (index < ranges[:, 1:]))[:, None] if ranged else torch.ones(1, 1, keys).bool()
    got = attention(q, k, v, causal=False, key_ranges=ranges if ranged else None)
    exact, eager = (written_out(live)(*(x.to(t) for x in (q.flatten(2, 3), k, v))) for t in (torch.float64, dtype))
    assert got.dtype == dtype
    assert got.shape == exact.shape
    ulps = torch.finfo(dtype).eps * exact.abs().max().item()
    assert (got - exact).abs().max().item() <= 2 * (eager - exact).abs().max().item() + ulps
    if ranged:
        assert not got[:, 2].any()


@pytest.mark.interpreted
def test_large_scores_neither_overflow_nor_lose_the_maximum():
    """In bf16: fp32 exponents of some hundreds, times log2 e, are themselves rounded more often than eager's."""
    q, k, v = (random(80, 1, 1, 64, seed=i, dtype=BF16) for i in range(3))
    inputs = [q * 12, k * 12, v]
    compare(lambda q, k, v: attention(q, k, v, causal=True), written_out(live_pairs([80], True)), inputs)


@pytest.mark.interpreted
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_segments_do_not_see_their_neighbours_nan(causal):
    """A masked tile must not multiply what lies behind its segment: 0 * nan is nan. Forward and backward."""
    tensors = [random(90, 1, 64, seed=i) for i in range(4)]

    def run():
        q, k, v, w = (x.clone().requires_grad_() for x in tensors)
        out = attention(q, k, v, causal=causal, cu_seqlens=borders_of([50, 40]))
        return [out, *torch.autograd.grad(out, (q, k, v), w)]

    clean = run()
    for x in tensors:
        x[50:] = torch.nan
    for before, after in zip(clean, run(), strict=True):
        assert torch.equal(before[:50], after[:50])


@pytest.mark.compiled
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_decode_compiles_for_hopper(head_dim, dtype, monkeypatch):
    """Sixteen rows are too few for a warp group's matrix instruction; the most parts there may be must not spill."""
    monkeypatch.setattr(MODULE, "INTERPRETED", True)
    q, cache = torch.empty(1, 1, 32, head_dim, dtype=dtype), torch.empty(8192, 1, 4, head_dim, dtype=dtype)
    ranges = torch.tensor([[0, 8192]], dtype=torch.int32)
    label = f"{str(dtype)[6:]} K={head_dim}"
    compiled = aot.compile_launches(label, MODULE, lambda: attention(q, cache, cache, causal=False, key_ranges=ranges))
    assert len(compiled) == 2
    aot.check(compiled, matrix=False)
    aot.check_recorded(compiled)


def launch(length, batch, groups, per_group, head_dim, causal, dtype, packed=False, ranged=False):
    """Forward and backward of views of a fused projection, for compile_launches: what a GPU would be asked to run."""

    def run():
        tokens = (length,) if packed else (length, batch)
        fused = torch.empty(*tokens, groups, per_group + 2, head_dim, dtype=dtype)
        q, k, v = (x.requires_grad_() for x in (fused[..., :per_group, :], fused[..., -2, :], fused[..., -1, :]))
        borders = borders_of([length // 2, length - length // 2]) if packed else None
        ranges = torch.tensor([[0, length]] * batch, dtype=torch.int32) if ranged else None
        out = attention(q, k, v, causal=causal, cu_seqlens=borders, key_ranges=ranges)
        out.backward(torch.empty_like(out))

    return run


COMPILED = {
    "bf16 K=64 full (CLIP)": (577, 32, 16, 1, 64, False, BF16),
    "bf16 K=128 causal (Mistral)": (4096, 2, 8, 4, 128, True, BF16),
    "bf16 K=128 causal packed": (16384, 1, 8, 4, 128, True, BF16, True),
    "fp16 K=64 causal packed": (16384, 1, 8, 4, 64, True, FP16, True),
    "bf16 K=128 full ranged": (1024, 4, 8, 4, 128, False, BF16, False, True),
    "fp32 K=64 full": (577, 32, 16, 1, 64, False, FP32),
    "fp32 K=128 causal packed": (4096, 1, 8, 4, 128, True, FP32, True),
}


@pytest.mark.compiled
@pytest.mark.parametrize("label", COMPILED)
def test_compiles_for_hopper(label, monkeypatch):
    """Exact fp32 products have no matrix instruction: those kernels are for checks, and only must not spill."""
    monkeypatch.setattr(MODULE, "INTERPRETED", True)  # CPU tensors go to the kernels
    compiled = aot.compile_launches(label, MODULE, launch(*COMPILED[label]))
    assert len(compiled) == 3
    aot.check(compiled, matrix="fp32" not in label)
    aot.check_recorded(compiled)


def made(*shape, dtype=FP32):
    return torch.zeros(shape, dtype=dtype)


def borders(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


REFUSED = {
    "q has three dims without cu_seqlens": (
        {"q": made(4, 2, 64)},
        r"q: expected \[S, B, H, K\], received \(4, 2, 64\)",
    ),
    "q has its heads by another number of groups": (
        {"q": made(4, 1, 4, 2, 64)},
        r"q: expected \[S, B, H, K\], received \(4, 1, 4, 2, 64\)",
    ),
    "v is shorter than k": ({"v": made(3, 1, 2, 64)}, r"v: shape \(3, 1, 2, 64\) differs from k \(4, 1, 2, 64\)"),
    "k has another type": ({"k": made(4, 1, 2, 64, dtype=BF16)}, "k: torch.bfloat16 on cpu differs from q"),
    "v is on another device": ({"v": torch.empty(4, 1, 2, 64, device="meta")}, "v: torch.float32 on meta differs"),
    "heads do not divide": (
        {"q": made(4, 1, 3, 64)},
        r"k: \(4, 1, 2, 64\) must have the head dim of q \(4, 1, 3, 64\)",
    ),
    "another batch": ({"q": made(4, 2, 4, 64)}, r"k: \(4, 1, 2, 64\) does not match the tokens of q \(4, 2, 4, 64\)"),
    "causal with more keys": ({"q": made(3, 1, 4, 64)}, r"k: \(4, 1, 2, 64\) does not match the tokens of q"),
    "no keys": (
        {"k": made(0, 1, 2, 64), "v": made(0, 1, 2, 64), "causal": False},
        r"k: no keys for the queries \(4, 1, 4, 64\), received \(0, 1, 2, 64\)",
    ),
    "negative scale": ({"softmax_scale": -1.0}, "softmax_scale: must be positive and finite, received -1.0"),
    "ranges with causal": ({"key_ranges": borders(0, 4)[None]}, "key_ranges: cannot be combined with causal"),
    "ranges of another batch": (
        {"key_ranges": borders(0, 4, 0, 4).view(2, 2), "causal": False},
        r"key_ranges: expected contiguous int32 \[1, 2\] on cpu, received torch.int32 \(2, 2\)",
    ),
    "a range beyond the keys": (
        {"key_ranges": borders(1, 5)[None], "causal": False},
        r"key_ranges: sample 0 has \[1, 5\), which is not within 4 keys",
    ),
}
REFUSED_PACKED = {
    "borders are int64": (
        {"cu_seqlens": borders(0, 4, dtype=torch.int64)},
        r"cu_seqlens: expected contiguous int32 \[n \+ 1\] on cpu, received torch.int64 \(2,\)",
    ),
    "one border": ({"cu_seqlens": borders(0)}, r"cu_seqlens: expected contiguous int32 \[n \+ 1\]"),
    "borders do not start at 0": ({"cu_seqlens": borders(1, 4)}, r"cu_seqlens: must start at 0, received \[1, 4\]"),
    "borders do not end at T": ({"cu_seqlens": borders(0, 3)}, "cu_seqlens: its segments hold 3 tokens, q has 4"),
    "borders decrease": (
        {"cu_seqlens": borders(0, 3, 2, 4)},
        r"cu_seqlens: must not decrease, received \[0, 3, 2, 4\]",
    ),
    "max_seqlen too small": ({"max_seqlen": 3}, "max_seqlen: received 3, the longest segment of cu_seqlens has 4"),
}


@pytest.mark.parametrize("function", [attention, reference.attention], ids=["kernel", "twin"])
@pytest.mark.parametrize("case", [*REFUSED, *REFUSED_PACKED])
def test_refuses_by_argument(case, function, monkeypatch):
    monkeypatch.setattr(MODULE, "INTERPRETED", True)  # the kernels' path, which on a CPU must refuse before a launch
    if case in REFUSED:
        changes, message = REFUSED[case]
        arguments = {"q": made(4, 1, 4, 64), "k": made(4, 1, 2, 64), "v": made(4, 1, 2, 64), "causal": True}
    else:
        changes, message = REFUSED_PACKED[case]
        arguments = {
            "q": made(4, 4, 64),
            "k": made(4, 2, 64),
            "v": made(4, 2, 64),
            "causal": True,
            "cu_seqlens": borders(0, 4),
        }
    with pytest.raises(ValueError, match=message):
        function(**{**arguments, **changes})


def test_borders_changed_in_place_are_looked_at_again():
    """Values are read once per tensor, not once for ever."""
    x, borders_4 = made(4, 2, 64), borders(0, 4)
    reference.attention(x, x, x, causal=True, cu_seqlens=borders_4)
    borders_4[1] = 3
    with pytest.raises(ValueError, match="cu_seqlens: its segments hold 3 tokens, q has 4"):
        reference.attention(x, x, x, causal=True, cu_seqlens=borders_4)


def test_what_the_host_knows_is_not_read_from_the_device():
    """A meta tensor has no values to read."""
    x, borders_4 = made(4, 2, 64).to("meta"), borders(0, 4).to("meta")
    reference.known_on_host(borders_4, borders(0, 3))
    with pytest.raises(ValueError, match="cu_seqlens: its segments hold 3 tokens, q has 4"):
        reference.check_attention(x, x, x, True, borders_4, 4, None, None)
    borders_4.add_(1)
    with pytest.raises(NotImplementedError, match="meta"):
        reference.check_attention(x, x, x, True, borders_4, 4, None, None)
    with pytest.raises(ValueError, match=r"values: expected torch.int32 \(2,\) on the cpu, received .* \(3,\) on cpu"):
        reference.known_on_host(borders_4, borders(0, 1, 4))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (made(4, 1, 2, 32), r"q: head dim must be one of \(64, 128\), received 32 in \(4, 1, 2, 32\)"),
        (made(4, 1, 2, 64, dtype=torch.float64), "q: dtype must be one of .* received torch.float64"),
        (made(4, 1, 64, 2).mT, r"q: the last dimension must be contiguous, received strides \(128, 128, 1, 2\)"),
    ],
    ids=["head-dim", "dtype", "last-stride"],
)
def test_kernels_refuse_what_only_the_twin_can(x, message, monkeypatch):
    torch.testing.assert_close(
        attention(x, x, x, causal=True), reference.attention(x, x, x, causal=True), equal_nan=True
    )
    monkeypatch.setattr(MODULE, "INTERPRETED", True)
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, causal=True)


@pytest.mark.interpreted
def test_no_tokens():
    x = torch.zeros(0, 2, 64, requires_grad=True)
    out = attention(x, x, x, causal=True, cu_seqlens=borders(0, 0))
    assert out.shape == (0, 2, 64)
    out.sum().backward()
    assert x.grad.shape == x.shape
