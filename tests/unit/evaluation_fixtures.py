"""Small evaluation files in the layouts of the real sets."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import yaml
from PIL import Image

from vlm import config

ROOT = Path(__file__).resolve().parents[2]


def merged(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """Overlay one tree of settings on another, as Snakemake's --configfile does."""
    both = dict(base)
    for key, value in overlay.items():
        both[key] = merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return both


def write_config(path: Path, **changes: Any) -> Path:
    """The miniature's resolved settings, with changes such as `seed=7`."""
    trees = [yaml.safe_load((ROOT / "config" / name).read_text()) for name in ("config.yaml", "tiny.yaml")]
    settings = config.validate(merged(merged(*trees), changes))
    path.write_text(config.dump(settings))
    return path


def write_coco(path: Path, references: dict[int, list[str]]) -> Path:
    entries = [(image, text) for image, texts in references.items() for text in texts]
    content = {
        "images": [{"id": image, "file_name": f"COCO_val2014_{image:012d}.jpg"} for image in references],
        "annotations": [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(entries)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_lines(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def picture(seed: int) -> bytes:
    """A PNG of 64 x 64 random blocks."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(np.kron(pixels, np.ones((8, 8, 1), np.uint8))).save(stream, "PNG")
    return stream.getvalue()


def write_pictures(folder: Path, images: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        (folder / f"COCO_val2014_{image:012d}.jpg").write_bytes(picture(image))


def mmmu_row(name: str, question: str, options: list[str], *, images: int, answer: str = "A") -> dict[str, Any]:
    """One question as MMMU's parquet files hold it: options as the text of a Python list, seven picture columns."""
    row: dict[str, Any] = {
        "id": name,
        "question": question,
        "options": str(options),
        "explanation": "",
        "question_type": "multiple-choice" if options else "open",
        "answer": answer,
    }
    for number in range(1, 8):
        there = number <= images
        row[f"image_{number}"] = {"bytes": picture(number), "path": f"{number}.png"} if there else None
    return row


def write_mmmu(folder: Path, subjects: dict[str, list[dict[str, Any]]]) -> Path:
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    for subject, rows in subjects.items():
        columns = {
            key: pyarrow.array([row[key] for row in rows], struct if key.startswith("image_") else pyarrow.string())
            for key in rows[0]
        }
        (folder / subject).mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table(columns), folder / subject / "validation-00000-of-00001.parquet")
    answers = {
        row["id"]: {
            "question_type": row["question_type"].replace("open", "short-answer"),
            "ground_truth": row["answer"],
        }
        for rows in subjects.values()
        for row in rows
    }
    return write_json(folder / "answer_dict_val.json", answers)
