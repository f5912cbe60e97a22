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
from vlm.benchmarks import BENCHMARKS

ROOT = Path(__file__).resolve().parents[2]


def merged(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """Overlay one tree of settings on another, as Snakemake's --configfile does."""
    both = dict(base)
    for key, value in overlay.items():
        both[key] = merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return both


def overlay(name: str) -> dict[str, Any]:
    """The tree of one of the overlays in `config/`."""
    tree: dict[str, Any] = yaml.safe_load((ROOT / f"config/{name}.yaml").read_text())
    return tree


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


def benchmark_rows(name: str) -> list[dict[str, Any]]:
    """Three rows of a short-answer benchmark with the columns and types of its Hub repository."""
    mathvista = {"unit": None, "precision": None, "choices": None, "query": "Hint: Be short.\nQuestion: How many?"}
    metadata = {"task": "figure", "category": "math", "skills": ["counting", "logic"], "grade": "high"}
    rows: dict[str, list[dict[str, Any]]] = {
        "vqav2": [
            {
                "question_id": 100 + n,
                "answers": [{"answer": "dog" if p < n else "cat", "answer_id": p} for p in range(10)],
                "answer_type": ("yes/no", "number", "other")[n],
                "question_type": "what is",
            }
            for n in range(3)
        ],
        "textvqa": [{"question_id": n, "answers": ["stop"] * (10 - n) + ["go"] * n} for n in range(3)],
        "chartqa": [
            {"type": ("human_test", "augmented_test", "human_test")[n], "answer": ("14", "Yes", "-20")[n]}
            for n in range(3)
        ],
        "ai2d": [{"options": ["leaf", "root", "stem"], "answer": str(n)} for n in range(3)],
        "realworldqa": [{"answer": answer} for answer in ("B", "Yes", "3")],
        "docvqa": [
            {"questionId": str(7 + n), "answers": ["12 May", "May 12"], "question_types": ["form", "layout"][: n + 1]}
            for n in range(2)
        ]
        + [{"questionId": "9", "answers": ["$5"], "question_types": ["form"]}],
        "infovqa": [{"questionId": str(n), "answers": ["62%"], "answer_type": ["single span"]} for n in range(3)],
        "mathvista": [
            mathvista
            | {"pid": "1", "choices": ["3/11", "8/11"], "answer": "8/11", "question_type": "multi_choice"}
            | {"answer_type": "text", "metadata": metadata},
            mathvista
            | {"pid": "2", "answer": "14", "question_type": "free_form", "answer_type": "integer"}
            | {"metadata": metadata | {"skills": ["logic"]}},
            mathvista
            | {"pid": "3", "answer": "1.25", "question_type": "free_form", "answer_type": "float", "precision": 2.0}
            | {"metadata": metadata | {"task": "geometry"}},
        ],
        "ocrbench": [
            {"dataset": ("IIIT5K", "HME100k", "SROIE")[n], "question_type": kind, "answer": [("STOP"), "x ^ 2"]}
            for n, kind in enumerate(("Regular Text Recognition", "Formula", "Key Information Extraction"))
        ],
        "pope": [
            {"id": str(n), "question_id": str(n % 2), "answer": "yes", "category": ("popular", "popular", "random")[n]}
            for n in range(3)
        ],
    }
    image = BENCHMARKS[name].image
    asked = "What is it?"
    if name == "realworldqa":
        asked = "Which way?\nA. Left\nB. Right\nAnswer with the letter."
    return [
        {"question": f"{asked}" if n == 0 else f"{'Why? ' * n}"} | row | {image: {"bytes": picture(n), "path": None}}
        for n, row in enumerate(rows[name])
    ]


def write_benchmark(folder: Path, name: str, rows: list[dict[str, Any]] | None = None, row_group_size: int = 2) -> Path:
    """A benchmark's Hub repository with one parquet file of the split that is scored."""
    table = BENCHMARKS[name]
    path = folder / table.folder / f"{table.split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = benchmark_rows(name) if rows is None else rows
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return folder


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
