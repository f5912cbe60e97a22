"""The projector at the recipe's sizes: features of 577 rows, of which 576 are written into sequences of 1024.

Transformer Engine's part is two `Linear`. Its `LayerNormMLP` norms its input and gives rows as wide as those it took,
so it computes something else.

Shapes: N pictures, P patches, F projector hidden, D hidden, T tokens.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.nn import functional

from vlm_kernels import reference
from vlm_kernels.projector import project_image_tokens

P, D_VISION, F, D, LENGTH = 576, 1024, 4096, 4096, 1024


def inputs(num_pictures, dtype=torch.bfloat16):
    """features, fc1, fc2, bias1, bias2, into; positions. As in pretraining, the projector alone learns."""
    torch.manual_seed(0)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, device="cuda", dtype=torch.float32) * scale).to(dtype)

    tensors = [random(num_pictures, 1 + P, D_VISION), random(F, D_VISION, scale=D_VISION**-0.5)]
    tensors += [random(D, F, scale=F**-0.5), random(F), random(D), random(num_pictures * LENGTH, D)]
    first = torch.arange(num_pictures, device="cuda")[:, None] * LENGTH + 1
    return tensors, (first + torch.arange(P, device="cuda")).flatten()


def by_engine(features, fc1, fc2, bias1, bias2, into, positions):
    """Two of Transformer Engine's linear layers, and the rows placed with index_copy."""
    engine = importlib.import_module("transformer_engine.pytorch")
    layers = []
    for weight, bias in ((fc1, bias1), (fc2, bias2)):
        layer = engine.Linear(weight.shape[1], weight.shape[0], params_dtype=weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        layers.append(layer)

    def call():
        hidden = functional.gelu(layers[0](features[:, 1:].flatten(0, 1)))
        return into.index_copy(0, positions, layers[1](hidden))

    return call, [parameter for layer in layers for parameter in layer.parameters()]


@pytest.mark.parametrize("stage", ["forward", "forward + backward"])
@pytest.mark.parametrize("num_pictures", [16, 64])
@pytest.mark.parametrize("provider", ["ours", "transformer_engine", "eager"])
def test_project_image_tokens(measure, provider, num_pictures, stage):
    def make():
        tensors, positions = inputs(num_pictures)
        learn = [x.requires_grad_() for x in tensors[1:5]]
        features, fc1, fc2, bias1, bias2, into = tensors
        if provider == "transformer_engine":
            forward, learn = by_engine(*tensors, positions)
        else:
            function = project_image_tokens if provider == "ours" else reference.project_image_tokens

            def forward():
                return function(features, fc1, fc2, bias1=bias1, bias2=bias2, into=into, positions=positions)

        upstream = torch.randn_like(into)
        return forward if stage == "forward" else lambda: torch.autograd.grad(forward(), learn, upstream)

    rows = num_pictures * P
    # Forward two products; backward dW1, dW2 and da. Frozen features need no gradient.
    multiplied = D_VISION * F + F * D + (0 if stage == "forward" else D_VISION * F + 2 * F * D)
    measure(
        make,
        provider=provider,
        operation="project_image_tokens",
        shape=f"N {num_pictures}, P {P}, {D_VISION} -> {F} -> {D}, T {num_pictures * LENGTH}",
        dtype="bfloat16",
        stage=stage,
        flop=2 * rows * multiplied,
        moved_bytes=2 * (rows * D_VISION + D_VISION * F + F * D + 2 * num_pictures * LENGTH * D),
    )


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_error(activation):
    """Twice the error of the same formula in bf16, as in the tests, on what only a GPU runs: wgmma and cuBLAS."""
    tensors, positions = inputs(2)
    upstream = torch.randn_like(tensors[-1])

    def run(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        features, fc1, fc2, bias1, bias2, into = leaves
        out = function(
            features, fc1, fc2, bias1=bias1, bias2=bias2, activation=activation, into=into, positions=positions
        )
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    exact = run(reference.project_image_tokens, torch.float64)
    plain = run(reference.project_image_tokens, torch.bfloat16)
    for mine, truth, other in zip(run(project_image_tokens, torch.bfloat16), exact, plain, strict=True):
        ulps = 4 * torch.finfo(mine.dtype).eps * truth.abs().max()
        assert (mine - truth).abs().max() <= 2 * (other - truth).abs().max() + ulps
