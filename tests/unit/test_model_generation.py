"""Left-padded, cached decoding against each prompt alone, without padding and without a cache."""

from __future__ import annotations

import model_fixtures as fixtures
import numpy as np
import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext

from vlm import parallel

SHAPES = [(17, 1), (5, 0), (30, 2), (17, 0)]
NEW_TOKENS = 6
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
    """Per prompt: the greedy tokens and their logits [NEW_TOKENS, V], every step from scratch."""
    results = []
    for sample, images in prompts:
        tokens, logits = torch.from_numpy(sample.tokens_L)[None], []
        stack = torch.from_numpy(np.stack(images)) if images else None
        for _ in range(NEW_TOKENS):
            slots = torch.from_numpy(sample.image_positions)
            logits.append(
                model.logits(tokens, torch.arange(tokens.shape[1])[None], images=stack, image_positions=slots)
            )
            tokens = torch.cat([tokens, logits[-1].argmax(1, keepdim=True)], dim=1)
        results.append((tokens[0, -NEW_TOKENS:], torch.cat(logits)))
    return results


def padded(prompts):
    """tokens, positions, key mask, pictures and their flat slots, padded on the left."""
    longest = max(len(sample) for sample, _ in prompts)
    tokens, mask = torch.full((len(prompts), longest), 77), torch.zeros(len(prompts), longest, dtype=torch.bool)
    slots, stack = [], []
    for row, (sample, images) in enumerate(prompts):
        shift = longest - len(sample)
        tokens[row, shift:] = torch.from_numpy(sample.tokens_L)
        mask[row, shift:] = True
        slots.append(torch.from_numpy(sample.image_positions) + row * longest + shift)
        stack += images
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return tokens, positions, mask, torch.from_numpy(np.stack(stack)), torch.cat(slots)


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "from-scratch"])
def test_batch_of_mixed_lengths_equals_one_by_one(model, prompts, alone, cached):
    tokens, positions, mask, images, slots = padded(prompts)
    context = StaticInferenceContext(len(prompts), tokens.shape[1] + NEW_TOKENS) if cached else None
    logits = []
    for step in range(NEW_TOKENS):
        pictures = {} if cached and step else {"images": images, "image_positions": slots}
        logits.append(model.logits(tokens, positions, key_mask_BK=mask, inference_context=context, **pictures))
        new, place = logits[-1].argmax(1, keepdim=True), positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if cached:
            tokens, positions = new, place
        else:
            length = tokens.shape[1]
            slots = slots + slots // length  # rows grow by one
            tokens, positions = torch.cat([tokens, new], dim=1), torch.cat([positions, place], dim=1)
    for row, (wanted_tokens, wanted) in enumerate(alone):
        got = torch.stack([step[row] for step in logits])
        torch.testing.assert_close(got, wanted, atol=NOISE, rtol=0)
        assert got.argmax(1).tolist() == wanted_tokens.tolist()


def test_uniform_prompts_decode_without_a_mask(model, prompts, alone):
    (sample, images), (wanted_tokens, _) = prompts[0], alone[0]
    context = StaticInferenceContext(2, len(sample) + NEW_TOKENS)
    tokens = torch.from_numpy(sample.tokens_L).repeat(2, 1)
    slots = torch.from_numpy(sample.image_positions)
    arguments = {
        "images": torch.from_numpy(np.stack(images * 2)),
        "image_positions": torch.cat([slots, slots + len(sample)]),
    }
    positions, got = torch.arange(len(sample)).repeat(2, 1), []
    for _ in range(NEW_TOKENS):
        logits = model.logits(tokens, positions, inference_context=context, **arguments)
        tokens, positions, arguments = logits.argmax(1, keepdim=True), positions[:, -1:] + 1, {}
        got.append(tokens)
    assert torch.cat(got, dim=1).tolist() == [wanted_tokens.tolist()] * 2


def test_several_tokens_after_the_prompt_stay_causal(model, prompts, alone):
    """Verification feeds a whole continuation to a filled cache."""
    (sample, _), (wanted_tokens, wanted) = prompts[1], alone[1]
    context = StaticInferenceContext(1, len(sample) + NEW_TOKENS)
    model.logits(torch.from_numpy(sample.tokens_L)[None], torch.arange(len(sample))[None], inference_context=context)
    positions = torch.arange(len(sample), len(sample) + NEW_TOKENS - 1)[None]
    got = model.logits(wanted_tokens[None, :-1], positions, inference_context=context, last_only=False)[0]
    torch.testing.assert_close(got, wanted[1:], atol=NOISE, rtol=0)


def test_refuses_what_does_not_fit(model, prompts):
    tokens, positions = torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"key_mask_BK: expected \(2, 4\), received \(2, 3\)"):
        model.logits(tokens, positions, key_mask_BK=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="inference_context: holds 3 tokens of 2 samples, received 4 of 2"):
        model.logits(tokens, positions, inference_context=StaticInferenceContext(2, 3))
    with pytest.raises(
        ValueError, match=r"images: expected uint8 \[N, 3, 24, 24\], received torch.uint8 \(1, 3, 8, 8\)"
    ):
        model.image_features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"positions: expected \[9\]"):
        pixels = torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
        model.logits(tokens, positions, images=pixels, image_positions=torch.arange(8))
