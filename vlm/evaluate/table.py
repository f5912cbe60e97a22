"""All scores of a run in one table: the model before and after each stage, and the controls it must beat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vlm import files
from vlm.config import COMBINED, load

CONTROLS = {
    "random": "control: random training caption",
    "nearest": "control: caption of the nearest training picture",
    "reference": "control: one reference against the others",
}
CAPTION_COLUMNS = {"CIDEr": "CIDEr", "Bleu_4": "BLEU-4", "METEOR": "METEOR", "ROUGE_L": "ROUGE-L"}
"""Metric in a score file, and its column."""
SHUFFLED = "CIDEr, pictures shuffled"
ACCURACY = "MMMU accuracy"
COLUMNS = (
    "name",
    "label",
    *CAPTION_COLUMNS.values(),
    SHUFFLED,
    ACCURACY,
    "images",
    "questions",
    "unparsed answers",
)


def write(config: Path, scores: Path, out: Path) -> None:
    """Gather the score files of a run in one CSV, scores as fractions, an empty cell where a control has no such score.

    Rows: `combined` (before training), each stage in the order of the settings, then the controls random, nearest and
    reference; `name` is the folder or file name, `label` the words for people.

    Args:
        config: resolved settings, for the names of the stages.
        scores: folder with `{model}/{captions,captions_shuffled,mmmu}.json` and `controls/{control}.json`.
        out: CSV with the columns COLUMNS.

    Raises:
        ValueError: a score file is missing or lacks a score, named; or the scores are over different numbers of items.
    """
    settings = load(config)
    models = {COMBINED: "before training", **{stage: f"after {stage}" for stage in settings.ordered_stages}}
    rows = [_model(scores / name, name, label) for name, label in models.items()]
    rows += [_control(scores / "controls" / f"{name}.json", name, label) for name, label in CONTROLS.items()]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    for column in ("images", "questions", "unparsed answers"):
        table[column] = table[column].astype("Int64")
    for column in ("images", "questions"):
        if table[column].dropna().nunique() > 1:
            counts = ", ".join(f"{name}: {count}" for name, count in zip(table["name"], table[column], strict=True))
            raise ValueError(f"{scores}: scores are over different numbers of {column} ({counts})")
    files.write_text(out, table.to_csv(index=False))


def _model(folder: Path, name: str, label: str) -> dict[str, Any]:
    captions, shuffled, mmmu = (
        files.read_json(folder / f"{task}.json") for task in ("captions", "captions_shuffled", "mmmu")
    )
    return {
        "name": name,
        "label": label,
        **_captions(captions, folder / "captions.json"),
        SHUFFLED: _number(shuffled, ("metrics", "CIDEr"), folder / "captions_shuffled.json"),
        ACCURACY: _number(mmmu, ("accuracy",), folder / "mmmu.json"),
        "questions": _number(mmmu, ("num_questions",), folder / "mmmu.json"),
        "unparsed answers": _number(mmmu, ("num_fallback",), folder / "mmmu.json"),
    }


def _control(path: Path, name: str, label: str) -> dict[str, Any]:
    return {"name": name, "label": label, **_captions(files.read_json(path), path)}


def _captions(score: Any, path: Path) -> dict[str, float]:
    row = {column: _number(score, ("metrics", metric), path) for metric, column in CAPTION_COLUMNS.items()}
    return row | {"images": _number(score, ("num_images",), path)}


def _number(score: Any, keys: tuple[str, ...], path: Path) -> float:
    for key in keys:
        score = score.get(key) if isinstance(score, dict) else None
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise ValueError(f"{path}: expected a number under {'.'.join(keys)}, found {score!r}")
    return score
