"""`vlm convert llava`: a `transformers` LLaVA folder to a checkpoint that training starts from, as the combined one."""

from __future__ import annotations

from pathlib import Path

from vlm.checkpoint import PARTS
from vlm.convert import language as languages
from vlm.convert import source as sources
from vlm.convert import vision as visions
from vlm.convert.combine import token_id
from vlm.weights import exported_rows, read_exported

_SEED = 0
"""Nothing is drawn: the projector is in the folder."""


def convert(source: Path, out: Path) -> None:
    """Convert a `LlavaForConditionalGeneration` folder, for instance LLaVA-1.5's on the Hub, or one of `vlm export`.

    Args:
        source: the folder; left as it is.
        out: a checkpoint of kind `combined`. Complete or absent; an older one there is replaced at the end.

    Raises:
        ValueError: naming the file and the key or weight: a LLaVA that this model cannot express, missing, unexpected
            or misshapen weights, no tokenizer.
    """
    source = Path(source)
    weights = sources.open_folder(source)
    exported = read_exported(source)
    rows = exported_rows(exported, weights)
    languages.check_tied(weights, exported.language_config, "language_model.")
    languages.check_tokenizer(source)
    token_id(source, exported.language_config, exported.models.language.image_token)
    bases = {
        "language": sources.Base(exported.language_config, languages.SIDE_FILES),
        "vision": sources.Base(visions.tower(exported.vision_config), visions.SIDE_FILES),
    }
    settings = {"seed": _SEED, "dtype": exported.dtype, "image_resize": exported.image_resize}
    models = exported.models.model_dump(mode="json")
    parts = tuple(PARTS.values())
    sources.write("llava", "combined", parts, weights, rows, Path(out), bases, models=models, settings=settings)
