"""Cached decoding of packed prompts against each prompt alone, from scratch at every step."""

from __future__ import annotations

import model_fixtures as fixtures
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlm import parallel
from vlm.batch import pack
from vlm_kernels import reference

SHAPES = [(17, 1), (5, 0), (30, 2), (17, 0)]
NEW_TOKENS = 6
NUM_SLOTS = 64
NOISE = 2e-5  # fp32 sums in another order; logits are of size 5


@pytest.fixture(autouse=True, scope="module")
def groups():
    fixtures.initialize()
    yield
    parallel.destroy()


@pytest.fixture(scope="module")
def model(groups):
    return fixtures.ours(fixtures.huggingface()).eval()


@pytest.fixture(scope="module")
def prompts():
    samples, images = fixtures.conversations(SHAPES)
    rest = list(images)
    return [(sample, [rest.pop(0) for _ in range(count)]) for sample, (_, count) in zip(samples, SHAPES, strict=True)]


@pytest.fixture(scope="module")
def alone(model, prompts):
    """Per prompt: the greedy tokens and their logits [NEW_TOKENS, V]."""
    device, results = parallel.device(), []
    for sample, images in prompts:
        tokens, logits = torch.from_numpy(sample.tokens_L)[None].to(device), []
        stack = torch.from_numpy(np.stack(images)).to(device) if images else None
        slots = torch.from_numpy(sample.image_positions).to(device)
        for _ in range(NEW_TOKENS):
            positions = torch.arange(tokens.shape[1], device=device)[None]
            logits.append(model.logits(tokens, positions, images=stack, image_positions=slots))
            tokens = torch.cat([tokens, logits[-1].argmax(1, keepdim=True)], dim=1)
        results.append((tokens[0, -NEW_TOKENS:], torch.cat(logits)))
    return results


def generated(model, prompts, cache, choose=None):
    """Logits [B, NEW_TOKENS, V]; `choose` gives the tokens [B] after a step instead of the likeliest."""
    samples, pictures = [sample for sample, _ in prompts], [image for _, images in prompts for image in images]
    lengths = [len(sample) for sample in samples]
    batch = pack(samples, pictures, [str(n) for n in lengths], sum(lengths), fixtures.IMAGE_SIZE)
    logits = [model.prefill(batch.to(parallel.device()), cache.prompts(lengths))]
    for step in range(NEW_TOKENS - 1):
        logits.append(model.step(choose(step) if choose else logits[-1].argmax(1), cache))
    return torch.stack(logits, dim=1)


def test_batch_of_mixed_lengths_equals_one_by_one(model, prompts, alone):
    got = generated(model, prompts, model.language_model.cache(len(prompts), NUM_SLOTS))
    for row, (wanted_tokens, wanted) in enumerate(alone):
        torch.testing.assert_close(got[row], wanted, atol=NOISE, rtol=0)
        assert got[row].argmax(1).tolist() == wanted_tokens.tolist()


def test_a_cache_forgets_the_batch_before(model, prompts, alone):
    cache = model.language_model.cache(len(prompts), NUM_SLOTS)
    for order in (slice(None), slice(None, None, -1)):  # a longer prompt before a shorter one, and the reverse
        got = generated(model, prompts[order], cache)
        for row, (_, wanted) in zip(got, alone[order], strict=True):
            torch.testing.assert_close(row, wanted, atol=NOISE, rtol=0)


def test_samples_do_not_see_each_other(model, prompts):
    """Not to the bit alone: other tokens said about the others change nothing."""
    cache = model.language_model.cache(2, NUM_SLOTS)
    first, second = (
        generated(model, prompts[:2], cache, choose=lambda _, other=other: torch.tensor([40, other]).to(cache.device))
        for other in (41, 99)
    )
    torch.testing.assert_close(first[0], second[0], atol=0, rtol=0)
    assert not torch.equal(first[1], second[1])


def test_attention_looks_at_the_ranges_once(model, prompts, monkeypatch):
    """A look waits for the device, and no graph can be captured around one."""
    looks = []
    original = reference._check_ranges
    monkeypatch.setattr(reference, "_check_ranges", lambda x, n: (looks.append((x, x._version)), original(x, n)))
    cache = model.language_model.cache(len(prompts), NUM_SLOTS)
    for _ in range(2):
        generated(model, prompts, cache)
    ranges, version = looks[0]
    assert len(looks) == 2 * (NEW_TOKENS - 1) * fixtures.LANGUAGE["num_hidden_layers"]
    assert all(seen is ranges and other == version for seen, other in looks)  # what is known of it stays known
    assert ranges[:, 1].tolist() == [length + NEW_TOKENS - 1 for length, _ in SHAPES]  # and yet it moved


class NothingFromTheHost(TorchDispatchMode):
    """Refuses what a captured CUDA graph cannot hold: values that Python reads, sizes made of them, new constants."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "equal")

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.calls += 1
        name = function._schema.name.removeprefix("aten::")
        assert not name.startswith(self.REFUSED), name
        return function(*arguments, **(options or {}))


def test_a_step_takes_nothing_from_the_host(model, monkeypatch):
    cache = model.language_model.cache(2, NUM_SLOTS)
    cache.prompts([3, 0])
    tokens = torch.zeros(2, dtype=torch.long, device=cache.device)
    model.step(tokens, cache)  # the ranges are looked at here, once
    with NothingFromTheHost() as mode, monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "tolist", lambda x: pytest.fail("a list of values"))  # no operation, on the CPU
        model.step(tokens, cache).argmax(-1)
    assert mode.calls > 30
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingFromTheHost():
        tokens.sum().item()


def test_a_full_cache_and_other_batches_are_refused(model, prompts):
    cache = model.language_model.cache(2, 6)
    with pytest.raises(ValueError, match=r"holds 6 tokens of each of 2 samples, received 2 samples of up to 7"):
        cache.prompts([7, 2])
    with pytest.raises(ValueError, match=r"holds 6 tokens of each of 2 samples, received 3 samples of up to 4"):
        cache.prompts([1, 4, 2])
    cache.prompts([4, 5])
    cache.next()
    with pytest.raises(ValueError, match="the cache is full: a sample already has 6 tokens"):
        cache.next()


def test_wrong_pictures_are_refused(model):
    device = parallel.device()
    tokens = positions = torch.zeros(2, 4, dtype=torch.long, device=device)
    pixels = torch.zeros(1, 3, 24, 24, dtype=torch.uint8, device=device)
    with pytest.raises(
        ValueError, match=r"images: expected uint8 \[N, 3, 24, 24\], received torch.uint8 \(1, 3, 8, 8\)"
    ):
        model.image_features(pixels[:, :, :8, :8])
    with pytest.raises(ValueError, match=r"positions: expected \[9\]"):
        model.logits(tokens, positions, images=pixels, image_positions=torch.arange(8, device=device))
