"""`vlm convert vision`: a CLIP folder, with or without its text tower, to a Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm.convert import source as sources
from vlm.model.sizes import openai_vision_config
from vlm.weights import OPENAI, Folder, Table, vision_naming, vision_table

SIDE_FILES = ("preprocessor_config.json", "LICENSE")


def convert(source: Path, out: Path) -> None:
    """Convert a CLIP vision tower with safetensors; a text tower and the projection into the joint space are left out.

    Args:
        source: folder of a `CLIPVisionModel`, `CLIPVisionModelWithProjection` or `CLIPModel`, or one in OpenAI's own
            names (`visual.*`), which needs no config.json; left as it is.
        out: the checkpoint. Complete or absent; what was there before is replaced at the end.

    Raises:
        ValueError: naming the file and the key or weight, as `vlm.convert.language`.
    """
    weights, config, table = read(Path(source))
    bases = {"vision": sources.Base(config, SIDE_FILES)}
    sources.write("vision", "vision", ("vision_model",), weights, table.rows, Path(out), bases)


def read(source: Path) -> tuple[Folder, dict[str, Any], Table]:
    """The weights of a vision tower, its settings as those of a `CLIPVisionModel`, and what its weights are called.

    Raises:
        ValueError: see `convert`.
    """
    weights = sources.open_folder(source)
    naming, prefix = vision_naming(weights.entries)
    if naming is OPENAI and not (source / "config.json").is_file():
        if (source / "open_clip_config.json").is_file():
            raise ValueError(
                f"{source}: has open_clip_config.json, whose activation may be another than OpenAI's; write its sizes "
                "and hidden_act as the config.json of a CLIPVisionModel"
            )
        config = openai_vision_config(source, {name: entry.shape for name, entry in weights.entries.items()})
    else:
        config = sources.read_config(source)
    table = vision_table(config, theirs=prefix, naming=naming)
    weights.check(table)
    return weights, tower(config), table


def tower(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the vision tower alone."""
    inside = config.get("vision_config", config)
    return {**inside, "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
