"""Sizes of the base models, read from their own `config.json`, so that they are never settings. Imports no torch.

Defaults are those of `transformers`' MistralConfig, LlamaConfig and CLIPVisionConfig, for keys a file leaves out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LANGUAGE_ARCHITECTURES = ("MistralForCausalLM", "LlamaForCausalLM")
VISION_ARCHITECTURES = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Pixel statistics of OpenAI's CLIP, used where no preprocessor_config.json says otherwise."""


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later stretch slow rotary angles to reach positions beyond those of pretraining.

    `vlm.model.layers.rotary_frequencies` applies it.
    """

    factor: float
    """What the frequencies of long wavelengths are divided by."""
    low_freq_factor: float
    high_freq_factor: float
    """Wavelengths of `original_max_positions` over these two mark where stretching is complete, and where it begins."""
    original_max_positions: int
    """Positions of pretraining."""


@dataclass(frozen=True)
class LanguageSizes:
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    init_std: float


@dataclass(frozen=True)
class VisionSizes:
    num_layers: int
    """Blocks of the whole model; `vlm.config`'s feature_layer says how many of them are built."""
    hidden_size: int
    num_heads: int
    ffn_hidden_size: int
    image_size: int
    """Pixels per side."""
    patch_size: int
    norm_eps: float
    activation: str
    init_std: float

    @property
    def num_image_tokens(self) -> int:
        """Patches per picture, which is tokens per picture in the language model."""
        return (self.image_size // self.patch_size) ** 2

    def num_built_layers(self, feature_layer: int) -> int:
        """Blocks needed for hidden state `feature_layer` (-1 is the last block's output).

        Raises:
            ValueError: the model has no such hidden state.
        """
        built = self.num_layers + 1 + feature_layer
        if not 1 <= built <= self.num_layers:
            raise ValueError(
                f"models.vision.feature_layer: {feature_layer} is not between -{self.num_layers} and -1, "
                f"the blocks of the vision model"
            )
        return built


def language_sizes(config: Mapping[str, Any], tensor: int = 1, pipeline: int = 1) -> LanguageSizes:
    """Read a Mistral or Llama `config.json`.

    Args:
        config: the parsed file.
        tensor: tensor-parallel ranks the sizes must divide over.
        pipeline: pipeline stages the layers must divide over.

    Raises:
        ValueError: naming the key: another architecture, sizes that do not divide, features that are not built.
    """
    where = "config.json of the language model"
    _architecture(config, where, LANGUAGE_ARCHITECTURES, {"mistral": 0, "llama": 1})
    mistral = "Mistral" in str(config.get("architectures") or config.get("model_type", "").capitalize())
    heads = _size(config, "num_attention_heads", 32, where)
    kv_heads = config.get("num_key_value_heads", 8 if mistral else heads) or heads
    hidden = _size(config, "hidden_size", 4096, where)
    if not config.get("head_dim") and hidden % heads:
        raise ValueError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    if heads % kv_heads:
        raise ValueError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    head_dim = config.get("head_dim") or hidden // heads
    if head_dim % 2:
        raise ValueError(f"{where}: head_dim {head_dim} is odd; rotary positions turn pairs")
    max_positions = _size(config, "max_position_embeddings", 131072 if mistral else 2048, where)
    theta, scaling = _rope(config, max_positions, where)
    sizes = LanguageSizes(
        num_layers=_size(config, "num_hidden_layers", 32, where),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_hidden_size=_size(config, "intermediate_size", 14336 if mistral else 11008, where),
        vocab_size=_size(config, "vocab_size", 32000, where),
        max_positions=max_positions,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        init_std=float(config.get("initializer_range", 0.02)),
    )
    _refuse(config, where, "hidden_act", "silu", ("silu", "swish"))
    for key in ("attention_bias", "mlp_bias"):
        _refuse(config, where, key, False, (False, None))
    window = config.get("sliding_window", 4096) if mistral else None
    if window is not None and window < sizes.max_positions:
        raise ValueError(f"{where}: sliding_window {window} is not supported, only null: attention spans samples")
    _divides(where, "num_attention_heads", heads, tensor)
    _divides(where, "num_key_value_heads", kv_heads, tensor)
    _divides(where, "intermediate_size", sizes.ffn_hidden_size, tensor)
    # Padding rows would join the softmax and make the loss depend on the layout.
    _divides(where, "vocab_size", sizes.vocab_size, tensor)
    _divides(where, "num_hidden_layers", sizes.num_layers, pipeline, "parallel.pipeline")
    return sizes


def vision_sizes(config: Mapping[str, Any], tensor: int = 1) -> VisionSizes:
    """Read a CLIP `config.json`: of the vision model, or of the whole model with a `vision_config` inside.

    Raises:
        ValueError: naming the key: another architecture, or sizes that do not divide.
    """
    where = "config.json of the vision model"
    _architecture(config, where, VISION_ARCHITECTURES, {"clip_vision_model": 0, "clip": 2})
    if "vision_config" in config:
        config, where = config["vision_config"], f"{where}, vision_config"
    heads = _size(config, "num_attention_heads", 12, where)
    sizes = VisionSizes(
        num_layers=_size(config, "num_hidden_layers", 12, where),
        hidden_size=_size(config, "hidden_size", 768, where),
        num_heads=heads,
        ffn_hidden_size=_size(config, "intermediate_size", 3072, where),
        image_size=_size(config, "image_size", 224, where),
        patch_size=_size(config, "patch_size", 32, where),
        norm_eps=float(config.get("layer_norm_eps", 1e-5)),
        activation=str(config.get("hidden_act", "quick_gelu")),
        init_std=float(config.get("initializer_range", 0.02)),
    )
    if sizes.hidden_size % heads:
        raise ValueError(f"{where}: hidden_size {sizes.hidden_size} is not a multiple of num_attention_heads {heads}")
    if sizes.image_size % sizes.patch_size:
        raise ValueError(f"{where}: image_size {sizes.image_size} is not a multiple of patch_size {sizes.patch_size}")
    _refuse(config, where, "hidden_act", "quick_gelu", ("quick_gelu", "gelu"))
    _refuse(config, where, "num_channels", 3, (3,))
    _divides(where, "num_attention_heads", heads, tensor)
    _divides(where, "intermediate_size", sizes.ffn_hidden_size, tensor)
    return sizes


OPENAI_HEAD_DIM = 64
"""Of every vision transformer that OpenAI published (clip/model.py: `vision_heads = vision_width // 64`)."""


def openai_vision_config(folder: object, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The `config.json` of a vision tower in OpenAI's own names, read off the shapes of its tensors.

    Heads, activation and epsilon are no shapes: they are those of all of OpenAI's models.

    Args:
        folder: named where it is refused.
        shapes: of its tensors by name.

    Raises:
        ValueError: the tensors are no square vision transformer's.
    """
    where = f"{folder}: without a config.json sizes are read from the weights"
    names = {"class_embedding": 1, "conv1.weight": 4, "positional_embedding": 2}
    names["transformer.resblocks.0.mlp.c_fc.weight"] = 2
    for name, num_dims in names.items():
        if len(shapes.get(f"visual.{name}", ())) != num_dims:
            raise ValueError(f"{where}, and there is no visual.{name} of {num_dims} dimensions")
    (width,), conv, positions, mlp = (shapes[f"visual.{name}"] for name in names)
    side = math.isqrt(positions[0] - 1)
    if side**2 != positions[0] - 1:
        raise ValueError(f"{where}: {positions[0] - 1} patch positions in visual.positional_embedding are no square")
    if width % OPENAI_HEAD_DIM:
        raise ValueError(
            f"{where}: a width of {width} is no multiple of {OPENAI_HEAD_DIM}, the head dim of OpenAI's CLIP"
        )
    blocks = [re.match(r"visual\.transformer\.resblocks\.(\d+)\.", name) for name in shapes]
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": mlp[0],
        "num_hidden_layers": 1 + max(int(block[1]) for block in blocks if block),
        "num_attention_heads": width // OPENAI_HEAD_DIM,
        "num_channels": 3,
        "image_size": side * conv[-1],
        "patch_size": conv[-1],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def _architecture(
    config: Mapping[str, Any], where: str, allowed: tuple[str, ...], model_types: Mapping[str, int]
) -> None:
    names = config.get("architectures") or []
    if not names and (index := model_types.get(config.get("model_type", ""))) is not None:
        names = [allowed[index]]
    if not set(names) & set(allowed):
        raise ValueError(
            f"{where}: architectures {list(names)} (model_type {config.get('model_type')!r}) is not supported, "
            f"allowed are {', '.join(allowed)}"
        )


def _size(config: Mapping[str, Any], key: str, default: int, where: str) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {key} must be a positive integer, received {value!r}")
    return value


def _divides(where: str, key: str, value: int, ranks: int, setting: str = "parallel.tensor") -> None:
    if value % ranks:
        raise ValueError(f"{where}: {key} {value} is not a multiple of {setting} {ranks}")


def _refuse(config: Mapping[str, Any], where: str, key: str, default: Any, allowed: tuple[Any, ...]) -> None:
    value = config.get(key, default)
    if value not in allowed:
        raise ValueError(f"{where}: {key} {value!r} is not supported, allowed are {', '.join(map(repr, allowed))}")


def _rope(config: Mapping[str, Any], max_positions: int, where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling of rotary positions: `rope_theta` at the top and `rope_scaling` (transformers 4), or all in
    `rope_parameters` (transformers 5). Where a file has both, `rope_scaling` counts, as in `transformers`.

    Raises:
        ValueError: a kind of scaling that is not built, or numbers that are none of Llama 3's.
    """
    place = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(place) or {}
    theta = _number(rope, "rope_theta", f"{where}: {place}", config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise ValueError(f"{where}: {place}.rope_type {kind!r} is not supported, allowed are 'default', 'llama3'")
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share not in (None, 1.0):
        raise ValueError(f"{where}: partial_rotary_factor {share!r} is not supported, only 1: every channel turns")
    if kind == "default":
        return theta, None
    original = config.get("original_max_position_embeddings") or max_positions
    scaling = RopeScaling(
        factor=_number(rope, "factor", f"{where}: {place}"),
        low_freq_factor=_number(rope, "low_freq_factor", f"{where}: {place}"),
        high_freq_factor=_number(rope, "high_freq_factor", f"{where}: {place}"),
        original_max_positions=int(_number(rope, "original_max_position_embeddings", f"{where}: {place}", original)),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ValueError(
            f"{where}: {place}.high_freq_factor {scaling.high_freq_factor:g} is not above low_freq_factor "
            f"{scaling.low_freq_factor:g}"
        )
    return theta, scaling


def _number(tree: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = tree.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{where}.{key} must be a positive number, received {value!r}")
    return float(value)
