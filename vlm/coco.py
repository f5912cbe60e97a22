"""COCO captions files, read the same way by the command that captions the pictures and the one that scores them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm import files

ImageId = int | str


def read_references(path: Path) -> dict[ImageId, list[str]]:
    """References of each image, in the order of the file.

    Raises:
        ValueError: not a COCO captions file, or a listed image without a caption.
    """
    content = files.read_json(path)
    entries = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: not a COCO captions file, expected an object with a list `annotations`")
    references: dict[ImageId, list[str]] = {}
    for number, entry in enumerate(entries):
        image, caption = caption_of(entry, ("caption",), f"{path}: annotations[{number}]")
        references.setdefault(image, []).append(caption)
    listed = [image["id"] for image in content.get("images", []) if isinstance(image, dict) and "id" in image]
    if bare := [image for image in listed if image not in references]:
        raise ValueError(f"{path}: {len(bare)} images have no caption, first id {bare[0]}")
    return references


def read_pictures(path: Path, folder: Path) -> dict[ImageId, Path]:
    """Where each listed image lies, in the order of the file: its `file_name`, or COCO's naming of its id.

    Args:
        path: COCO captions file; the Karpathy ground truth lists images by id alone.
        folder: the pictures, for instance `val2014`.

    Raises:
        ValueError: not a COCO captions file, or an image without an id or listed twice.
    """
    content = files.read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise ValueError(f"{path}: not a COCO captions file, expected an object with a list `images`")
    pictures: dict[ImageId, Path] = {}
    for number, image in enumerate(images):
        where = f"{path}: images[{number}]"
        name = image_id(image, "id", where)
        if name in pictures:
            raise ValueError(f"{where}: id {name} is listed more than once")
        if not image.get("file_name") and not isinstance(name, int):
            raise ValueError(f"{where}: {name!r} has no `file_name`")
        pictures[name] = folder / (image.get("file_name") or f"COCO_{folder.name}_{name:012d}.jpg")
    return pictures


def image_id(entry: Any, key: str, where: str) -> ImageId:
    """The image that an entry is about.

    Raises:
        ValueError: the entry is not an object, or `key` is neither a whole number nor a string.
    """
    name = entry.get(key) if isinstance(entry, dict) else None
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise ValueError(f"{where}: expected a whole number or a string under `{key}`, found {name!r}")
    return name


def caption_of(entry: Any, keys: Sequence[str], where: str) -> tuple[ImageId, str]:
    """Image and text of an annotation or a prediction; the text is under the first of `keys` that is there.

    Raises:
        ValueError: either is missing or of another type.
    """
    name = image_id(entry, "image_id", where)
    caption = next((entry[key] for key in keys if key in entry), None)
    if not isinstance(caption, str):
        raise ValueError(f"{where}: expected a string under `{'` or `'.join(keys)}`, found {caption!r}")
    return name, caption
