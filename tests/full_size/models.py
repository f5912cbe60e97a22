"""Hugging Face folders with the shapes of Mistral-7B-Instruct-v0.3 and CLIP ViT-L/14 at 336 px, made at disk speed, and
a comparison with what comes back.

Files are written here from the format's description, apart from `vlm.weights`, so that each checks the other. Values
come from one block of random numbers; every tensor begins elsewhere in it, so that no two are equal.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TINY = Path(__file__).parents[2] / "resources/tiny"
MAX_SHARD_BYTES = 5_000_000_000
_BLOCK = 1 << 25
_STRIDE = 7_654_321
"""Values between the beginnings of two tensors; shares no factor with the block's length."""
_TYPES = {"bfloat16": "BF16", "float32": "F32"}

MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 32768,
}
CLIP: dict[str, Any] = {
    "architectures": ["CLIPVisionModel"],
    "model_type": "clip_vision_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "torch_dtype": "float32",
}
Shapes = dict[str, tuple[int, ...]]


def language_shapes(num_layers: int) -> Shapes:
    """Names and shapes in the order of the Hub's files."""
    hidden, inner, keys, vocabulary = 4096, 14336, 1024, 32768
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(num_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}mlp.down_proj.weight": (hidden, inner),
            f"{layer}mlp.gate_proj.weight": (inner, hidden),
            f"{layer}mlp.up_proj.weight": (inner, hidden),
            f"{layer}post_attention_layernorm.weight": (hidden,),
            f"{layer}self_attn.k_proj.weight": (keys, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}self_attn.v_proj.weight": (keys, hidden),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def vision_shapes(num_layers: int) -> Shapes:
    hidden, inner = 1024, 4096
    prefix = "vision_model."
    shapes: Shapes = {
        f"{prefix}embeddings.class_embedding": (hidden,),
        f"{prefix}embeddings.patch_embedding.weight": (hidden, 3, 14, 14),
        f"{prefix}embeddings.position_embedding.weight": (577, hidden),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{prefix}{name}.weight": (hidden,), f"{prefix}{name}.bias": (hidden,)}
    linears = {f"self_attn.{x}_proj": (hidden, hidden) for x in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (inner, hidden), "mlp.fc2": (hidden, inner)}
    for i in range(num_layers):
        layer = f"{prefix}encoder.layers.{i}."
        for name, shape in linears.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}.weight": (hidden,), f"{layer}{name}.bias": (hidden,)}
    return shapes


def write_language(folder: Path, num_layers: int) -> None:
    """With the miniature's tokenizer, whose special tokens have the ids of Mistral's."""
    _write(folder, language_shapes(num_layers), "bfloat16")
    (folder / "config.json").write_text(json.dumps(MISTRAL | {"num_hidden_layers": num_layers}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(TINY / "language" / name, folder / name)


def write_vision(folder: Path, num_layers: int) -> None:
    _write(folder, vision_shapes(num_layers), "float32")
    (folder / "config.json").write_text(json.dumps(CLIP | {"num_hidden_layers": num_layers}))
    shutil.copyfile(TINY / "vision/preprocessor_config.json", folder / "preprocessor_config.json")


def compare(source: Path, exported: Path) -> None:
    """The exported language model against its source, a tensor at a time, by safetensors' own reader.

    Raises:
        RuntimeError: naming the first tensor that is missing or differs in a bit.
    """
    import torch

    places = {name: file for file in exported.glob("*.safetensors") for name in _names(file)}
    count = 0
    for file in sorted(source.glob("*.safetensors")):
        for name in _names(file):
            theirs = f"language_model.{name}"
            if theirs not in places:
                raise RuntimeError(f"{theirs} is not in {exported}")
            first, second = _read(file, name), _read(places[theirs], theirs)
            same = (first.dtype, first.shape) == (second.dtype, second.shape)
            if not same or not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
                raise RuntimeError(f"{theirs} differs from its source")
            count += 1
    print(f"all {count} tensors of the language model came back bit-identical", flush=True)


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _read(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def _write(folder: Path, shapes: Shapes, kind: str) -> None:
    """One file, or shards with an index as the Hub has them."""
    import torch

    folder.mkdir(parents=True)
    dtype = getattr(torch, kind)
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    shards: list[Shapes] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if filled + size > MAX_SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    weight_map, begin = {}, 0
    for number, shard in enumerate(shards, 1):
        last = len(shards)
        file = "model.safetensors" if last == 1 else f"model-{number:05d}-of-{last:05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        begin = _write_file(folder / file, shard, block, begin)
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_file(path: Path, shapes: Shapes, block: Tensor, begin: int) -> int:
    import torch

    kind = _TYPES[str(block.dtype).removeprefix("torch.")]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * block.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for piece in _values(block, begin, math.prod(shape)):
                stream.write(memoryview(piece.view(torch.uint8).numpy()))
            begin = (begin + _STRIDE) % len(block)
        stream.flush()
        os.fsync(stream.fileno())
    return begin


def _values(block: Tensor, begin: int, count: int) -> Iterator[Tensor]:
    """`count` values of the block, from `begin` on and round."""
    while count:
        piece = block[begin : begin + count]
        yield piece
        count -= len(piece)
        begin = 0
