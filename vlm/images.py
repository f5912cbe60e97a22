"""From the bytes of a picture to the pixels a CLIP model was trained on, equal to `transformers` bit by bit.

Pictures stay uint8 until they are on the device: a quarter of the bytes to move and to keep.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

Resize = Literal["crop", "square"]
RESIZES = ("crop", "square")


def load(source: bytes | str | Path, *, name: str | None = None) -> Image.Image:
    """Decode a picture to RGB. Transparency is laid over white, as `transformers`' CLIP processor does.

    Args:
        source: the file's bytes or its path.
        name: what to call the picture in a message (default: the path).

    Raises:
        ValueError: the bytes are no picture, or a truncated one.
        FileNotFoundError: the path does not exist.
    """
    where = name or (str(source) if not isinstance(source, bytes) else "picture")
    with _opened(source, where) as image:
        image.load()
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _opened(source: bytes | str | Path, name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not a picture that Pillow can read") from None
    # Pillow's decoders raise many types on damaged files: OSError, SyntaxError (png), struct.error, DecompressionBomb.
    except Exception as error:
        raise ValueError(f"{name}: the picture does not decode ({type(error).__name__}: {error})") from error


def verify(data: bytes, *, name: str) -> None:
    """Refuse a damaged picture at about a third of the price of `load`.

    A JPEG is read to its end, but only to an eighth of its size: libjpeg then skips most of the inverse transform.

    Raises:
        ValueError: the bytes are no picture, or a truncated one.
    """
    with _opened(data, name) as image:
        image.draft("RGB", (1, 1))
        image.load()


def resize(image: Image.Image, size: int, mode: Resize) -> np.ndarray:
    """Bring a picture to the model's square, with Pillow's bicubic filter.

    Args:
        image: RGB.
        size: edge of the result in pixels.
        mode: `crop`: shortest edge to `size`, then the centre, as `CLIPImageProcessor` does by default;
            `square`: stretched to `size` x `size`, as `CLIPImageProcessor(size={"height": .., "width": ..})` does.

    Returns:
        uint8 [3, size, size], contiguous.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in RESIZES:
        raise ValueError(f"data.image_resize: {mode!r} does not exist, allowed are {', '.join(RESIZES)}")
    width, height = image.size
    if mode == "square":
        target = (size, size)
    else:
        # transformers.image_transforms.get_resize_output_image_size: the longer edge is truncated, not rounded.
        short, long = sorted((width, height))
        longer = int(size * long / short)
        target = (size, longer) if width <= height else (longer, size)
    if target != image.size:
        image = image.resize(target, Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    if mode == "crop":
        top, left = (target[1] - size) // 2, (target[0] - size) // 2
        pixels = pixels[top : top + size, left : left + size]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def normalise(
    pixels: torch.Tensor,
    mean: tuple[float, ...] | list[float],
    std: tuple[float, ...] | list[float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """(pixels / 255 - mean) / std, in fp32 on the pixels' device.

    Args:
        pixels: uint8 [N, 3, H, W].
        mean, std: per channel, from the vision model's preprocessor_config.json.
        dtype: of the result.

    Returns:
        [N, 3, H, W] of `dtype`.
    """
    mean_1C11, std_1C11 = (_per_channel(tuple(values), pixels.device) for values in (mean, std))
    return ((pixels.to(torch.float32) / 255.0 - mean_1C11) / std_1C11).to(dtype)


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """fp32 [1, 3, 1, 1]. Copied once, since each copy waits for all that the device was asked to do before."""
    with torch.inference_mode(False):  # for what is trained later too
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
