"""The names and layouts of every weight in Hugging Face and in Megatron, written once and read both ways.

A `Row` says which Hugging Face tensors make up one tensor of ours and how they are joined. Converting joins, exporting
splits. Layouts follow Megatron-LM's `LLaVAModel`; norms carry the names of its local (not Transformer Engine) layers.
Joined tensors are the global ones of a distributed checkpoint, so they do not depend on the tensor-parallel size:
fc1 of SwiGLU is [gate; up] as `megatron/core/transformer/mlp.py: apply_swiglu_sharded_factory` stores it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm.model.sizes import language_sizes, vision_sizes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How tensors of one row are joined into ours, and split again."""

    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor, list[Shape]], list[Tensor]]


def _stack(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors)


def _unstack(tensor: Tensor, shapes: list[Shape]) -> list[Tensor]:
    return list(tensor.split([shape[0] for shape in shapes]))


COPY = Layout(lambda tensors: tensors[0], lambda tensor, shapes: [tensor])
STACK = Layout(_stack, _unstack)
"""[gate; up]"""
CLASS_TOKEN = Layout(lambda tensors: tensors[0].view(1, 1, -1), lambda tensor, shapes: [tensor.reshape(-1)])


def grouped(num_groups: int) -> Layout:
    """q, k and v interleaved per key-value group: [group, (q heads of the group, k, v) x head_dim, ...], flattened.

    For CLIP every head is its own group. No rotary permutation: both sides rotate halves.
    """

    def join(tensors: list[Tensor]) -> Tensor:
        parts = [tensor.view(num_groups, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def split(tensor: Tensor, shapes: list[Shape]) -> list[Tensor]:
        parts = tensor.view(num_groups, -1, *tensor.shape[1:])
        return [
            part.reshape(shape)
            for part, shape in zip(parts.split([s[0] // num_groups for s in shapes], dim=1), shapes, strict=True)
        ]

    return Layout(join, split)


def fused(num_groups: int) -> Layout:
    """As `grouped`, of one tensor [q; k; v], as PyTorch's MultiheadAttention keeps it, which OpenAI's CLIP uses."""
    layout = grouped(num_groups)

    def split(tensor: Tensor, shapes: list[Shape]) -> list[Tensor]:
        rows, *rest = shapes[0]
        return [torch.cat(layout.split(tensor, [(rows // 3, *rest)] * 3))]

    return Layout(lambda tensors: layout.join(list(tensors[0].chunk(3))), split)


@dataclass(frozen=True)
class Row:
    """One tensor of ours and the Hugging Face tensors it is made of."""

    ours: str
    theirs: tuple[str, ...]
    dims: tuple[tuple[str, ...], ...]
    """Shape of each of `theirs`, as names of sizes in the table."""
    shapes: tuple[Shape, ...]
    layout: Layout

    @property
    def shape(self) -> Shape:
        """Shape of our tensor."""
        if self.layout is CLASS_TOKEN:
            return (1, 1, *self.shapes[0])
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Their tensors, in the order of `theirs`, to ours."""
        return self.layout.join(tensors).contiguous()

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensor to theirs. Rows of vocabulary padding beyond `shape` are cut off."""
        pieces = self.layout.split(tensor[: self.shape[0]], list(self.shapes))
        return {name: piece.contiguous() for name, piece in zip(self.theirs, pieces, strict=True)}


@dataclass(frozen=True)
class Table:
    """All rows of one part, and the foreign tensors that are known and left out."""

    rows: tuple[Row, ...]
    ignored: re.Pattern[str]


_LANGUAGE_LAYER = (
    # ours, theirs, sizes of theirs
    ("input_layernorm.weight", ("input_layernorm.weight",), ("hidden",)),
    ("self_attention.linear_qkv.weight", tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), ("q kv kv", "hidden")),
    ("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), ("hidden", "q")),
    ("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), ("hidden",)),
    ("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), ("intermediate", "hidden")),
    ("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), ("hidden", "intermediate")),
)
_LANGUAGE_ENDS = (
    ("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("vocab", "hidden")),
    ("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",)),
    ("output_layer.weight", ("lm_head.weight",), ("vocab", "hidden")),
)
_VISION_LAYER = (
    ("input_layernorm.weight", ("layer_norm1.weight",), ("hidden",)),
    ("input_layernorm.bias", ("layer_norm1.bias",), ("hidden",)),
    ("self_attention.linear_qkv.weight", tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), ("hidden", "hidden")),
    ("self_attention.linear_qkv.bias", tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), ("hidden",)),
    ("self_attention.linear_proj.weight", ("self_attn.out_proj.weight",), ("hidden", "hidden")),
    ("self_attention.linear_proj.bias", ("self_attn.out_proj.bias",), ("hidden",)),
    ("pre_mlp_layernorm.weight", ("layer_norm2.weight",), ("hidden",)),
    ("pre_mlp_layernorm.bias", ("layer_norm2.bias",), ("hidden",)),
    ("mlp.linear_fc1.weight", ("mlp.fc1.weight",), ("intermediate", "hidden")),
    ("mlp.linear_fc1.bias", ("mlp.fc1.bias",), ("intermediate",)),
    ("mlp.linear_fc2.weight", ("mlp.fc2.weight",), ("hidden", "intermediate")),
    ("mlp.linear_fc2.bias", ("mlp.fc2.bias",), ("hidden",)),
)
_VISION_ENDS = (
    ("class_token", ("embeddings.class_embedding",), ("hidden",)),
    ("conv1.weight", ("embeddings.patch_embedding.weight",), ("hidden", "channels", "patch", "patch")),
    ("position_embeddings.weight", ("embeddings.position_embedding.weight",), ("positions", "hidden")),
    ("ln_pre.weight", ("pre_layrnorm.weight",), ("hidden",)),
    ("ln_pre.bias", ("pre_layrnorm.bias",), ("hidden",)),
    # No module of ours reads these two (LLaVA takes hidden states before them); kept so that the way back is complete.
    ("ln_post.weight", ("post_layernorm.weight",), ("hidden",)),
    ("ln_post.bias", ("post_layernorm.bias",), ("hidden",)),
)
_OPENAI_LAYER = (
    ("input_layernorm.weight", ("ln_1.weight",), ("hidden",)),
    ("input_layernorm.bias", ("ln_1.bias",), ("hidden",)),
    ("self_attention.linear_qkv.weight", ("attn.in_proj_weight",), ("qkv", "hidden")),
    ("self_attention.linear_qkv.bias", ("attn.in_proj_bias",), ("qkv",)),
    ("self_attention.linear_proj.weight", ("attn.out_proj.weight",), ("hidden", "hidden")),
    ("self_attention.linear_proj.bias", ("attn.out_proj.bias",), ("hidden",)),
    ("pre_mlp_layernorm.weight", ("ln_2.weight",), ("hidden",)),
    ("pre_mlp_layernorm.bias", ("ln_2.bias",), ("hidden",)),
    ("mlp.linear_fc1.weight", ("mlp.c_fc.weight",), ("intermediate", "hidden")),
    ("mlp.linear_fc1.bias", ("mlp.c_fc.bias",), ("intermediate",)),
    ("mlp.linear_fc2.weight", ("mlp.c_proj.weight",), ("hidden", "intermediate")),
    ("mlp.linear_fc2.bias", ("mlp.c_proj.bias",), ("hidden",)),
)
_OPENAI_ENDS = (
    ("class_token", ("class_embedding",), ("hidden",)),
    ("conv1.weight", ("conv1.weight",), ("hidden", "channels", "patch", "patch")),
    ("position_embeddings.weight", ("positional_embedding",), ("positions", "hidden")),
    ("ln_pre.weight", ("ln_pre.weight",), ("hidden",)),
    ("ln_pre.bias", ("ln_pre.bias",), ("hidden",)),
    ("ln_post.weight", ("ln_post.weight",), ("hidden",)),
    ("ln_post.bias", ("ln_post.bias",), ("hidden",)),
)
_PROJECTOR = (
    ("encoder.linear_fc1.weight", ("linear_1.weight",), ("intermediate", "vision")),
    ("encoder.linear_fc1.bias", ("linear_1.bias",), ("intermediate",)),
    ("encoder.linear_fc2.weight", ("linear_2.weight",), ("language", "intermediate")),
    ("encoder.linear_fc2.bias", ("linear_2.bias",), ("language",)),
)
Line = tuple[str, tuple[str, ...], tuple[str, ...]]


def _row(line: Line, ours: str, theirs: str, sizes: Mapping[str, tuple[str, int]], num_groups: int) -> Row:
    """Fill one line of a table: prefixes before the names, numbers for the sizes."""
    name, sources, dims = line
    first = dims[0].split()
    rows = [(first[min(i, len(first) - 1)], *dims[1:]) for i in range(len(sources))]
    layout = COPY
    if "linear_qkv" in name:
        layout = grouped(num_groups) if len(sources) > 1 else fused(num_groups)
    elif len(sources) > 1:
        layout = STACK
    elif name == "class_token":
        layout = CLASS_TOKEN
    return Row(
        ours + name,
        tuple(theirs + source for source in sources),
        tuple(tuple(sizes[dim][0] for dim in row) for row in rows),
        tuple(tuple(sizes[dim][1] for dim in row) for row in rows),
        layout,
    )


def _table(
    ends: Iterable[Line], layer: Iterable[Line], num_layers: int, ours: str, theirs: str, layers: str, **fill: Any
) -> tuple[Row, ...]:
    rows = [_row(line, ours, theirs, **fill) for line in ends]
    for i in range(num_layers):
        rows += [_row(line, f"{ours}decoder.layers.{i}.", f"{theirs}{layers}{i}.", **fill) for line in layer]
    return tuple(rows)


def language_table(config: Mapping[str, Any], *, ours: str = "language_model.", theirs: str = "") -> Table:
    """Rows of a Mistral or Llama model.

    Args:
        config: its Hugging Face `config.json`.
        ours, theirs: prefixes of the names on both sides.

    Raises:
        ValueError: what `vlm.model.sizes.language_sizes` refuses, naming the key.
    """
    found = language_sizes(config)
    sizes = {
        "hidden": ("hidden_size", found.hidden_size),
        "intermediate": ("intermediate_size", found.ffn_hidden_size),
        "vocab": ("vocab_size", found.vocab_size),
        "q": ("num_attention_heads x head_dim", found.num_heads * found.head_dim),
        "kv": ("num_key_value_heads x head_dim", found.num_kv_heads * found.head_dim),
    }
    ends = _LANGUAGE_ENDS[:-1] if found.tied_embeddings else _LANGUAGE_ENDS
    fill = {"sizes": sizes, "num_groups": found.num_kv_heads}
    rows = _table(ends, _LANGUAGE_LAYER, found.num_layers, ours, theirs, "model.layers.", **fill)
    # A tied head may be stored a second time; the embedding is the one that counts.
    tied_head = rf"|{re.escape(theirs)}lm_head\.weight" if found.tied_embeddings else ""
    return Table(rows, re.compile(rf".*\.rotary_emb\.inv_freq{tied_head}"))


@dataclass(frozen=True)
class VisionNaming:
    """What a project calls the weights of a CLIP vision tower, and what else its files hold."""

    ends: tuple[Line, ...]
    layer: tuple[Line, ...]
    layers: str
    prefixes: tuple[str, ...]
    ignored: re.Pattern[str]


HUGGINGFACE = VisionNaming(
    _VISION_ENDS,
    _VISION_LAYER,
    "encoder.layers.",
    # In a CLIPModel and in files of transformers 4; transformers 5 writes a CLIPVisionModel without.
    ("vision_model.", ""),
    re.compile(r"text_model\..*|(text|visual)_projection\.weight|logit_scale|.*\.position_ids"),
)
OPENAI = VisionNaming(
    _OPENAI_ENDS,
    _OPENAI_LAYER,
    "transformer.resblocks.",
    ("visual.",),
    re.compile(
        r"visual\.proj|transformer\..*|token_embedding\.weight|positional_embedding|ln_final\..*|text_projection"
        r"|logit_scale|input_resolution|context_length|vocab_size"
    ),
)


def vision_naming(names: Container[str]) -> tuple[VisionNaming, str]:
    """Whose names a file uses, and the prefix before them; Hugging Face's where it is no known one."""
    for naming in (HUGGINGFACE, OPENAI):
        for prefix in naming.prefixes:
            if prefix + naming.ends[0][1][0] in names:
                return naming, prefix
    return HUGGINGFACE, HUGGINGFACE.prefixes[-1]


def vision_table(
    config: Mapping[str, Any], *, ours: str = "vision_model.", theirs: str = "", naming: VisionNaming = HUGGINGFACE
) -> Table:
    """Rows of a CLIP vision tower, from the `config.json` of a `CLIPVisionModel` or of a whole `CLIPModel`.

    Raises:
        ValueError: what `vlm.model.sizes.vision_sizes` refuses, naming the key.
    """
    found = vision_sizes(config)
    sizes = {
        "hidden": ("hidden_size", found.hidden_size),
        "qkv": ("3 x hidden_size", 3 * found.hidden_size),
        "intermediate": ("intermediate_size", found.ffn_hidden_size),
        "channels": ("num_channels", 3),
        "patch": ("patch_size", found.patch_size),
        "positions": ("(image_size / patch_size)^2 + 1", found.num_image_tokens + 1),
    }
    fill = {"sizes": sizes, "num_groups": found.num_heads}
    rows = _table(naming.ends, naming.layer, found.num_layers, ours, theirs, naming.layers, **fill)
    return Table(rows, naming.ignored)


def projector_table(
    vision_hidden: int,
    hidden: int,
    language_hidden: int,
    *,
    bias: bool,
    ours: str = "vision_projection.",
    theirs: str = "multi_modal_projector.",
) -> Table:
    """Rows of the two-layer projector: vision_hidden -> hidden -> language_hidden."""
    sizes = {
        "vision": ("vision hidden_size", vision_hidden),
        "intermediate": ("models.projector.hidden_size", hidden),
        "language": ("language hidden_size", language_hidden),
    }
    lines = [line for line in _PROJECTOR if bias or line[0].endswith("weight")]
    return Table(tuple(_row(line, ours, theirs, sizes, 1) for line in lines), re.compile(r"(?!)"))


def num_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
