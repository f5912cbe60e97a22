"""`vlm export --format megatron`: Megatron-LM's per-rank files at a chosen tensor-parallel size.

`pretrain_vlm.py --ckpt-format torch --load OUT --finetune` reads them. A language or vision checkpoint becomes the
files of that model alone, a combined one or one of a stage those of a `LLaVAModel`. Megatron-LM builds the vision
blocks up to the features and no norm after them; what is beyond is put under `left_out`, where `vlm convert legacy`
finds it again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vlm import checkpoint, files
from vlm.checkpoint import Manifest, Tensors
from vlm.model.sizes import LanguageSizes, RopeScaling, VisionSizes, language_sizes, vision_sizes
from vlm.weights import legacy
from vlm.weights.legacy import LEFT_OUT, PADDED, TRACKER, Spec
from vlm.weights.tables import num_bytes

ITERATION = 1
VOCABULARY_MULTIPLE = 128
"""Megatron-LM's `--make-vocab-size-divisible-by`: rows per rank are a multiple of it."""


def export(checkpoint: Path, out: Path, tensor: int = 1, transformer_impl: str = "transformer_engine") -> None:
    """Write a checkpoint as Megatron-LM's per-rank files, reading and holding one tensor at a time.

    Args:
        checkpoint: one of any kind, or a stage's folder.
        out: the folder to load from. Complete or absent; what was there before is replaced at the end.
        tensor: Megatron-LM's `--tensor-model-parallel-size`.
        transformer_impl: its `--transformer-impl`, which decides the names of norms.

    Raises:
        ValueError: the model does not divide over that many ranks.
    """
    tensors = Tensors(Path(checkpoint))
    path, manifest = tensors.links[0]
    if tensor < 1:
        raise ValueError(f"--tensor {tensor}: expected at least 1 rank")
    language, vision = _sizes(path, manifest)
    _divides(language, vision, tensor)
    specs = _padded(tensors.specs, tensor)
    for key, (_, shape) in specs.items():
        legacy.local_shape(key, shape, tensor)
    sections = _sections(specs, manifest, vision, transformer_impl)
    others = {
        "args": _args(specs, language, vision, tensor, transformer_impl),
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "num_floating_point_operations_so_far": 0,
    }
    total = sum(num_bytes(shape, dtype) for dtype, shape in specs.values())
    reads = [folder for folder, _ in tensors.links]
    with files.writing(Path(out), reads=reads, needed_bytes=total, replaces=TRACKER) as folder:
        with tqdm(total=total, desc="export", unit="B", unit_scale=True) as bar:
            place = folder / f"iter_{ITERATION:07d}"
            legacy.write(place, sections, specs, _reader(tensors, specs), tensor, others, bar.update)
        files.write_text(folder / TRACKER, f"{ITERATION}\n")


def _sizes(path: Path, manifest: Manifest) -> tuple[LanguageSizes | None, VisionSizes | None]:
    def config(part: str) -> Any:
        return files.read_json(checkpoint.huggingface(path, part) / "config.json")

    language = None if manifest.kind == "vision" else language_sizes(config("language"))
    vision = None if manifest.kind == "language" else vision_sizes(config("vision"))
    return language, vision


def _divides(language: LanguageSizes | None, vision: VisionSizes | None, tensor: int) -> None:
    """Whole heads per rank; everything else shows in the shapes."""
    heads = {}
    if language:
        heads["num_key_value_heads of the language model"] = language.num_kv_heads
    if vision:
        heads["num_attention_heads of the vision model"] = vision.num_heads
    for name, count in heads.items():
        if count % tensor:
            raise ValueError(f"--tensor {tensor}: {name} is {count}, which does not divide over {tensor} ranks")


def _padded(specs: dict[str, Spec], tensor: int) -> dict[str, Spec]:
    """Shapes with the vocabulary as long as Megatron-LM makes it."""
    multiple = VOCABULARY_MULTIPLE * tensor
    padded = dict(specs)
    for key in PADDED:
        if key in specs:
            dtype, shape = specs[key]
            padded[key] = (dtype, (math.ceil(shape[0] / multiple) * multiple, *shape[1:]))
    return padded


