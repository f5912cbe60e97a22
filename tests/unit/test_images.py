from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm import images

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZE = 64


def _picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "P": 3}[mode]
    pixels = draw.integers(0, 256, (height, width, channels), np.uint8)
    if mode == "P":
        image = Image.fromarray(pixels).quantize(16)
        image.info["transparency"] = 3
        return image
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode)


def _bytes(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def _reference(image: Image.Image, mode: str, **options: Any) -> np.ndarray:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    if mode == "crop":
        processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    else:
        processor = CLIPImageProcessorPil(size={"height": SIZE, "width": SIZE}, do_center_crop=False)
    return np.asarray(processor(images=[image], **options)["pixel_values"][0])


PICTURES = {
    "own-size": (64, 64, "RGB", "PNG"),
    "wide-odd-rest": (131, 70, "RGB", "PNG"),
    "tall-enlarged": (33, 50, "RGB", "PNG"),
    "truncated-not-rounded": (100, 199, "RGB", "PNG"),
    "one-pixel-high": (90, 1, "RGB", "PNG"),
    "jpeg": (97, 81, "RGB", "JPEG"),
    "grey-jpeg": (97, 81, "L", "JPEG"),
    "grey-with-alpha": (70, 97, "LA", "PNG"),
    "transparent": (97, 70, "RGBA", "PNG"),
    "palette-with-transparency": (80, 70, "P", "PNG"),
}


@pytest.mark.parametrize("mode", images.RESIZES)
@pytest.mark.parametrize("case", PICTURES)
def test_pixels_equal_transformers(case: str, mode: images.Resize) -> None:
    width, height, colours, kind = PICTURES[case]
    data = _bytes(_picture(width, height, colours), kind)
    pixels = images.resize(images.load(data), SIZE, mode)
    original = Image.open(io.BytesIO(data))
    expected = _reference(original, mode, do_rescale=False, do_normalize=False)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, expected)
    normalised = images.normalise(torch.from_numpy(pixels)[None], MEAN, STD, torch.float32)
    np.testing.assert_array_equal(normalised[0].numpy(), _reference(original, mode))


def test_pixels_that_learn_may_follow_those_of_inference() -> None:
    """The constants are made once, and autograd refuses to keep tensors of inference."""
    mean, std = (0.1, 0.2, 0.3), (0.7, 0.8, 0.9)
    with torch.inference_mode():
        images.normalise(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), mean, std, torch.float32)
    pixels = torch.zeros(1, 3, 2, 2, requires_grad=True)
    images.normalise(pixels, mean, std, torch.float32).sum().backward()
    expected = (1 / 255 / torch.tensor(std)).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(pixels.grad, expected)


def test_path_and_bytes_give_the_same_picture(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(_bytes(_picture(40, 30), "JPEG"))
    assert images.load(path).tobytes() == images.load(path.read_bytes()).tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<html>not found</html>", "not a picture"),
        (b"", "not a picture"),
        (_bytes(_picture(64, 64), "JPEG")[:600], "does not decode"),
        (_bytes(_picture(64, 64), "PNG")[:600], "does not decode"),
    ],
    ids=["html", "empty", "truncated-jpeg", "truncated-png"],
)
def test_damaged_picture_is_refused_by_name(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"images/00000/000000001.jpg: .*{message}"):
        images.load(data, name="images/00000/000000001.jpg")
    with pytest.raises(ValueError, match=f"images/00000/000000001.jpg: .*{message}"):
        images.verify(data, name="images/00000/000000001.jpg")


@pytest.mark.parametrize("case", PICTURES)
def test_whole_picture_passes_the_cheap_check(case: str) -> None:
    width, height, colours, kind = PICTURES[case]
    images.verify(_bytes(_picture(width, height, colours), kind), name=case)


def test_unknown_resize_is_refused() -> None:
    with pytest.raises(ValueError, match="data.image_resize: 'pad'"):
        images.resize(_picture(64, 64), 64, "pad")  # type: ignore[arg-type]
