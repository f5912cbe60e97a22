"""Small evaluation files in the layouts of the real sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

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