def _reader(tensors: Tensors, specs: dict[str, Spec]) -> Callable[[str], Tensor]:
    def read(key: str) -> Tensor:
        tensor = tensors.read(key)
        if missing := specs[key][1][0] - len(tensor):
            # As Megatron-LM's own conversion pads: the last row again.
            tensor = torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])
        return tensor

    return read


def _sections(
    specs: dict[str, Spec], manifest: Manifest, vision: VisionSizes | None, transformer_impl: str
) -> dict[str, dict[str, str | None]]:
    """Names in the files and ours: what Megatron-LM's model loads, and what it has no module for."""
    fused = transformer_impl == "transformer_engine"
    prefix = f"{manifest.parts[0]}." if manifest.kind in ("language", "vision") else ""
    built = vision.num_layers if vision else 0
    if vision and not prefix:
        built = vision.num_built_layers(manifest.models["vision"]["feature_layer"])
    sections: dict[str, dict[str, str | None]] = {"model": {}, LEFT_OUT: {}}
    for key in specs:
        name = (legacy.fused(key) if fused else key).removeprefix(prefix)
        if not legacy.is_taken(key, built):
            sections[LEFT_OUT][name] = key
            continue
        sections["model"][name] = key
        if fused and (state := legacy.extra_state(name)):
            sections["model"][state] = None
    return sections


def _args(
    specs: dict[str, Spec],
    language: LanguageSizes | None,
    vision: VisionSizes | None,
    tensor: int,
    transformer_impl: str,
) -> argparse.Namespace:
    """What Megatron-LM takes from a file under `--use-checkpoint-args`, or compares (checkpointing.py:
    `load_args_from_checkpoint`, `check_checkpoint_args`): of the language model, or of the vision model alone."""
    dtype = next(dtype for key, (dtype, _) in specs.items() if key.startswith("language_model") or not language)
    args = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": 1,
        "transformer_impl": transformer_impl,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "ckpt_format": "torch",
        "iteration": ITERATION,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False,
    }
    if language:
        args |= _language_args(language, specs[PADDED[0]][1][0])
    elif vision:
        args |= _vision_args(vision)
    return argparse.Namespace(**args)


def _language_args(sizes: LanguageSizes, padded_vocab_size: int) -> dict[str, Any]:
    theta = sizes.rope_theta
    return {
        "num_layers": sizes.num_layers,
        "hidden_size": sizes.hidden_size,
        "ffn_hidden_size": sizes.ffn_hidden_size,
        "num_attention_heads": sizes.num_heads,
        "group_query_attention": True,
        "num_query_groups": sizes.num_kv_heads,
        "kv_channels": sizes.head_dim,
        "max_position_embeddings": sizes.max_positions,
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "rotary_base": int(theta) if theta.is_integer() else theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        **_rope_scaling(sizes.rope_scaling),
        "normalization": "RMSNorm",
        "norm_epsilon": sizes.norm_eps,
        "swiglu": True,
        "squared_relu": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": not sizes.tied_embeddings,
        "vocab_size": sizes.vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
    }


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    """Megatron-LM takes the factor alone; the rest is fixed (megatron/core/models/common/embeddings/
    rotary_pos_embedding.py: `_apply_scaling`)."""
    if scaling is None:
        return {"use_rope_scaling": False}
    fixed = RopeScaling(scaling.factor, 1.0, 4.0, 8192)
    if scaling != fixed:
        raise ValueError(f"config.json of the language model: {scaling} is not Megatron-LM's, which has {fixed}")
    return {"use_rope_scaling": True, "rope_scaling_factor": scaling.factor}


def _vision_args(sizes: VisionSizes) -> dict[str, Any]:
    return {
        "num_layers": sizes.num_layers,
        "hidden_size": sizes.hidden_size,
        "ffn_hidden_size": sizes.ffn_hidden_size,
        "num_attention_heads": sizes.num_heads,
        "normalization": "LayerNorm",
        "norm_epsilon": sizes.norm_eps,
        "swiglu": False,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "img_h": sizes.image_size,
        "img_w": sizes.image_size,
        "patch_dim": sizes.patch_size,
    }
