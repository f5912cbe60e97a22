"""All backends build the same model: from the same weights, the same losses and gradients."""

from __future__ import annotations

import model_fixtures as fixtures
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


class BiasAdds(TorchDispatchMode):
    """Counts the sums of a tensor and a vector."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.add.Tensor:
            self.count += any(isinstance(x, torch.Tensor) and x.dim() == 1 for x in arguments)
        return function(*arguments, **(keywords or {}))


def test_products_of_a_frozen_vision_model_add_its_biases():
    model = fixtures.for_kernels("triton")
    images = batch().images.to(parallel.device())
    found = {}
    for trainable in (["vision"], ["projector"]):
        model.freeze(trainable)
        with BiasAdds() as adds:
            found[trainable[0]] = model.image_features(images).detach(), adds.count
    (learning, apart), (frozen, none) = found.values()
    assert apart > 0 and none == 0
    assert difference(frozen.double(), learning.double()) < (2e-2 if GPU else 1e-5)


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
