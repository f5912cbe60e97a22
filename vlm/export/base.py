"""`vlm export --part language` and `--part vision`: one model of a checkpoint alone, as its base model's folder was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm import checkpoint, files
from vlm.checkpoint import PARTS, Tensors
from vlm.export.folder import MAX_SHARD_BYTES, copy_side_files, write, write_generation_config
from vlm.model.sizes import CLIP_MEAN, CLIP_STD, vision_sizes
from vlm.weights import language_table, vision_table

BICUBIC = 3


def export_language(checkpoint: Path, out: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the language model of any checkpoint as `AutoModelForCausalLM` and `AutoTokenizer` load it.

    Args:
        checkpoint: of any kind but `vision`, or a stage's folder.
        out: the folder. Complete or absent; an older export there is replaced at the end.

    Raises:
        ValueError: the checkpoint holds no language model, or `out` cannot be written.
    """
    tensors, source, config = _open(checkpoint, "language")

    def finish(folder: Path) -> None:
        copy_side_files(source, folder)
        write_generation_config(source, folder, config)
        files.write_json(folder / "config.json", with_dtype(config, tensors, "language"))

    write(tensors, language_table(config).rows, Path(out), "language", finish, max_shard_bytes=max_shard_bytes)


def export_vision(checkpoint: Path, out: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the vision model of any checkpoint as `CLIPVisionModel` and `CLIPImageProcessor` load it.

    Arguments and errors are those of `export_language`.
    """
    tensors, source, config = _open(checkpoint, "vision")

    def finish(folder: Path) -> None:
        copy_side_files(source, folder)
        files.write_json(folder / "config.json", with_dtype(config, tensors, "vision"))
        if not (folder / "preprocessor_config.json").is_file():
            edge = vision_sizes(config).image_size
            files.write_json(folder / "preprocessor_config.json", image_processor(edge, {}))

    rows = vision_table(config, theirs="vision_model.").rows
    write(tensors, rows, Path(out), "vision", finish, max_shard_bytes=max_shard_bytes)


def _open(path: Path, part: str) -> tuple[Tensors, Path, dict[str, Any]]:
    tensors = Tensors(Path(path))
    found, manifest = tensors.links[0]
    if manifest.kind in PARTS and manifest.kind != part:
        raise ValueError(f"{found}: is a {manifest.kind} model alone, there is no {part} model in it")
    source = checkpoint.huggingface(found, part)
    return tensors, source, files.read_json(source / "config.json")


def with_dtype(config: dict[str, Any], tensors: Tensors, part: str) -> dict[str, Any]:
    """A base model's configuration that names the type of the weights as they are now, where all have one."""
    prefix = f"{PARTS[part]}."
    found = {dtype for key, (dtype, _) in tensors.specs.items() if key.startswith(prefix)}
    if len(found) > 1:
        return config
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, key: str(found.pop()).removeprefix("torch.")}


def image_processor(image_size: int, found: dict[str, Any], *, crop: bool = True) -> dict[str, Any]:
    """Settings of a `CLIPImageProcessor`.

    Args:
        image_size: pixels per side.
        found: the base model's own, whose pixel statistics count.
        crop: shortest edge to size and centre crop; else stretch to size.
    """
    side = {"height": image_size, "width": image_size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size} if crop else side,
        "resample": BICUBIC,
        "do_center_crop": crop,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": found.get("image_mean", CLIP_MEAN),
        "image_std": found.get("image_std", CLIP_STD),
    }
