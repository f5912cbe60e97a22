"""How many parameters each part has, whole and on one rank.

A rank of a tensor-parallel group holds 1/t of every matrix that megatron-core splits, and the whole of what it repeats:
norms, biases of row-parallel layers, and CLIP's embeddings. A pipeline stage holds its share of the language model's
layers; the first also the vision model, the projector and the embedding, the last the final norm and the head.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm.config import PARTS, Config, Parallel
from vlm.resources.bases import Bases


@dataclass(frozen=True)
class Count:
    """Parameters of a module, by whether tensor-parallel ranks split or repeat them."""

    split: int = 0
    repeated: int = 0

    @property
    def total(self) -> int:
        return self.split + self.repeated

    def on(self, tensor: int) -> int:
        """On one of so many ranks."""
        return self.split // tensor + self.repeated

    def __add__(self, other: Count) -> Count:
        return Count(self.split + other.split, self.repeated + other.repeated)

    def __mul__(self, times: int) -> Count:
        return Count(self.split * times, self.repeated * times)


def layer(bases: Bases) -> Count:
    """A layer of the language model: queries, keys, values, output; gate, up, down; two norms."""
    sizes = bases.language
    attention = sizes.hidden_size * sizes.head_dim * (2 * sizes.num_heads + 2 * sizes.num_kv_heads)
    return Count(attention + 3 * sizes.hidden_size * sizes.ffn_hidden_size, 2 * sizes.hidden_size)


def embedding(bases: Bases) -> Count:
    return Count(bases.language.vocab_size * bases.language.hidden_size)


def final_norm(bases: Bases) -> Count:
    return Count(0, bases.language.hidden_size)


def head(bases: Bases) -> Count:
    """Nothing where it is the embedding."""
    return Count() if bases.language.tied_embeddings else embedding(bases)


def vision(bases: Bases, feature_layer: int) -> Count:
    """The blocks that are built, the embeddings and the norm before them; no norm after them."""
    sizes = bases.vision
    width, inside = sizes.hidden_size, sizes.ffn_hidden_size
    block = Count(4 * width**2 + 2 * width * inside + 3 * width + inside, 2 * width + 4 * width)
    patches = 3 * sizes.patch_size**2 * width
    embeddings = Count(0, patches + (1 + sizes.num_image_tokens) * width + width + 2 * width)
    return block * sizes.num_built_layers(feature_layer) + embeddings


def projector(bases: Bases, config: Config) -> Count:
    wanted = config.models.projector
    into, inside, out = bases.vision.hidden_size, wanted.hidden_size, bases.language.hidden_size
    weights = Count((into + out) * inside)
    return weights + Count(inside, out) if wanted.bias else weights


def of_parts(bases: Bases, config: Config) -> dict[str, Count]:
    """The whole model, by part."""
    language = layer(bases) * bases.language.num_layers + embedding(bases) + final_norm(bases) + head(bases)
    counts = (vision(bases, config.models.vision.feature_layer), projector(bases, config), language)
    return dict(zip(PARTS, counts, strict=True))


def of_stage(bases: Bases, config: Config, parallel: Parallel, index: int) -> dict[str, Count]:
    """What is on one stage of the pipeline, by part. Where embedding and head are tied, both ends hold a copy."""
    last = index == parallel.pipeline - 1
    language = layer(bases) * (bases.language.num_layers // parallel.pipeline)
    if last:
        language += final_norm(bases)
        language += embedding(bases) if parallel.pipeline > 1 and bases.language.tied_embeddings else head(bases)
    if index:
        return {"language": language}
    whole = of_parts(bases, config)
    return {"vision": whole["vision"], "projector": whole["projector"], "language": language + embedding(bases)}
