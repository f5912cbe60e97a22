"""`vlm export`: a folder that stock `transformers` loads as `LlavaForConditionalGeneration`, with its processor.

Names are those of the LLaVA-1.5 folders on the Hub, which every version of `transformers` since 4.36 reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlm import checkpoint, files
from vlm.checkpoint import Manifest, Tensors
from vlm.config import Models
from vlm.export.base import image_processor
from vlm.export.folder import MAX_SHARD_BYTES, copy_side_files, write, write_generation_config
from vlm.model.sizes import LanguageSizes, VisionSizes, language_sizes, vision_sizes
from vlm.weights import Row, language_table, projector_table, vision_table

_WITH_PICTURES = """\
{%- set text = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set content.text = message['content'] -%}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}
{%- set content.text = content.text + IMAGE_TOKEN + '\\n' -%}
{%- elif item['type'] == 'text' -%}
{%- set content.text = content.text + item['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set text.messages = text.messages + [{'role': message['role'], 'content': content.text}] -%}
{%- endfor -%}
{%- set messages = text.messages -%}
"""
"""Goes before the language model's own template, which knows messages of text only: `<image>`, newline, text."""


def export(checkpoint: Path, out: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a checkpoint of any stage as a Hugging Face folder with safetensors.

    Args:
        checkpoint: a combined checkpoint, one of a stage, or a stage's folder.
        out: the folder. Complete or absent; an older export there is replaced at the end.
        max_shard_bytes: weights beyond are in further files, with an index.

    Raises:
        ValueError: only one of the base models is in the checkpoint, the projector has a shape that `transformers`
            cannot express, or `out` cannot be written.
    """
    tensors = Tensors(Path(checkpoint))
    path, manifest = tensors.links[0]
    if manifest.kind not in ("combined", "stage"):
        raise ValueError(
            f"{path}: is a {manifest.kind} model alone; combine it first, or export it with --part {manifest.kind}"
        )
    language, vision = _config(path, "language"), _config(path, "vision")
    sizes, vision_size = language_sizes(language), vision_sizes(vision)
    models = Models.model_validate(manifest.models)
    if models.projector.hidden_size != sizes.hidden_size:
        raise ValueError(
            f"models.projector.hidden_size: {models.projector.hidden_size} cannot be exported as LLaVA: transformers' "
            f"projector has the language model's hidden size {sizes.hidden_size} in the middle; export the models of "
            f"{path} alone with --part language and --part vision"
        )

    def finish(folder: Path) -> None:
        token = _tokenizer_files(_side(path, "language"), folder, models.language.image_token)
        files.write_json(folder / "config.json", _llava_config(language, vision, manifest, token, vision_size))
        write_generation_config(_side(path, "language"), folder, language)
        _processor_files(_side(path, "vision"), folder, manifest, vision_size)

    rows = _rows(language, vision, models, sizes, vision_size)
    dtype = getattr(torch, manifest.settings["dtype"])
    write(tensors, rows, Path(out), "llava", finish, dtype, max_shard_bytes)


def _side(path: Path, part: str) -> Path:
    return checkpoint.huggingface(path, part)


def _config(path: Path, part: str) -> dict[str, Any]:
    config: dict[str, Any] = files.read_json(_side(path, part) / "config.json")
    return config


def _rows(
    language: dict[str, Any], vision: dict[str, Any], models: Models, sizes: LanguageSizes, vision_size: VisionSizes
) -> list[Row]:
    projector = models.projector
    return [
        *language_table(language, theirs="language_model.").rows,
        *vision_table(vision, theirs="vision_tower.vision_model.").rows,
        *projector_table(vision_size.hidden_size, projector.hidden_size, sizes.hidden_size, bias=projector.bias).rows,
    ]


def _llava_config(
    language: dict[str, Any], vision: dict[str, Any], manifest: Manifest, token: int, size: VisionSizes
) -> dict[str, Any]:
    models = Models.model_validate(manifest.models)
    dtype = manifest.settings["dtype"]
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {**language, "dtype": dtype},
        "vision_config": {**vision, "dtype": dtype},
        "image_token_index": token,
        "image_seq_length": size.num_image_tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": models.projector.bias,
        "vision_feature_layer": models.vision.feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": bool(language.get("tie_word_embeddings", False)),
        "dtype": dtype,
    }


def _tokenizer_files(source: Path, folder: Path, image_token: str) -> int:
    """Copy the tokenizer, with a chat template that takes pictures too; returns the image token's id."""
    from tokenizers import Tokenizer

    copy_side_files(source, folder)
    config = files.read_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").is_file() else {}
    template = config.pop("chat_template", None)
    if (source / "chat_template.jinja").is_file():
        template = (source / "chat_template.jinja").read_text()
    if isinstance(template, str):
        literal = "'" + image_token.replace("\\", "\\\\").replace("'", "\\'") + "'"
        before = _WITH_PICTURES.replace("IMAGE_TOKEN", literal)
        # A LLaVA that was converted brings it along.
        files.write_text(folder / "chat_template.jinja", before + template.removeprefix(before))
    # Batches of prompts are padded on the left: the answer goes on from the last token.
    config |= {"processor_class": "LlavaProcessor", "padding_side": "left"}
    files.write_json(folder / "tokenizer_config.json", config)
    token = Tokenizer.from_file(str(source / "tokenizer.json")).token_to_id(image_token)
    assert token is not None, image_token  # combining refused a token that is not in the vocabulary
    return int(token)


def _processor_files(source: Path, folder: Path, manifest: Manifest, size: VisionSizes) -> None:
    """Image processor as the pictures were prepared in training, and the processor that joins it to the tokenizer."""
    path = source / "preprocessor_config.json"
    found = files.read_json(path) if path.is_file() else {}
    crop = manifest.settings["image_resize"] == "crop"
    own = image_processor(size.image_size, found, crop=crop) | {"processor_class": "LlavaProcessor"}
    files.write_json(folder / "preprocessor_config.json", own)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": manifest.models["language"]["image_token"],
        "patch_size": size.patch_size,
        "num_additional_image_tokens": 1,  # the class token, which the select strategy takes off again
        "vision_feature_select_strategy": "default",
    }
    files.write_json(folder / "processor_config.json", processor)
