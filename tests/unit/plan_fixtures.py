"""The recipe's settings with changes, small models' sizes, and the bytes that autograd keeps of a real forward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from model_fixtures import IMAGE_SIZE, LANGUAGE, SEQUENCE_LENGTH, VISION, packed

from vlm import config as configuration
from vlm import resources
from vlm.config import Config
from vlm.model import build, layers
from vlm.model.sizes import language_sizes, vision_sizes
from vlm.resources import Bases, memory
from vlm.resources.workload import Workload

ROOT = Path(__file__).parents[2]
SHAPES = [(40, 2), (30, 1), (26, 0)]
"""Tokens and pictures of the samples of the small models' batch."""
MISTRAL_LAYER = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336 + 2 * 4096
"""Parameters: queries, keys, values and output; gate, up and down; two norms."""
PARTS = {
    "projector": ("projector",),
    "projector+language": ("projector", "language"),
    "all": ("vision", "projector", "language"),
}


def tree(**changes: Any) -> dict[str, Any]:
    """config/config.yaml with changes by path, `parallel__tensor=2`."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    for path, value in changes.items():
        *above, last = path.split("__")
        place = content
        for key in above:
            place = place[key]
        place[last] = value
    return content


def settings(**changes: Any) -> Config:
    return configuration.validate(tree(**changes))


def alone(**changes: Any) -> Config:
    """The recipe on one GPU."""
    layout = {"ranks_per_node": 1, "tensor": 1, "distributed_optimizer": False}
    return settings(**{f"parallel__{key}": value for key, value in layout.items()} | changes)


def recipe_bases(num_layers: int = 32) -> Bases:
    """Mistral and CLIP, with so many layers."""
    bases = resources.bases(settings())
    return replace(bases, language=replace(bases.language, num_layers=num_layers))


def small_bases() -> Bases:
    configs = {"language": LANGUAGE, "vision": VISION}
    return Bases(language_sizes(LANGUAGE), vision_sizes(VISION), configs, {"language": "-", "vision": "-"})


class _Norm(torch.autograd.Function):
    """RMSNorm that keeps what PyTorch's CUDA kernel keeps. On a CPU PyTorch composes it and keeps every step."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        raise AssertionError("only what is kept is looked at")


def kept_bytes(trainable: tuple[str, ...], **layout: Any) -> int:
    """Bytes that autograd keeps for backward in a forward pass of the small models on this rank, each storage once;
    weights, the batch and the loss left out. After `vlm.parallel.initialize`."""
    from model_fixtures import settings as of_model

    rms_norm = layers.functional.rms_norm
    layers.functional.rms_norm = lambda x, _, weight, eps: _Norm.apply(x, weight, eps)
    try:
        model = build(LANGUAGE, VISION, of_model(**layout))
        model.freeze(trainable)
        model.train()
        batch = packed(SHAPES)
        own = [*model.parameters(), *model.buffers(), *(x for x in vars(batch).values() if torch.is_tensor(x))]
        known = {tensor.untyped_storage().data_ptr() for tensor in own}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.hidden(batch, rows=None if model.config.sequence_parallel else batch.trained_positions)
    finally:
        layers.functional.rms_norm = rms_norm
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def estimated_bytes(trainable: tuple[str, ...], **layout: Any) -> int:
    """What `vlm.resources.memory` expects for the same, without the layer that is computed again under recompute. Added
    is what it leaves out, being small in a real model: the rotary table, and pixels where the vision model learns."""
    config = settings(
        dtype="float32",
        kernels__backend="torch",
        models__projector__hidden_size=LANGUAGE["hidden_size"],
        parallel=settings().parallel.model_dump()
        | {"tensor": 1, "distributed_optimizer": False, "recompute": False}
        | layout
        | {"ranks_per_node": layout.get("tensor", 1)},
    )
    slots = SEQUENCE_LENGTH
    sequence = Workload(slots=slots, tokens=slots, samples=3, pictures=3, trained_tokens=31, pairs=0)
    stage = config.stages["sft"].model_copy(update={"trainable": trainable})
    found = memory.on_stage(config, stage, small_bases(), sequence, 0)
    expected = found.activations + found.image_activations + slots * LANGUAGE["head_dim"] * 4
    if "vision" in trainable:
        expected += sum(images for _, images in SHAPES) * 3 * IMAGE_SIZE**2 * 4
    if config.parallel.recompute:
        expected -= memory.layer(config, small_bases(), slots, "language" in trainable)
    return expected
