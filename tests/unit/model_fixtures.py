"""A small random LLaVA of `transformers`, the same weights in ours, and packed batches of random conversations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm import config as configuration
from vlm import parallel
from vlm.batch import PackedBatch, Sample, pack

IMAGE_TOKEN = 10
IMAGE_SIZE, PATCH_SIZE, NUM_PATCHES = 24, 8, 9
SEQUENCE_LENGTH = 96

# heads x head_dim is not hidden_size, groups are not heads, eps and theta are no defaults: each would show.
LANGUAGE: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 134,
    "max_position_embeddings": 256,
    "rms_norm_eps": 3e-5,
    "rope_theta": 5000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "architectures": ["CLIPVisionModel"],
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 2e-5,
}

# Head dims that the kernels know: 128 in the language model with two query heads a group, 64 in the vision model.
KERNELS_LANGUAGE = LANGUAGE | {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "head_dim": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
KERNELS_VISION = VISION | {"hidden_size": 128, "intermediate_size": 256}


def settings(
    *,
    feature_layer: int = -1,
    tensor: int = 1,
    sequence: bool = False,
    backend: str = "torch",
    bias: bool = True,
    dtype: str = "float32",
    pipeline: int = 1,
    recompute: bool = False,
) -> Any:
    """The pieces of the configuration that shape a model."""
    from vlm.model import Settings

    return Settings(
        models=configuration.Models.model_validate(
            {
                "language": {"source": "-", "image_token": "[control_8]"},
                "vision": {"source": "-", "feature_layer": feature_layer},
                "projector": {"hidden_size": LANGUAGE["hidden_size"], "bias": bias, "init_std": 0.3},
            }
        ),
        kernels=configuration.Kernels.model_validate({"backend": backend}),
        dtype=dtype,  # type: ignore[arg-type]
        parallel=configuration.Parallel(
            nodes=1,
            ranks_per_node=tensor * pipeline,
            tensor=tensor,
            pipeline=pipeline,
            sequence=sequence,
            distributed_optimizer=False,
            recompute=recompute,
        ),
    )


def huggingface(feature_layer: int = -1, *, tied: bool = False, rope: dict[str, Any] | None = None) -> Any:
    """A `LlavaForConditionalGeneration` of these sizes with weights large enough to matter.

    With `rope`, its scaling of rotary positions, the language model is a Llama.
    """
    import transformers

    text = {key: value for key, value in LANGUAGE.items() if key not in ("architectures", "rope_theta")}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": LANGUAGE["rope_theta"]} | (rope or {})}
    kind = transformers.LlamaConfig if rope else transformers.MistralConfig
    config = transformers.LlavaConfig(
        text_config=kind(**text | {"tie_word_embeddings": tied}),
        vision_config=transformers.CLIPVisionConfig(**{k: v for k, v in VISION.items() if k != "architectures"}),
        image_token_index=IMAGE_TOKEN,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=feature_layer,
        multimodal_projector_bias=True,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(5)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.dim() == 1 and "bias" not in name
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.2) + float(norm))
    return model


def ours(reference: Any, *, feature_layer: int = -1, **options: Any) -> Any:
    """Our model with the weights of `reference`."""
    from vlm.model import build

    text = reference.config.text_config
    own = {"tie_word_embeddings": text.tie_word_embeddings, "rope_parameters": text.rope_parameters}
    model = build(LANGUAGE | own, VISION, settings(feature_layer=feature_layer, **options))
    model.load_state_dict(translated(reference.state_dict(), model), strict=True)
    return model


def for_kernels(backend: str, dtype: str = "float32") -> Any:
    """A model of sizes that the kernels know, with fresh weights; the same ones for every backend."""
    from vlm.model import Settings, build

    base = settings(backend=backend, dtype=dtype)
    projector = base.models.projector.model_copy(update={"hidden_size": KERNELS_LANGUAGE["hidden_size"]})
    models = base.models.model_copy(update={"projector": projector})
    parallel.seed_everything(7)
    return build(KERNELS_LANGUAGE, KERNELS_VISION, Settings(models, base.kernels, base.dtype, base.parallel))


def prompts(shapes: list[tuple[int, int]], seed: int = 0) -> Any:
    """Prompts of (length, pictures)."""
    from vlm.generate.decode import Prompt

    samples, images = conversations(shapes, seed)
    rest = iter(images)
    return [
        Prompt(sample.tokens_L.tolist(), [next(rest) for _ in range(count)], f"prompt-{n}")
        for n, (sample, (_, count)) in enumerate(zip(samples, shapes, strict=True))
    ]


def translated(theirs: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """`transformers` weights under our names, written apart from `vlm.weights` so that each checks the other."""
    out: dict[str, Tensor] = {}
    groups, head_dim = LANGUAGE["num_key_value_heads"], LANGUAGE["head_dim"]
    hf, mc = "model.language_model.", "language_model."
    out[f"{mc}embedding.word_embeddings.weight"] = theirs[f"{hf}embed_tokens.weight"]
    out[f"{mc}decoder.final_layernorm.weight"] = theirs[f"{hf}norm.weight"]
    if not model.share_embeddings_and_output_weights:
        out[f"{mc}output_layer.weight"] = theirs["lm_head.weight"]
    for i in range(LANGUAGE["num_hidden_layers"]):
        a, b = f"{hf}layers.{i}.", f"{mc}decoder.layers.{i}."
        q, k, v = (theirs[f"{a}self_attn.{x}_proj.weight"].unflatten(0, (groups, -1)) for x in "qkv")
        assert k.shape[1] == head_dim
        out[f"{b}self_attention.linear_qkv.weight"] = torch.cat([q, k, v], dim=1).flatten(0, 1)
        out[f"{b}self_attention.linear_proj.weight"] = theirs[f"{a}self_attn.o_proj.weight"]
        out[f"{b}mlp.linear_fc1.weight"] = torch.cat([theirs[f"{a}mlp.{x}_proj.weight"] for x in ("gate", "up")])
        out[f"{b}mlp.linear_fc2.weight"] = theirs[f"{a}mlp.down_proj.weight"]
        out[f"{b}input_layernorm.weight"] = theirs[f"{a}input_layernorm.weight"]
        out[f"{b}pre_mlp_layernorm.weight"] = theirs[f"{a}post_attention_layernorm.weight"]
    hf, mc = "model.vision_tower.", "vision_model."
    out[f"{mc}class_token"] = theirs[f"{hf}embeddings.class_embedding"].view(1, 1, -1)
    out[f"{mc}conv1.weight"] = theirs[f"{hf}embeddings.patch_embedding.weight"]
    out[f"{mc}position_embeddings.weight"] = theirs[f"{hf}embeddings.position_embedding.weight"]
    for i in range(len(model.vision_model.decoder.layers)):
        a, b = f"{hf}encoder.layers.{i}.", f"{mc}decoder.layers.{i}."
        for kind in ("weight", "bias"):
            parts = [theirs[f"{a}self_attn.{x}_proj.{kind}"].unflatten(0, (2, -1)) for x in "qkv"]
            out[f"{b}self_attention.linear_qkv.{kind}"] = torch.cat(parts, dim=1).flatten(0, 1)
            for x, y in (
                ("self_attn.out_proj", "self_attention.linear_proj"),
                ("mlp.fc1", "mlp.linear_fc1"),
                ("mlp.fc2", "mlp.linear_fc2"),
                ("layer_norm1", "input_layernorm"),
                ("layer_norm2", "pre_mlp_layernorm"),
            ):
                out[f"{b}{y}.{kind}"] = theirs[f"{a}{x}.{kind}"]
    for kind in ("weight", "bias"):
        out[f"{mc}ln_pre.{kind}"] = theirs[f"{hf}pre_layrnorm.{kind}"]
        for x in (1, 2):
            name = f"vision_projection.encoder.linear_fc{x}.{kind}"
            out[name] = theirs[f"model.multi_modal_projector.linear_{x}.{kind}"]
    return out


def conversation(generator: np.random.Generator, length: int, num_images: int) -> Sample:
    """Random tokens; each picture's block follows three tokens; the last third is trained."""
    tokens, slots = list(generator.integers(11, LANGUAGE["vocab_size"], 3)), []
    for _ in range(num_images):
        slots += range(len(tokens), len(tokens) + NUM_PATCHES)
        tokens += [IMAGE_TOKEN] * NUM_PATCHES + list(generator.integers(11, LANGUAGE["vocab_size"], 2))
    tokens += list(generator.integers(11, LANGUAGE["vocab_size"], length - len(tokens)))
    trained = np.arange(length) >= length - length // 3
    return Sample(np.array(tokens), trained, np.array(slots, dtype=np.int64))


def conversations(shapes: list[tuple[int, int]], seed: int = 0) -> tuple[list[Sample], list[np.ndarray]]:
    """Samples of (length, pictures) and their pictures in order."""
    generator = np.random.default_rng(seed)
    samples = [conversation(generator, length, images) for length, images in shapes]
    count = sum(images for _, images in shapes)
    return samples, list(generator.integers(0, 256, (count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8))


def packed(shapes: list[tuple[int, int]], seed: int = 0) -> PackedBatch:
    samples, pictures = conversations(shapes, seed)
    return pack(samples, pictures, [f"sample-{i}" for i in range(len(shapes))], SEQUENCE_LENGTH, IMAGE_SIZE)


def initialize(tensor: int = 1, *, seed: int = 3, sequence: bool = False) -> None:
    parallel.initialize(settings(tensor=tensor, sequence=sequence).parallel, seed)
