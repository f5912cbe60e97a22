"""The plain twins against formulas written out in fp64, with random upstream gradients.

The error may be twice that of the same formula evaluated in the tensors' own type, plus a few units in the last place.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vlm_kernels
from vlm_kernels import reference


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_()


def compare(function, oracle, inputs: list[Tensor], seed=9):
    """Outputs and gradients of `function` against `oracle` in fp64, and `oracle` in the inputs' own type."""

    def run(call, dtype):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        out = call(*leaves)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    got, exact, eager = run(function, None), run(oracle, torch.float64), run(oracle, None)
    for mine, truth, plain in zip(got, exact, eager, strict=True):
        assert mine.shape == truth.shape
        ulps = 4 * torch.finfo(mine.dtype).eps * truth.abs().max().item()
        bound = 2 * (plain - truth).abs().max().item() + ulps
        assert (mine - truth).abs().max().item() <= bound


def attention_oracle(lengths, causal, scale=None):
    """softmax(q k^T) v, segment by segment and head by head, on [T, H, K]."""

    def run(q, k, v):
        per_group = q.shape[1] // k.shape[1]
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        rows, start = [], 0
        for length in lengths:
            end, heads = start + length, []
            for head in range(q.shape[1]):
                a, b, c = q[start:end, head], k[start:end, head // per_group], v[start:end, head // per_group]
                scores = a @ b.T * factor
                if causal:
                    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
                heads.append(scores.softmax(-1) @ c)
            rows.append(torch.stack(heads, 1))
            start = end
        return torch.cat(rows)

    return run


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("lengths", "heads", "groups"),
    [
        ([17], 4, 4),
        ([5, 31, 1, 12], 4, 2),
        ([9, 9, 40], 6, 1),
    ],
    ids=["one-segment", "ragged+gqa", "one-kv-head"],
)
def test_packed_attention(lengths, heads, groups, dtype, causal):
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    inputs = [random(sum(lengths), n, 16, dtype=dtype, seed=i) for i, n in enumerate((heads, groups, groups))]

    def mine(q, k, v):
        return reference.attention(q, k, v, causal=causal, cu_seqlens=borders, max_seqlen=max(lengths))

    compare(mine, attention_oracle(lengths, causal), inputs)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_megatron_layout_attention_with_scale(causal):
    """[S, B, H, K] is B segments of S; slices of a wider tensor as the fused qkv projection gives them."""
    length, batch = 13, 3
    inputs = [random(length, batch, n, 16, seed=i) for i, n in enumerate((4, 2, 2))]

    def mine(q, k, v):
        wide = torch.cat([q, k, v], dim=2)
        q, k, v = wide.split([4, 2, 2], dim=2)
        return reference.attention(q, k, v, causal=causal, softmax_scale=0.3)

    def oracle(q, k, v):
        rows = [x.transpose(0, 1).flatten(0, 1) for x in (q, k, v)]
        return attention_oracle([length] * batch, causal, 0.3)(*rows).unflatten(0, (batch, length)).transpose(0, 1)

    compare(mine, oracle, inputs)


def test_attention_of_more_keys_than_queries():
    q, k, v = (random(s, 2, 2, 8, seed=s) for s in (1, 9, 9))
    out = reference.attention(q, k, v, causal=False)
    weights = torch.einsum("sbhk,tbhk->bhst", q, k).mul(8**-0.5).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("bhst,tbhk->sbhk", weights, v))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_project_image_tokens(bias):
    pictures, patches, width, hidden, out, tokens = 2, 3, 5, 7, 6, 11
    positions = torch.tensor([1, 2, 3, 7, 8, 9])
    inputs = [random(pictures, 1 + patches, width), random(hidden, width), random(out, hidden), random(tokens, out)]
    inputs += [random(hidden, seed=1), random(out, seed=2)] if bias else []

    def mine(features, fc1, fc2, into, bias1=None, bias2=None):
        return reference.project_image_tokens(
            features, fc1, fc2, bias1=bias1, bias2=bias2, into=into, positions=positions
        )

    def oracle(features, fc1, fc2, into, bias1=0.0, bias2=0.0):
        x = features[:, 1:].reshape(-1, width) @ fc1.T + bias1
        x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
        rows = list(into.unbind())
        for row, position in zip((x @ fc2.T + bias2).unbind(), positions.tolist(), strict=True):
            rows[position] = row
        return torch.stack(rows)

    compare(mine, oracle, inputs)


