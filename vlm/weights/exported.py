"""A folder that `vlm export` wrote, read back into our own model, so that it can be asked as a checkpoint can."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlm import config as settings
from vlm.files import read_json
from vlm.model.sizes import language_sizes, vision_sizes
from vlm.weights.folder import Folder
from vlm.weights.tables import Row, language_table, projector_table, vision_table

_VISION_PREFIXES = ("vision_tower.vision_model.", "vision_tower.")
_UNKNOWN_STD = 0.02
"""init_std is no property of trained weights, and `Models` asks for one."""


@dataclass(frozen=True)
class Exported:
    """What `vlm.model.build` and a prompt need to know about an exported folder."""

    folder: Path
    """Holds the tokenizer with its chat template, and preprocessor_config.json."""
    language_config: dict[str, Any]
    vision_config: dict[str, Any]
    models: settings.Models
    dtype: str
    image_resize: str
    """`crop` or `square`."""


def is_exported(folder: Path) -> bool:
    """Whether a folder is a `LlavaForConditionalGeneration` rather than a checkpoint of ours."""
    path = Path(folder) / "config.json"
    return path.is_file() and read_json(path).get("model_type") == "llava"


def read_exported(folder: Path) -> Exported:
    """The settings of an exported folder.

    Raises:
        ValueError: it is no LLaVA, or one that this model cannot express.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    expected = {
        "model_type": "llava",
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
    }
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"{folder / 'config.json'}: {key} {config[key]!r} is not supported, expected {value!r}")
    language, vision = config["text_config"], config["vision_config"]
    processor = read_json(folder / "processor_config.json")
    # transformers 5 keeps the image processor inside the processor's file.
    alone = folder / "preprocessor_config.json"
    pixels = read_json(alone) if alone.is_file() else processor.get("image_processor", {})
    models = settings.Models(
        language=settings.LanguageModel(source=str(folder), image_token=processor["image_token"]),
        vision=settings.VisionModel(source=str(folder), feature_layer=config.get("vision_feature_layer", -2)),
        projector=settings.Projector(
            hidden_size=language_sizes(language).hidden_size,
            bias=config.get("multimodal_projector_bias", True),
            init_std=_UNKNOWN_STD,
        ),
    )
    return Exported(
        folder=folder,
        language_config=language,
        vision_config=vision,
        models=models,
        dtype=config.get("dtype", config.get("torch_dtype", "float32")),
        image_resize="crop" if pixels.get("do_center_crop", True) else "square",
    )


def exported_rows(exported: Exported, weights: Folder) -> list[Row]:
    """All rows of an exported model, after a check that the folder holds them."""
    language, vision, models = exported.language_config, exported.vision_config, exported.models
    prefix = weights.prefix("embeddings.class_embedding", _VISION_PREFIXES)
    tables = [
        language_table(language, theirs="language_model."),
        vision_table(vision, theirs=prefix),
        projector_table(
            vision_sizes(vision).hidden_size,
            models.projector.hidden_size,
            language_sizes(language).hidden_size,
            bias=models.projector.bias,
        ),
    ]
    weights.check(*tables)
    return [row for table in tables for row in table.rows]


def load_exported(model: Any, folder: Path) -> Exported:
    """Load every weight of a model from an exported folder, a tensor at a time.

    Args:
        model: a `Llava` built from `read_exported(folder)`, at any tensor-parallel size and dtype.
        folder: what `vlm export` wrote, or a LLaVA-1.5 folder in the names of the Hub.

    Raises:
        ValueError: naming a missing, unexpected or misshapen weight, or a truncated file.
    """
    from vlm.checkpoint.model import sharded_state

    exported = read_exported(folder)
    weights = Folder(exported.folder)
    rows = {row.ours: row for row in exported_rows(exported, weights)}
    with torch.no_grad():
        for item in sharded_state(model).values():
            if item.key not in rows:
                raise ValueError(f"{folder}: no weight {item.key} for this model")
            whole = weights.join(rows[item.key])
            # A factory (gate and up) is several pieces; each piece is a view of the parameter.
            for piece in item.build() if hasattr(item, "build") else [item]:
                first = 1 if piece.allow_shape_mismatch else 0  # the vocabulary may be padded
                if tuple(piece.global_shape[first:]) != tuple(whole.shape[first:]):
                    raise ValueError(
                        f"{folder}: {item.key} has shape {list(whole.shape)}, the model has {list(piece.global_shape)}"
                    )
                cut = whole[tuple(slice(o, o + n) for o, n in zip(piece.global_offset, piece.local_shape, strict=True))]
                piece.data.zero_()  # rows of vocabulary padding stay zero
                piece.data[: cut.shape[0]].copy_(cut)
    return exported
