"""`vlm convert language`: a Mistral or Llama folder to a Megatron checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlm.convert import source as sources
from vlm.weights import Folder, language_table

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)


def convert(source: Path, out: Path) -> None:
    """Convert a `MistralForCausalLM` or `LlamaForCausalLM` folder with safetensors.

    Args:
        source: the folder; left as it is.
        out: the checkpoint. Complete or absent; what was there before is replaced at the end.

    Raises:
        ValueError: naming the file and the key or weight: an architecture or sizes that are not supported, a missing,
            unexpected or misshapen weight, a truncated or missing file, pickled weights, no tokenizer.
    """
    source = Path(source)
    weights = sources.open_folder(source)
    config = sources.read_config(source)
    table = language_table(config)
    weights.check(table)
    check_tied(weights, config)
    check_tokenizer(source)
    bases = {"language": sources.Base(config, SIDE_FILES)}
    sources.write("language", "language", ("language_model",), weights, table.rows, Path(out), bases)


def check_tokenizer(source: Path) -> None:
    if not (source / "tokenizer.json").is_file():
        raise ValueError(f"{source / 'tokenizer.json'}: is missing; save the tokenizer as a fast one beside the model")


def check_tied(weights: Folder, config: Mapping[str, Any], theirs: str = "") -> None:
    """Refuse a head stored beside the embedding it shares and with other numbers: one of the two would be lost.

    Args:
        theirs: prefix of the language model's names.
    """
    head, embedding = theirs + "lm_head.weight", theirs + "model.embed_tokens.weight"
    if not config.get("tie_word_embeddings") or head not in weights.entries:
        return
    if not torch.equal(weights.read(head), weights.read(embedding)):
        raise ValueError(
            f"{weights.path}: {head} differs from {embedding}, but config.json says tie_word_embeddings: true; set it "
            f"false to convert both, or remove {head}"
        )