def test_no_pictures_project_to_zero_gradients():
    fc1, fc2, into = random(7, 5), random(6, 7), random(4, 6)
    out = reference.project_image_tokens(
        torch.zeros(0, 4, 5), fc1, fc2, into=into, positions=torch.zeros(0, dtype=torch.long)
    )
    assert torch.equal(out, into)
    out.sum().backward()
    assert not fc1.grad.any()
    assert not fc2.grad.any()


def loss_oracle(target):
    def run(logits):
        losses = logits.logsumexp(1) - logits.gather(1, target.clamp(min=0)[:, None])[:, 0]
        return torch.where(target == -100, torch.zeros_like(losses), losses)

    return run


@pytest.mark.parametrize("rows", [23, 1, 0], ids=["ragged", "one-row", "no-rows"])
def test_cross_entropies(rows):
    target = torch.arange(rows) * 7 % 19
    target[::3] = -100
    hidden, weight = random(rows, 12, scale=3.0), random(19, 12)
    if rows == 0:
        assert reference.linear_cross_entropy(hidden, weight, target).shape == (0,)
        return
    compare(
        lambda h, w: reference.linear_cross_entropy(h, w, target),
        lambda h, w: loss_oracle(target)(h @ w.T),
        [hidden, weight],
    )
    logits = random(rows, 19, scale=20.0)
    compare(lambda x: reference.vocab_parallel_cross_entropy(x, target), loss_oracle(target), [logits])


def test_loss_is_float32_of_bfloat16_logits():
    """Taken in fp32 from the rounded logits, it equals the fp64 loss of those logits to fp32 accuracy."""
    logits, target = random(40, 31, dtype=torch.bfloat16, scale=9.0), torch.arange(40) % 31
    got = reference.vocab_parallel_cross_entropy(logits, target)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), loss_oracle(target)(logits.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: reference.attention(x(4, 2, 8), x(4, 2, 8), x(4, 2, 8), causal=True), r"q: expected \[S, B, H, K\]"),
        (
            lambda x: reference.attention(x(4, 1, 4, 8), x(4, 1, 3, 8), x(4, 1, 3, 8), causal=True),
            r"k: \(4, 1, 3, 8\) must have the head dim of q",
        ),
        (
            lambda x: reference.attention(x(4, 1, 4, 8), x(5, 1, 4, 8), x(5, 1, 4, 8), causal=True),
            r"k: \(5, 1, 4, 8\) does not match the tokens of q",
        ),
        (
            lambda x: reference.attention(x(4, 1, 4, 8), x(4, 1, 4, 8), x(4, 1, 2, 8), causal=True),
            r"v: shape \(4, 1, 2, 8\) differs from k",
        ),
        (
            lambda x: reference.attention(
                x(4, 2, 8), x(4, 2, 8), x(4, 2, 8), causal=True, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32)
            ),
            "cu_seqlens: its segments hold 3 tokens, q has 4",
        ),
        (
            lambda x: reference.project_image_tokens(
                x(2, 4, 5), x(7, 5), x(6, 7), into=x(9, 6), positions=torch.arange(5)
            ),
            r"positions: expected \[6\] for features \(2, 4, 5\), received \(5,\)",
        ),
        (
            lambda x: reference.project_image_tokens(
                x(2, 4, 5), x(7, 5), x(6, 7), into=x(9, 6), positions=torch.arange(6), activation="relu"
            ),
            r"activation: expected a function or one of \['gelu', 'gelu_tanh'\], received 'relu'",
        ),
        (
            lambda x: reference.linear_cross_entropy(x(3, 5), x(7, 6), torch.arange(3)),
            r"hidden: expected \[R, 6\], received \(3, 5\)",
        ),
        (
            lambda x: reference.vocab_parallel_cross_entropy(x(3, 5), torch.arange(4)),
            r"target: .*received.*\(3, 5\)|target: expected",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(lambda *shape: torch.zeros(shape))


def test_package_exports_the_twins():
    for name in vlm_kernels.__all__:
        assert callable(getattr(reference, name))
