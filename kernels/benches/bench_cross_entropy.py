"""Head and loss: the language-model head with its cross-entropy, and the cross-entropy of given logits.

Shapes: R rows of which some are trained, D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vlm_kernels import cross_entropy, reference
from vlm_kernels.cross_entropy import linear_cross_entropy, vocab_parallel_cross_entropy

D, V = 4096, 32768
# A pretraining pack trains about 6 % of its tokens (captions beside 576 patches). The model hands over trained rows
# only; here every provider gets all rows and the targets say which count, so that each handles ignored rows its way.
CASES = [pytest.param(8192, 1.0), pytest.param(8192, 0.06), pytest.param(16384, 0.06)]
HEADS = ["ours", "transformer_engine", "liger", "eager"]


def inputs(num_rows: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(V, D, device="cuda", dtype=torch.bfloat16) * 0.02).requires_grad_()
    target = torch.randint(V, (num_rows,), device="cuda")
    target[torch.rand(num_rows, device="cuda") >= share] = -100
    return hidden, weight, target


def head(provider: str, target: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(hidden, weight) to the mean loss of the trained rows."""
    trained = (target >= 0).sum()
    if provider == "ours":
        return lambda h, w: linear_cross_entropy(h, w, target).sum() / trained
    if provider == "transformer_engine":
        loss = importlib.import_module("transformer_engine.pytorch.cross_entropy").parallel_cross_entropy
        return lambda h, w: loss((h @ w.T)[None], target[None], 0.0, False, None, -100).sum() / trained
    if provider == "liger":
        return importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(ignore_index=-100)
    return lambda h, w: functional.cross_entropy((h @ w.T).float(), target, ignore_index=-100)


@pytest.mark.parametrize("frozen", [False, True], ids=["weight-learns", "weight-frozen"])
@pytest.mark.parametrize(("num_rows", "share"), CASES)
@pytest.mark.parametrize("provider", HEADS)
def test_linear_cross_entropy(measure, provider, num_rows, share, frozen):
    def make():
        hidden, weight, target = inputs(num_rows, share)
        weight.requires_grad_(not frozen)
        loss = head(provider, target)
        leaves = [x for x in (hidden, weight) if x.requires_grad]

        def call():
            arguments = (weight, hidden, target) if provider == "liger" else (hidden, weight)
            return torch.autograd.grad(loss(*arguments), leaves)

        return call

    # As counted work: two operations per multiply-add of trained rows, forward, dh and dw. Recomputing is not counted.
    products = 2 if frozen else 3
    measure(
        make,
        provider=provider,
        operation="linear_cross_entropy",
        shape=f"R {num_rows}, {share:.0%} trained, D {D}, V {V}, weight {'frozen' if frozen else 'learns'}",
        dtype="bfloat16",
        stage="forward + backward",
        flop=products * 2 * num_rows * share * D * V,
        moved_bytes=2 * (2 * num_rows * D + (1 if frozen else 2) * V * D),
    )


@pytest.mark.parametrize(("num_rows", "share"), CASES[:2])
@pytest.mark.parametrize("provider", ["ours", "transformer_engine", "eager"])
def test_vocab_parallel_cross_entropy(measure, provider, num_rows, share):
    def make():
        target = inputs(num_rows, share)[2]
        logits = torch.randn(num_rows, V, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        upstream = torch.randn(num_rows, device="cuda")
        if provider == "ours":
            return lambda: torch.autograd.grad(vocab_parallel_cross_entropy(logits, target), logits, upstream)
        if provider == "transformer_engine":
            loss = importlib.import_module("transformer_engine.pytorch.cross_entropy").parallel_cross_entropy
            return lambda: torch.autograd.grad(
                loss(logits[None], target[None], 0.0, False, None, -100), logits, upstream[None]
            )
        return lambda: torch.autograd.grad(reference.vocab_parallel_cross_entropy(logits, target), logits, upstream)

    measure(
        make,
        provider=provider,
        operation="vocab_parallel_cross_entropy",
        shape=f"R {num_rows}, {share:.0%} trained, V {V}",
        dtype="bfloat16",
        stage="forward + backward",
        flop=None,
        moved_bytes=2 * num_rows * V * (1 + 2 * share),  # read twice where trained, the gradient written everywhere
    )


@pytest.mark.parametrize("piece_bytes", [cross_entropy.PIECE_BYTES, 2**23], ids=["one-piece", "six-pieces"])
@pytest.mark.parametrize("share", [1.0, 0.06, 0.0], ids=["all-trained", "few-trained", "none-trained"])
def test_error(share, piece_bytes, monkeypatch):
    """Twice the error of the same formula in bf16, as in the tests, on what only a GPU runs: wgmma and cuBLAS."""
    monkeypatch.setattr(cross_entropy, "PIECE_BYTES", piece_bytes)
    hidden, weight, target = (x.detach() for x in inputs(700, share))
    upstream = torch.randn(700, device="cuda")

    def run(loss, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        out = loss(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    def eager(h, w):
        logits = h @ w.T
        return functional.cross_entropy(logits, target, ignore_index=-100, reduction="none")

    exact, plain = run(eager, torch.float64), run(eager, torch.bfloat16)
    for mine, truth, other in zip(
        run(lambda h, w: linear_cross_entropy(h, w, target), torch.bfloat16), exact, plain, strict=True
    ):
        ulps = 4 * torch.finfo(mine.dtype).eps * truth.abs().max()
        assert (mine - truth).abs().max() <= 2 * (other - truth).abs().max() + ulps
