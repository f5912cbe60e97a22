"""`vlm convert language`: a Mistral or Llama folder to a Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path

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
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


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
    if config.get("tie_word_embeddings") and HEAD in weights.entries:
        _check_tied(weights)
    if not (source / "tokenizer.json").is_file():
        raise ValueError(f"{source / 'tokenizer.json'}: is missing; save the tokenizer as a fast one beside the model")
    sources.write("language", "language_model", weights, table, Path(out), config, SIDE_FILES)


def _check_tied(weights: Folder) -> None:
    """A head stored beside the embedding it shares must be the same numbers; else one of the two is meant."""
    if not torch.equal(weights.read(HEAD), weights.read(EMBEDDING)):
        raise ValueError(
            f"{weights.path}: {HEAD} differs from {EMBEDDING}, but config.json says tie_word_embeddings: true; set it "
            f"false to convert both, or remove {HEAD}"
        )
