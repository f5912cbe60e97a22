"""Our model against `transformers` with the same random weights, in fp32. Tolerance of the recipe's verify: 1e-4."""

from __future__ import annotations

import copy
import dataclasses

import model_fixtures as fixtures
import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vlm import images as pictures
from vlm import parallel
from vlm.model.layers import rotary_frequencies
from vlm.model.sizes import CLIP_MEAN, CLIP_STD, language_sizes

TOLERANCE = 1e-4
# One picture, two pictures, text alone, and padding behind them.
SHAPES = [(31, 1), (20, 0), (33, 2)]


@pytest.fixture(autouse=True, scope="module")
def groups():
    fixtures.initialize()
    yield
    parallel.destroy()


def their_logits(model, sample, images):
    """[L, V] of one conversation alone."""
    pixels = (
        pictures.normalise(torch.from_numpy(np.stack(images)), CLIP_MEAN, CLIP_STD, torch.float32) if images else None
    )
    return model(input_ids=torch.from_numpy(sample.tokens_L)[None], pixel_values=pixels).logits[0]


def each(shapes, seed=0):
    """(sample, its pictures)"""
    samples, images = fixtures.conversations(shapes, seed)
    for sample, (_, count) in zip(samples, shapes, strict=True):
        yield sample, [images.pop(0) for _ in range(count)]


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_logits_and_features_equal_transformers(feature_layer):
    reference = fixtures.huggingface(feature_layer)
    model = fixtures.ours(reference, feature_layer=feature_layer)
    for sample, images in each(SHAPES):
        wanted = their_logits(reference, sample, images).detach()
        tokens = torch.from_numpy(sample.tokens_L)[None]
        stack = torch.from_numpy(np.stack(images)) if images else None
        positions = torch.arange(tokens.shape[1])[None]
        got = model.logits(
            tokens,
            positions,
            images=stack,
            image_positions=torch.from_numpy(sample.image_positions),
            last_only=False,
        )[0]
        assert wanted.std() > 0.5  # logits of constant models would agree too
        torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)
        if stack is not None:
            pixels = pictures.normalise(stack, CLIP_MEAN, CLIP_STD, torch.float32)
            features = reference.model.vision_tower(pixels, output_hidden_states=True).hidden_states[feature_layer]
            torch.testing.assert_close(model.image_features(stack), features[:, 1:], atol=TOLERANCE, rtol=0)


# Of 8 frequencies 2 stay, 1 is in between and 5 are divided.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


def test_stretched_positions_equal_transformers_beyond_those_of_pretraining():
    reference = fixtures.huggingface(rope=LLAMA3)
    model = fixtures.ours(reference)
    sizes = model.language_model.sizes
    theirs, factor = ROPE_INIT_FUNCTIONS["llama3"](reference.config.text_config, torch.device("cpu"))
    found = rotary_frequencies(sizes.head_dim, sizes.rope_theta, sizes.rope_scaling)
    torch.testing.assert_close(found, theirs, atol=0, rtol=1e-6)
    kept = found / rotary_frequencies(sizes.head_dim, sizes.rope_theta, None)
    assert (kept == 1).sum() == 2 and (kept == 0.125).sum() == 5 and factor == 1
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, fixtures.LANGUAGE["vocab_size"], (2, 200), generator=generator)
    got = model.logits(tokens, torch.arange(200).expand(2, -1), last_only=False)
    torch.testing.assert_close(got, reference(input_ids=tokens).logits, atol=TOLERANCE, rtol=0)
    unscaled = fixtures.huggingface()(input_ids=tokens).logits
    assert (unscaled - got).abs().max() > 0.1, "positions hardly matter here, so the comparison shows nothing"


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {"type" if k == "rope_type" else k: v for k, v in LLAMA3.items()}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 1.0}},
    ],
    ids=["transformers-5", "transformers-4", "transformers-4.42", "both"],
)
def test_every_spelling_of_stretched_positions_means_what_transformers_reads(spelling):
    from transformers import LlamaConfig

    plain = {key: value for key, value in fixtures.LANGUAGE.items() if key not in ("rope_theta", "architectures")}
    config = plain | spelling | {"architectures": ["LlamaForCausalLM"]}
    theirs = LlamaConfig(**copy.deepcopy(config)).rope_parameters
    sizes = language_sizes(config)
    assert sizes.rope_theta == theirs["rope_theta"] == 5e5
    found = dataclasses.asdict(sizes.rope_scaling)
    assert found.pop("original_max_positions") == theirs["original_max_position_embeddings"]
    assert found == {name: theirs[name] for name in found}


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied-head"])
def test_packed_losses_and_gradients_equal_transformers_sample_by_sample(tied):
    """Packing changes nothing: no attention across samples, positions restart, the head sees trained rows only."""
    reference = fixtures.huggingface(tied=tied)
    model = fixtures.ours(reference)
    model.freeze(["projector", "language"])
    wanted = []
    for sample, images in each(SHAPES):
        trained = np.flatnonzero(sample.trained_L[1:])
        targets = torch.from_numpy(sample.tokens_L[trained + 1])
        wanted.append(
            functional.cross_entropy(their_logits(reference, sample, images)[trained], targets, reduction="none")
        )
    losses = model(fixtures.packed(SHAPES))
    torch.testing.assert_close(losses, torch.cat(wanted), atol=TOLERANCE, rtol=0)
    upstream = torch.randn(len(losses), generator=torch.Generator().manual_seed(1))
    losses.backward(upstream)
    torch.cat(wanted).backward(upstream)
    theirs = {name: p.grad for name, p in reference.named_parameters() if "vision_tower" not in name}
    if not tied:
        theirs["lm_head.weight"] = reference.lm_head.weight.grad
    theirs |= {n: torch.zeros_like(p) for n, p in reference.state_dict().items() if "vision_tower" in n}
    for name, gradient in fixtures.translated(theirs, model).items():
        if not name.startswith("vision_model"):
            got = dict(model.named_parameters())[name].grad
            scale = gradient.abs().max().item()
            assert scale > 0, name
            torch.testing.assert_close(
                got, gradient, atol=1e-5 * scale + 1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_picture_in_another_sample_changes_nothing_here():
    model = fixtures.ours(fixtures.huggingface())
    batch = fixtures.packed([(30, 1), (30, 1)])
    before = model(batch)
    batch.images[1] = 255 - batch.images[1]
    after = model(batch)
    trained_each = len(before) // 2
    torch.testing.assert_close(after[:trained_each], before[:trained_each], rtol=0, atol=0)
    assert (after[trained_each:] - before[trained_each:]).abs().max() > 1e-3


def test_bfloat16_stays_near_float32():
    """Same weights rounded to bf16: losses differ by rounding, not by a wrong scale, mask or position."""
    reference = fixtures.huggingface()
    exact = fixtures.ours(reference)
    rounded = fixtures.ours(reference, dtype="bfloat16")
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    batch = fixtures.packed(SHAPES)
    losses, wanted = rounded(batch), exact(batch)
    assert losses.dtype == torch.float32
    assert (losses - wanted).abs().mean() < 0.02 * wanted.mean()
    losses.sum().backward()
    assert rounded.vision_projection.encoder.linear_fc1.weight.grad.any()
