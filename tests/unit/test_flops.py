"""The count of operations against PyTorch's own counter, which sees every product that is really computed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_fixtures import LANGUAGE, SEQUENCE_LENGTH, VISION, initialize, packed, settings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlm import parallel
from vlm.batch import PackedBatch
from vlm.model import build, flops
from vlm.model.sizes import language_sizes, vision_sizes
from vlm.train.feed import Feed

STAGES = {
    "pretrain": ("projector",),
    "sft": ("projector", "language"),
    "language-alone": ("language",),
    "all": ("vision", "projector", "language"),
    "vision-alone": ("vision",),
}


@pytest.fixture(autouse=True)
def groups():
    initialize()
    yield
    parallel.destroy()


def count(trainable: tuple[str, ...], feature_layer: int) -> flops.StepFlops:
    return flops.count(
        language_sizes(LANGUAGE),
        vision_sizes(VISION),
        projector_size=LANGUAGE["hidden_size"],
        feature_layer=feature_layer,
        trainable=trainable,
    )


def counted(trainable: tuple[str, ...], feature_layer: int, batch: PackedBatch) -> int:
    """Operations of a forward and backward pass, by PyTorch. Attention's products are computed one by one for it."""
    model = build(LANGUAGE, VISION, settings(feature_layer=feature_layer))
    model.freeze(trainable)
    model.train()

    def onednn(x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(x) * weight[0]

    mapping = {torch.ops.mkldnn._linear_pointwise: onednn}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(batch).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("feature_layer", [-1, -2])
@pytest.mark.parametrize("trainable", STAGES.values(), ids=STAGES)
def test_count_equals_pytorchs(trainable, feature_layer):
    """To the operation, but that PyTorch computes the whole square of a causal attention."""
    lengths = (40, 30, 26)
    assert sum(lengths) == SEQUENCE_LENGTH, "padding is computed and not counted"
    batch = packed([(lengths[0], 2), (lengths[1], 1), (lengths[2], 0)])
    cost = count(trainable, feature_layer)
    ours = cost(
        tokens=SEQUENCE_LENGTH,
        pairs=sum(length**2 for length in lengths),
        images=3,
        trained_tokens=len(batch.trained_positions),
    )
    assert ours == counted(trainable, feature_layer, batch)


def test_padding_is_not_counted():
    cost, batch = count(STAGES["sft"], -1), packed([(40, 1), (30, 1)])
    feed = Feed(iter([batch]), torch.device("cpu"), ["set"])
    next(feed)
    pairs = 40 * 41 // 2 + 30 * 31 // 2
    assert (feed.tokens, feed.pairs, feed.images, feed.trained) == (70, pairs, 2, [len(batch.trained_positions)])
    ours = cost(tokens=feed.tokens, pairs=feed.pairs, images=feed.images, trained_tokens=feed.trained[0])
    padding = SEQUENCE_LENGTH - 70
    squares = 40**2 + 30**2 + padding**2
    assert counted(STAGES["sft"], -1, batch) - ours == cost(
        tokens=padding, pairs=squares - pairs, images=0, trained_tokens=0
    )


def test_the_full_recipe_is_of_the_known_size():
    """Mistral-7B has 6.98e9 weights in its layers, and SFT takes six operations of each per token."""
    mistral = {"architectures": ["MistralForCausalLM"], "head_dim": 128, "vocab_size": 32768, "sliding_window": None}
    clip = {"architectures": ["CLIPVisionModel"], "hidden_size": 1024, "intermediate_size": 4096}
    clip |= {"num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14}
    sizes = language_sizes(mistral), vision_sizes(clip)
    sft, pretrain = (
        flops.count(*sizes, projector_size=4096, feature_layer=-1, trainable=STAGES[stage])
        for stage in ("sft", "pretrain")
    )
    last = 4096 * 4096 + 3 * 4096 * 14336  # of the last layer, after its attention
    assert sft.per_token == 6 * (32 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336) - last)
    assert sft.per_token == pytest.approx(6 * (6.98e9 - last), rel=1e-3)
    assert sft.per_trained_token == 6 * (last + 4096 * 32768)
    assert pretrain.per_token * 3 == sft.per_token * 2, "a frozen model has no weight gradients"
    # timm's table of models has 191.1 G multiply-adds for a ViT-L/14 at 336 pixels.
    assert pytest.approx(sft.per_image - 2 * 576 * (2 * 1024 * 4096 + 3 * 4096**2), rel=0.01) == 2 * 191e9


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "bfloat16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA GH200 480GB", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("CPU", "bfloat16", None),
    ],
)
def test_peak(name, dtype, peak):
    assert flops.peak(name, dtype) == peak
