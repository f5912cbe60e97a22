"""Attention at the recipe's shapes: CLIP (full, 577 tokens), Mistral (causal, 32/8 heads), and packs of samples.

Every provider gets contiguous tensors in the layout it takes without a copy. Shapes: B batch, S sequence, H query
heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlm_kernels import reference
from vlm_kernels.attention import attention

DENSE = {
    "CLIP-L/336": (32, 577, 16, 16, 64, False),
    "Mistral S 1024": (8, 1024, 32, 8, 128, True),
    "Mistral S 4096": (2, 4096, 32, 8, 128, True),
    "Mistral S 8192": (1, 8192, 32, 8, 128, True),
}
H, G, K = 32, 8, 128  # of a pack
Forward = tuple[Callable[[], Tensor], list[Tensor]]


def pack(num_tokens: int) -> list[int]:
    """Lengths like the pretraining samples': 576 patches and a caption."""
    generator = torch.Generator().manual_seed(1)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        lengths.append(576 + int(torch.randint(20, 400, (1,), generator=generator)))
    lengths[-1] -= sum(lengths) - num_tokens
    return lengths


def tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]


def stages(make: Callable[[], Forward], stage: str) -> Callable[[], Callable[[], object]]:
    def build() -> Callable[[], object]:
        forward, leaves = make()
        if stage == "forward":
            return forward
        upstream = torch.randn_like(forward())
        # Together with its forward, since Transformer Engine lets go of what it saved after one backward.
        return lambda: torch.autograd.grad(forward(), leaves, upstream)

    return build


def dense(provider: str, dtype: torch.dtype, b: int, s: int, h: int, g: int, k: int, causal: bool) -> Forward:
    if provider in ("ours", "eager"):
        leaves = tensors(dtype, (s, b, h, k), (s, b, g, k), (s, b, g, k))
        if provider == "ours":
            return lambda: attention(*leaves, causal=causal), leaves
        return lambda: written_out(*leaves, causal), leaves
    if provider == "transformer_engine":
        engine = importlib.import_module("transformer_engine.pytorch")
        layer = engine.DotProductAttention(
            h, k, num_gqa_groups=g, attention_dropout=0.0, qkv_format="bshd",
            attn_mask_type="causal" if causal else "no_mask",
        )  # fmt: skip
        leaves = tensors(dtype, (b, s, h, k), (b, s, g, k), (b, s, g, k))
        return lambda: layer(*leaves), leaves
    backend = SDPBackend.FLASH_ATTENTION if provider == "sdpa_flash" else SDPBackend.CUDNN_ATTENTION
    leaves = tensors(dtype, (b, h, s, k), (b, g, s, k), (b, g, s, k))

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=h != g)

    return forward, leaves


