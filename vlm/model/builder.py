"""From the base models' configurations and the run's settings to a Llava."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal
from torch.nn import functional

from vlm import parallel as processes
from vlm.config import Config, Kernels, Models, Parallel, Projector
from vlm.model import cpu
from vlm.model.language import LanguageModel
from vlm.model.llava import Llava
from vlm.model.sizes import CLIP_MEAN, CLIP_STD, LanguageSizes, VisionSizes, language_sizes, vision_sizes
from vlm.model.specs import TorchSpecs, provider
from vlm.model.vision import VisionModel

Backend = Literal["torch", "triton", "transformer_engine"]
Dtype = Literal["float32", "bfloat16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """The part of `vlm.config.Config` that shapes the model; a Config itself serves as well."""

    models: Models
    kernels: Kernels
    dtype: Dtype
    parallel: Parallel


def build(
    language_config: Mapping[str, Any],
    vision_config: Mapping[str, Any],
    settings: Settings | Config,
    image_mean: Sequence[float] = CLIP_MEAN,
    image_std: Sequence[float] = CLIP_STD,
    *,
    initialise: bool = True,
) -> Llava:
    """Build the model with fresh weights, on this process's device, after `vlm.parallel.initialize`.

    On a pipeline of several stages this is the stage's share: an equal number of the language model's layers, before
    them vision model, projector and embedding on the first stage, after them norm and head on the last.

    Args:
        language_config, vision_config: parsed `config.json` of the base models.
        settings: models, kernels, dtype and parallel.
        image_mean, image_std: of the vision model's preprocessor_config.json.
        initialise: False leaves the weights unset where they are loaded right after.

    Raises:
        ValueError: naming the key: an architecture or size that cannot be built, or a backend that does not exist.
    """
    cpu.install()
    layout = settings.parallel
    assert parallel_state.get_pipeline_model_parallel_world_size() == layout.pipeline, layout
    specs = provider(settings.kernels.backend)
    language = language_sizes(language_config, layout.tensor, layout.pipeline)
    vision = vision_sizes(vision_config, layout.tensor)
    projector = settings.models.projector
    common = _common(settings, initialise)
    first = parallel_state.is_pipeline_first_stage()
    language_model = LanguageModel(
        language,
        _language_config(language, layout, common),
        specs,
        pre_process=first,
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    vision_model, projection = None, None
    feature_layers = vision.num_built_layers(settings.models.vision.feature_layer)
    if first:
        vision_model = VisionModel(vision, _vision_config(vision, feature_layers, specs, common), specs)
        projection = _projection(projector, language, vision, specs, common)
    model = Llava(vision_model, projection, language_model, specs, image_mean=image_mean, image_std=image_std)
    _mark_shards(model)
    return model.to(processes.device())


def build_from_checkpoint(
    directory: Path, *, backend: Backend = "torch", dtype: Dtype = "float32", parallel: Parallel | None = None
) -> Llava:
    """Build the model a checkpoint was made from and load its weights, in eval mode.

    Args:
        directory: checkpoint, or a stage's folder with its latest one.
        parallel: layout of this process group; None for one process.

    Raises:
        ValueError: the checkpoint is none, or does not fit the layout.
    """
    from vlm import checkpoint

    found = checkpoint.resolve(directory)
    manifest = checkpoint.read_manifest(found)
    layout = parallel or processes.single()
    model = build(
        *read_configs(found / "huggingface"),
        Settings(Models.model_validate(manifest.models), Kernels(backend=backend), dtype, layout),
        *read_pixel_statistics(found / "huggingface" / "vision"),
        initialise=False,
    )
    checkpoint.load_model(model, found)
    return model.eval()


def read_configs(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`config.json` of `directory`/language and `directory`/vision."""
    language, vision = (json.loads((directory / part / "config.json").read_text()) for part in ("language", "vision"))
    return language, vision


def read_pixel_statistics(vision_directory: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel from preprocessor_config.json, or CLIP's where there is none."""
    path = vision_directory / "preprocessor_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    return tuple(config.get("image_mean", CLIP_MEAN)), tuple(config.get("image_std", CLIP_STD))


def _mark_shards(model: Llava) -> None:
    """Mark tensor-parallel shards, which megatron-core does only where it also draws the weights (tensor_parallel/
    layers.py:170, 244, 265, 855, 877, 1178, 1201). Without the mark a gradient norm counts those of one rank."""
    axes = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in model.modules():
        for kind, axis in axes.items():
            weight = getattr(module, "weight", None)
            if isinstance(module, kind) and weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, True, axis, 1)


def _common(settings: Settings | Config, initialise: bool) -> dict[str, Any]:
    """Options of every part: no dropout, no fusion that compiles or needs CUDA extensions."""
    dtype = DTYPES[settings.dtype]
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "tensor_model_parallel_size": settings.parallel.tensor,
        # Weights drawn on the CPU do not depend on the tensor-parallel layout; on a GPU they are loaded anyway.
        "use_cpu_initialization": not torch.cuda.is_available(),
        "perform_initialization": initialise,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "attention_softmax_in_fp32": True,
    }


def _language_config(sizes: LanguageSizes, layout: Parallel, common: dict[str, Any]) -> TransformerConfig:
    return TransformerConfig(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_heads,
        num_query_groups=sizes.num_kv_heads,
        kv_channels=sizes.head_dim,
        ffn_hidden_size=sizes.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=sizes.norm_eps,
        activation_func=functional.silu,
        gated_linear_unit=True,
        use_te_activation_func=True,  # the slot that takes SwiGLU as a module; needs no Transformer Engine
        add_bias_linear=False,
        init_method_std=sizes.init_std,
        sequence_parallel=layout.sequence,
        calculate_per_token_loss=True,  # the loss is the global mean over trained tokens
        pipeline_model_parallel_size=layout.pipeline,
        deallocate_pipeline_outputs=True,  # a stage's output is needed no more once it was sent
        recompute_granularity="full" if layout.recompute else None,
        recompute_method="uniform" if layout.recompute else None,
        recompute_num_layers=1 if layout.recompute else None,
        **common,
    )


def _vision_config(sizes: VisionSizes, num_layers: int, specs: TorchSpecs, common: dict[str, Any]) -> TransformerConfig:
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_heads,
        ffn_hidden_size=sizes.ffn_hidden_size,
        normalization="LayerNorm",
        layernorm_epsilon=sizes.norm_eps,
        activation_func={"quick_gelu": specs.quick_gelu, "gelu": functional.gelu}[sizes.activation],
        add_bias_linear=True,
        init_method_std=sizes.init_std,
        **common,
    )


def _projection(
    projector: Projector, language: LanguageSizes, vision: VisionSizes, specs: TorchSpecs, common: dict[str, Any]
) -> MultimodalProjector:
    initial = init_method_normal(projector.init_std)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_heads,
        ffn_hidden_size=projector.hidden_size,
        activation_func=functional.gelu,
        add_bias_linear=projector.bias,
        init_method=initial,
        output_layer_init_method=initial,
        **common,
    )
    return MultimodalProjector(config, specs.mlp(), "mlp", vision.hidden_size)
