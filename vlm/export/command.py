"""`vlm export`: one checkpoint, in the format somebody else's tools read."""

from __future__ import annotations

from pathlib import Path

from vlm import config as settings
from vlm.checkpoint import check_settings, read_manifest, resolve


def export(
    checkpoint: Path,
    out: Path,
    format: str = "transformers",
    tensor: int | None = None,
    transformer_impl: str = "",
    part: str | None = None,
    config: Path | None = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder, or as Megatron-LM's per-rank files.

    Args:
        format: `transformers` or `megatron`.
        tensor, transformer_impl: of `vlm.export.legacy`; for `megatron` only.
        part: `llava` (the default), or the language or vision model alone; for `transformers` only.
        config: resolved settings that the checkpoint must have been made with; None to take it as it is.

    Raises:
        ValueError: an option of the other format, or what the format's own module refuses.
    """
    if config is not None:
        manifest = read_manifest(resolve(checkpoint))
        check_settings(settings.load(config), checkpoint, manifest.models, manifest.settings.get("image_resize"))
    if format == "megatron":
        if part is not None:
            raise ValueError("--part is for --format transformers; a converted base model is exported as it is")
        from vlm.export import legacy

        legacy.export(checkpoint, out, tensor or 1, transformer_impl or "transformer_engine")
        return
    if tensor is not None or transformer_impl:
        raise ValueError("--tensor and --transformer-impl are for --format megatron")
    from vlm.export import base, llava

    writers = {"llava": llava.export, "language": base.export_language, "vision": base.export_vision}
    if part not in (None, *writers):
        raise ValueError(f"--part: {part!r} does not exist, allowed are {', '.join(writers)}")
    writers[part or "llava"](checkpoint, out)
