"""One question about pictures, answered on standard output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlm.generate import speaker
from vlm.prompt import IMAGE_TAG


def ask(checkpoint: Path, image: Sequence[Path], prompt: str, max_new_tokens: int = 64) -> None:
    """Print the answer alone.

    Args:
        checkpoint: Megatron checkpoint, folder of a stage, or exported `transformers` folder.
        image: pictures the question is about, none for a question in text alone.
        prompt: the question. Pictures without an `<image>` of their own come before it, as in training.
        max_new_tokens: longest answer.

    Raises:
        ValueError: a picture that does not decode, more `<image>` than pictures, or not a model's folder.
    """
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: expected at least 1, received {max_new_tokens}")
    for path in image:
        if not path.is_file():
            raise ValueError(f"--image: {path} does not exist")
    unplaced = len(image) - prompt.count(IMAGE_TAG)
    text = f"{IMAGE_TAG}\n" * max(unplaced, 0) + prompt
    model = speaker.load(checkpoint)
    print(model.answer([model.prompt(text, list(image), "--prompt")], max_new_tokens)[0])
