"""The base models' sizes, wherever they can be had before a model is fetched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm import files
from vlm.config import Config, Parallel
from vlm.model.sizes import LanguageSizes, VisionSizes, language_sizes, vision_sizes

KNOWN: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-Instruct-v0.3": {
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32768,
    },
    "openai/clip-vit-large-patch14-336": {
        "architectures": ["CLIPVisionModel"],
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "image_size": 336,
        "patch_size": 14,
        "torch_dtype": "float32",
    },
}
"""What the `config.json` of the recipe's own base models says, by Hub repository: for the days before they are fetched.
Of CLIP the vision tower alone."""


@dataclass(frozen=True)
class Bases:
    """Sizes of both base models. Made by `bases`."""

    language: LanguageSizes
    vision: VisionSizes
    configs: Mapping[str, Mapping[str, Any]]
    """`config.json` by part."""
    found: Mapping[str, str]
    """Where the sizes of each part come from, in words."""

    def stored_bytes(self, part: str) -> int:
        """Bytes of a weight as the base model stores it, which converted checkpoints keep."""
        config = self.configs[part]
        stored = config.get("torch_dtype") or config.get("dtype") or "float32"
        return 2 if stored in ("bfloat16", "float16") else 4

    def check(self, parallel: Parallel) -> None:
        """Refuse a layout that the models cannot be split over.

        Raises:
            ValueError: the size that does not divide, and the key of the layout.
        """
        language_sizes(self.configs["language"], parallel.tensor, parallel.pipeline)
        vision_sizes(self.configs["vision"], parallel.tensor)


def bases(
    config: Config, *, language: Path | None = None, vision: Path | None = None, results: Path = Path("results")
) -> Bases:
    """Find the sizes of both base models.

    Looked into, in this order: the folders given here, the source of the configuration where it is a folder, what the
    workflow fetched to `results/{run}/sources`, the table of known repositories.

    Args:
        language, vision: Hugging Face folders, of which `config.json` is read.
        results: folder of the runs.

    Raises:
        ValueError: sizes that are nowhere, a folder given here without a config.json, or models that cannot be built.
    """
    read = {}
    for part, folder in (("language", language), ("vision", vision)):
        read[part] = _find(config, part, folder, results)
    configs = {part: content for part, (content, _) in read.items()}
    found = {part: where for part, (_, where) in read.items()}
    return Bases(language_sizes(configs["language"]), vision_sizes(configs["vision"]), configs, found)


def _find(config: Config, part: str, given: Path | None, results: Path) -> tuple[dict[str, Any], str]:
    source = getattr(config.models, part).source
    if given is not None:
        return files.read_json(given / "config.json"), f"{given / 'config.json'}"
    for folder in (Path(source), results / config.run / "sources" / part):
        if (folder / "config.json").is_file():
            return files.read_json(folder / "config.json"), f"{folder / 'config.json'}"
    if source in KNOWN:
        return KNOWN[source], f"table of known models, {source}"
    raise ValueError(
        f"models.{part}.source: the sizes of {source!r} are not known before it is fetched; give a folder with its "
        f"config.json as --{part}, or fetch it first. Known are {', '.join(KNOWN)}"
    )