def written_out(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Plain products and a softmax, with the scores in memory."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("sbhk,tbhk->bhst", q, k) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(q.shape[0], k.shape[0], device=q.device).triu(1).bool(), -torch.inf)
    return torch.einsum("bhst,tbhk->sbhk", scores.softmax(-1), v)


@pytest.mark.parametrize("stage", ["forward", "forward + backward"])
@pytest.mark.parametrize(("name", "dtype"), [*((name, "bfloat16") for name in DENSE), ("Mistral S 4096", "float16")])
@pytest.mark.parametrize("provider", ["ours", "transformer_engine", "sdpa_flash", "sdpa_cudnn", "eager"])
def test_attention(measure, provider, name, dtype, stage):
    b, s, h, g, k, causal = DENSE[name]
    forward_flop = 4 * b * s * s * h * k * (0.5 if causal else 1)
    measure(
        stages(lambda: dense(provider, getattr(torch, dtype), *DENSE[name]), stage),
        provider=provider,
        operation="attention",
        shape=f"{name}: B {b}, S {s}, heads {h}/{g}, K {k}, {'causal' if causal else 'full'}",
        dtype=dtype,
        stage=stage,
        flop=forward_flop * (1 if stage == "forward" else 3.5),
        moved_bytes=2 * b * s * k * (2 * h + 2 * g) * (1 if stage == "forward" else 3),
    )


def packed(provider: str, lengths: list[int]) -> Forward:
    num_tokens, longest = sum(lengths), max(lengths)
    leaves = tensors(torch.bfloat16, (num_tokens, H, K), (num_tokens, G, K), (num_tokens, G, K))
    borders = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    if provider == "ours":
        return lambda: attention(*leaves, causal=True, cu_seqlens=borders, max_seqlen=longest), leaves
    if provider == "eager":  # the twin: SDPA segment by segment
        return lambda: reference.attention(*leaves, causal=True, cu_seqlens=borders), leaves
    if provider == "sdpa_flash":
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        # It has changed between PyTorch 2.11 and 2.13: causal was a flag, and key heads as many as query heads.
        known = inspect.signature(varlen).parameters
        options: dict[str, object] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            leaves = tensors(torch.bfloat16, *[(num_tokens, H, K)] * 3)
        return lambda: varlen(*leaves, borders, borders, longest, longest, **options), leaves
    engine = importlib.import_module("transformer_engine.pytorch")
    layer = engine.DotProductAttention(
        H, K, num_gqa_groups=G, attention_dropout=0.0, qkv_format="thd", attn_mask_type="padding_causal"
    )
    options = {"max_seqlen_q": longest, "max_seqlen_kv": longest}
    return lambda: layer(*leaves, cu_seqlens_q=borders, cu_seqlens_kv=borders, **options), leaves


@pytest.mark.parametrize("stage", ["forward", "forward + backward"])
@pytest.mark.parametrize("num_tokens", [8192, 16384])
@pytest.mark.parametrize("provider", ["ours", "transformer_engine", "sdpa_flash", "eager"])
def test_packed_attention(measure, provider, num_tokens, stage):
    lengths = pack(num_tokens)
    measure(
        stages(lambda: packed(provider, lengths), stage),
        provider=provider,
        operation="packed attention",
        shape=f"T {num_tokens}, {len(lengths)} samples, heads {H}/{G}, K {K}, causal",
        dtype="bfloat16",
        stage=stage,
        flop=sum(2 * n * n for n in lengths) * H * K * (1 if stage == "forward" else 3.5),
        moved_bytes=2 * num_tokens * K * (2 * H + 2 * G) * (1 if stage == "forward" else 3),
    )


ERRORS = {
    "causal": (1000, 2, 8, 2, 128, True, None),
    "causal-less-than-a-tile": (70, 1, 4, 1, 128, True, None),
    "causal-in-windows": (
        2176,
        7,
        4,
        2,
        128,
        True,
        None,
    ),  # more programs than multiprocessors, seven sequences at once
    "causal-K-64": (640, 2, 4, 2, 64, True, None),
    "CLIP": (577, 4, 4, 4, 64, False, None),
    "full-less-than-a-tile": (100, 2, 16, 16, 64, False, None),
    "full-two-tiles": (200, 3, 16, 16, 64, False, None),
    "full-whole-tiles": (256, 2, 4, 2, 64, False, None),
    "full-K-128": (700, 2, 4, 2, 128, False, None),
    "packed": (0, 0, 8, 2, 128, True, [600, 37, 128, 1, 700, 129]),
    "packed-K-64": (0, 0, 8, 2, 64, True, [1, 63, 64, 65, 127, 600, 300]),
    "packed-full": (0, 0, 8, 2, 128, False, [600, 37, 128, 1, 700, 129]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name):
    """Twice the error of plain PyTorch in bf16, on views of a fused projection; and three times the same bits."""
    s, b, h, g, k, causal, lengths = ERRORS[name]
    tokens = (sum(lengths),) if lengths else (s, b)
    borders = torch.tensor([0, *lengths], device="cuda").cumsum(0).int() if lengths else None
    torch.manual_seed(0)
    fused = torch.randn(*tokens, g, h // g + 2, k, device="cuda", dtype=torch.bfloat16)
    upstream = torch.randn(*tokens, h, k, device="cuda", dtype=torch.bfloat16)

    def run(call, dtype):
        leaf = fused.to(dtype).requires_grad_()
        q, key, value = leaf[..., : h // g, :], leaf[..., -2, :], leaf[..., -1, :]
        out = call(q, key, value, causal=causal, cu_seqlens=borders)
        return out.detach(), *torch.autograd.grad(out, leaf, upstream.to(dtype))

    exact, plain = run(reference.attention, torch.float64), run(reference.attention, torch.bfloat16)
    found = [run(attention, torch.bfloat16) for _ in range(3)]
    for mine, truth, other in zip(found[0], exact, plain, strict=True):
        ulps = 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
        assert (mine - truth).abs().max() <= 2 * (other - truth).abs().max() + ulps
    assert all(torch.equal(x, y) for again in found[1:] for x, y in zip(again, found[0], strict=True))
