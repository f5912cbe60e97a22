"""`vlm convert language`: a Mistral or Llama folder to a Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path

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
    config = sources.read_config(source)
    table = language_table(config)
    weights = Folder(source)
    weights.check(table)
    if not (source / "tokenizer.json").is_file():
        raise ValueError(f"{source / 'tokenizer.json'}: is missing; save the tokenizer as a fast one beside the model")
    sources.write("language", "language_model", weights, table, Path(out), config, SIDE_FILES)
