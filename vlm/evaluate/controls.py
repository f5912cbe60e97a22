"""Captions that need no model, because shared templates flatter: a caption score means something only beside these.

`random` is a training caption drawn by seed, `nearest` the caption of the training picture with the nearest pixels,
`reference` one of the image's own references, scored against the others.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from vlm import coco, files
from vlm.config import COMBINED, Config, load
from vlm.pictures import Pictures

Control = Literal["random", "nearest", "reference"]
SIDE = 32
"""Pixels along each side of the thumbnails that `nearest` compares: 3072 numbers per picture."""
CHUNK = 1024
"""Training pictures compared at a time; memory stays flat in their number."""


def predict(
    config: Path, control: Control, source: Path, train: Path, out: Path, annotations_out: Path | None = None
) -> None:
    """Write a control's captions as a COCO results list.

    Args:
        config: resolved settings; they name the files of the caption test and of the first stage's data.
        control: which one.
        source: folder of the caption evaluation data.
        train: folder of the caption training data, in the layout of LLaVA-Pretrain.
        out: COCO results list `[{"image_id", "caption"}]`.
        annotations_out: COCO captions file without the references that `reference` took; needed by `reference` only.

    Raises:
        ValueError: a broken or missing file, named; `reference` without `annotations_out` or with one reference only.
    """
    settings = load(config)
    test = settings.evaluation.captions
    annotations = source / test.annotations
    references = coco.read_references(annotations)
    if control == "reference":
        if annotations_out is None:
            raise ValueError("--control reference needs --annotations-out for the references that are left")
        taken, left = hold_out(references, settings.seed, annotations)
        files.write_json(annotations_out, _coco(left))
        said = taken
    else:
        pairs = read_training(settings, train)
        if control == "random":
            drawn = np.random.default_rng(settings.seed).integers(len(pairs), size=len(references))
            said = {image: pairs[index][1] for image, index in zip(references, drawn, strict=True)}
        else:
            pictures = coco.read_pictures(annotations, source / test.images)
            if lost := [image for image in references if image not in pictures]:
                raise ValueError(f"{annotations}: {len(lost)} captioned images are not under `images`, first {lost[0]}")
            packed = Pictures(train)
            chosen = nearest(
                [pictures[image] for image in references],
                [path for path, _ in pairs],
                read=lambda path: packed.read(path.relative_to(train).as_posix()),
            )
            said = {image: pairs[index][1] for image, index in zip(references, chosen, strict=True)}
    files.write_json(out, [{"image_id": image, "caption": caption} for image, caption in said.items()])


def hold_out(references: dict[Any, list[str]], seed: int, where: Path) -> tuple[dict[Any, str], dict[Any, list[str]]]:
    """Take one reference of each image, drawn by seed, and give back what was taken and what is left.

    Raises:
        ValueError: an image has no second reference to be scored against.
    """
    if single := [image for image, texts in references.items() if len(texts) < 2]:
        raise ValueError(f"{where}: {len(single)} images have one reference only, first image_id {single[0]}")
    rng = np.random.default_rng(seed)
    drawn = {image: int(rng.integers(len(texts))) for image, texts in references.items()}
    taken = {image: texts[drawn[image]] for image, texts in references.items()}
    left = {image: [t for n, t in enumerate(texts) if n != drawn[image]] for image, texts in references.items()}
    return taken, left


def _coco(references: dict[Any, list[str]]) -> dict[str, Any]:
    entries = [(image, text) for image, texts in references.items() for text in texts]
    return {
        "images": [{"id": image} for image in references],
        "annotations": [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(entries, 1)],
    }


def read_training(settings: Config, train: Path) -> list[tuple[Path, str]]:
    """Pictures and captions (the first answer about each) of the data that the first stage trains on.

    Raises:
        ValueError: `train` does not hold that data, or it has no captioned picture.
    """
    first = next(stage for stage in settings.stages.values() if stage.start_from == COMBINED)
    names = [name for name in first.data if (train / settings.data.sets[name].annotations).is_file()]
    if not names:
        wanted = ", ".join(settings.data.sets[name].annotations for name in first.data)
        raise ValueError(f"{train}: holds none of the first stage's annotations ({wanted})")
    data = settings.data.sets[names[0]]
    pairs = []
    for entry in files.read_records(train / data.annotations):
        answers = [turn.get("value") for turn in entry.get("conversations", []) if turn.get("from") == "gpt"]
        if entry.get("image") and answers and isinstance(answers[0], str):
            pairs.append((train / data.images / entry["image"], answers[0].strip()))
    if not pairs:
        raise ValueError(f"{train / data.annotations}: no entry has both an `image` and a gpt turn")
    return pairs


def nearest(
    tests: Sequence[Path], training: Sequence[Path], read: Callable[[Path], bytes] = Path.read_bytes
) -> list[int]:
    """Index of the training picture nearest to each test picture, by L2 between thumbnails; the first of equals.

    With x a test and y a training thumbnail, |x - y|^2 = |x|^2 - 2 x.y + |y|^2, of which |x|^2 is the same for all y.
    Thumbnails hold whole numbers, so float64 sums are exact and equal distances compare equal.
    """
    tests_ND = np.concatenate([chunk for _, chunk in _thumbnails(tests, "test pictures")])
    best_N = np.full(len(tests), np.inf)
    index_N = np.zeros(len(tests), dtype=np.int64)
    for start, chunk_MD in _thumbnails(training, "training pictures", read):
        distance_NM = (chunk_MD * chunk_MD).sum(axis=1)[None, :] - 2 * tests_ND @ chunk_MD.T
        arg_N = distance_NM.argmin(axis=1)
        value_N = distance_NM[np.arange(len(tests)), arg_N]
        closer_N = value_N < best_N
        best_N[closer_N] = value_N[closer_N]
        index_N[closer_N] = start + arg_N[closer_N]
    return [int(index) for index in index_N]


def _thumbnails(
    paths: Sequence[Path], what: str, read: Callable[[Path], bytes] = Path.read_bytes
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Chunks of thumbnails [<= CHUNK, SIDE * SIDE * 3], each with the index of its first picture."""
    with tqdm(total=len(paths), desc=what, unit="picture") as progress:
        for start in range(0, len(paths), CHUNK):
            chunk = [_thumbnail(path, read) for path in paths[start : start + CHUNK]]
            progress.update(len(chunk))
            yield start, np.stack(chunk).astype(np.float64)


def _thumbnail(path: Path, read: Callable[[Path], bytes]) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(read(path))) as picture:
            picture.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG decodes at a fraction of its size, and faster
            small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path}: not a picture that decodes: {error}") from None
    return np.asarray(small).reshape(-1)
