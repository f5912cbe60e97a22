"""Decoding through the kernels, against the same model in plain PyTorch: cache, key ranges and packed prompts fit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

import model_fixtures as fixtures

from vlm import parallel
from vlm.batch import pack

SHAPES = [(70, 2), (3, 0), (15, 1)]  # more keys than one tile has, and fewer
STEPS = 3
NUM_SLOTS = 80


def logits(backend, tokens=None):
    """Of the prompts and of STEPS more tokens: `tokens` [STEPS, B], or the likeliest."""
    model = fixtures.for_kernels(backend).eval()
    samples, pictures = fixtures.conversations(SHAPES, seed=4)
    lengths = [length for length, _ in SHAPES]
    batch = pack(samples, pictures, [str(n) for n in lengths], sum(lengths), fixtures.IMAGE_SIZE)
    cache = model.language_model.cache(len(SHAPES), NUM_SLOTS)
    found = [model.prefill(batch, cache.prompts(lengths))]
    for step in range(STEPS):
        found.append(model.step(found[-1].argmax(1) if tokens is None else tokens[step], cache))
    return torch.stack(found)


@pytest.mark.interpreted
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/unit/test_generate_captured.py compares them on a GPU")
def test_decoding_through_the_kernels_equals_plain_pytorch(monkeypatch):
    fixtures.initialize()
    launches = []
    kernels = sys.modules["vlm_kernels.attention"]  # the package's attribute of this name is the function
    original = kernels._decode
    monkeypatch.setattr(kernels, "_decode", lambda *given: (launches.append(given), original(*given))[1])
    try:
        plain = logits("torch")
        assert not launches
        found = logits("triton", plain.argmax(-1))
    finally:
        parallel.destroy()
    assert len(launches) == STEPS * fixtures.KERNELS_LANGUAGE["num_hidden_layers"]
    assert plain.std() > 0.1
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)
