"""`vlm convert vision`: a CLIP folder, with or without its text tower, to a Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm.convert import source as sources
from vlm.weights import Folder, vision_table

SIDE_FILES = ("preprocessor_config.json", "LICENSE")
_PREFIXES = ("vision_model.", "")
"""Of the names in a `CLIPModel` and in files of transformers 4; transformers 5 writes a `CLIPVisionModel` without."""


def convert(source: Path, out: Path) -> None:
    """Convert a `CLIPVisionModel` or `CLIPModel` folder with safetensors; a text tower is left out.

    Args:
        source: the folder; left as it is.
        out: the checkpoint. Complete or absent; what was there before is replaced at the end.

    Raises:
        ValueError: naming the file and the key or weight, as `vlm.convert.language`.
    """
    source = Path(source)
    config = sources.read_config(source)
    weights = Folder(source)
    prefix = weights.prefix("embeddings.class_embedding", _PREFIXES)
    table = vision_table(config, theirs=prefix)
    weights.check(table)
    sources.write("vision", "vision_model", weights, table, Path(out), _tower(config), SIDE_FILES)


def _tower(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the vision tower alone."""
    tower = config.get("vision_config", config)
    return {**tower, "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
