"""All backends build the same model: from the same weights, the same losses and gradients."""

from __future__ import annotations

import model_fixtures as fixtures
import pytest
import torch

from vlm import parallel
from vlm.batch import PackedBatch, pack

GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True, scope="module")
def groups():
    fixtures.initialize()
    yield
    parallel.destroy()


def batch() -> PackedBatch:
    shapes = [(70, 2), (3, 0), (128, 1), (40, 0)]
    samples, pictures = fixtures.conversations(shapes, seed=4)
    return pack(samples, pictures, [str(shape) for shape in shapes], 256, fixtures.IMAGE_SIZE)


def losses_and_gradients(backend: str, dtype: str, weights: dict[str, torch.Tensor] | None = None):
    model = fixtures.for_kernels(backend, dtype)
    if weights is not None:
        assert weights.keys() == dict(model.named_parameters()).keys()  # so every backend reads the same checkpoints
        model.load_state_dict(weights, strict=False)
    device = parallel.device()
    losses = model(batch().to(device))
    upstream = torch.linspace(0.5, 1.5, len(losses), device=device)
    losses.backward(upstream)
    found = {"losses": losses.detach().double().cpu()}
    found |= {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return found, {name: p.detach().clone() for name, p in model.named_parameters()}


def difference(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm().clamp_min(1e-12))


@pytest.mark.skipif(GPU, reason="on a GPU the kernels run, and are compared below")
def test_on_the_cpu_the_triton_backend_is_the_torch_backend():
    plain, weights = losses_and_gradients("torch", "float32")
    ours, _ = losses_and_gradients("triton", "float32", weights)
    assert plain.keys() == ours.keys() and len(plain) > 30
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("backend", ["triton", "transformer_engine"])
def test_backends_agree_on_a_gpu(backend: str) -> None:
    """In bf16 no further from the fp32 model than twice what plain PyTorch is, loss by loss and weight by weight."""
    exact, weights = losses_and_gradients("torch", "float32")
    plain, _ = losses_and_gradients("torch", "bfloat16", weights)
    found, _ = losses_and_gradients(backend, "bfloat16", weights)
    assert found.keys() == exact.keys()
    worst = {name: (difference(found[name], exact[name]), difference(plain[name], exact[name])) for name in exact}
    print(backend, max(worst.values()), worst["losses"])
    far = {name: pair for name, pair in worst.items() if pair[0] > 2 * pair[1] + 2e-3}
    assert not far
