"""All scores of a run in one table: the model before and after each stage, and the controls it must beat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vlm import files
from vlm.benchmarks import BENCHMARKS
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
ITEMS = " items"
"""End of the column with a benchmark's number of questions."""
ERROR = "{} standard error"
"""Column beside a score's."""
COUNTS = ("images", "questions", "unparsed answers")
COLUMNS = (
    "name",
    "label",
    *CAPTION_COLUMNS.values(),
    SHUFFLED,
    ACCURACY,
    *COUNTS,
    *(ERROR.format(name) for name in (*CAPTION_COLUMNS.values(), SHUFFLED, ACCURACY)),
)
"""Of every table; three for each short-answer benchmark of the configuration follow."""


def write(config: Path, scores: Path, out: Path) -> None:
    """Gather the score files of a run in one CSV, scores as fractions, an empty cell where a control has no such score.

    Rows: `combined` (before training), each stage in the order of the settings, then the controls random, nearest and
    reference; `name` is the folder or file name, `label` the words for people.

    Args:
        config: resolved settings, for the names of the stages and of the benchmarks.
        scores: folder with `{model}/{captions,captions_shuffled,mmmu}.json`, one more file for each benchmark, and
            `controls/{control}.json`.
        out: CSV with the columns COLUMNS, then for each benchmark its first metric, its standard error and its items.

    Raises:
        ValueError: a score file is missing or lacks a score, named; or the scores are over different numbers of items.
    """
    settings = load(config)
    models = {COMBINED: "before training", **{stage: f"after {stage}" for stage in settings.ordered_stages}}
    benchmarks = list(settings.evaluation.benchmarks)
    rows = [_model(scores / name, name, label, benchmarks) for name, label in models.items()]
    rows += [_control(scores / "controls" / f"{name}.json", name, label) for name, label in CONTROLS.items()]
    more = [column for column in rows[0] if column not in COLUMNS]
    table = pd.DataFrame(rows, columns=[*COLUMNS, *more])
    sizes = ["images", "questions", *(column for column in more if column.endswith(ITEMS))]
    for column in (*sizes, "unparsed answers"):
        table[column] = table[column].astype("Int64")
    for column in sizes:
        if table[column].dropna().nunique() > 1:
            counts = ", ".join(f"{name}: {count}" for name, count in zip(table["name"], table[column], strict=True))
            raise ValueError(f"{scores}: scores are over different numbers of {column} ({counts})")
    files.write_text(out, table.to_csv(index=False))


def _model(folder: Path, name: str, label: str, benchmarks: Sequence[str]) -> dict[str, Any]:
    captions, shuffled, mmmu = (
        files.read_json(folder / f"{task}.json") for task in ("captions", "captions_shuffled", "mmmu")
    )
    row = {
        "name": name,
        "label": label,
        **_captions(captions, folder / "captions.json"),
        **_score(SHUFFLED, shuffled, folder / "captions_shuffled.json", "metrics", "CIDEr"),
        **_score(ACCURACY, mmmu, folder / "mmmu.json", "accuracy"),
        "questions": _number(mmmu, ("num_questions",), folder / "mmmu.json"),
        "unparsed answers": _number(mmmu, ("num_fallback",), folder / "mmmu.json"),
    }
    for benchmark in benchmarks:
        row |= _benchmark(folder / f"{benchmark}.json", BENCHMARKS[benchmark].title)
    return row


def _benchmark(path: Path, title: str) -> dict[str, Any]:
    score = files.read_json(path)
    metrics = score.get("metrics") if isinstance(score, dict) else None
    if not isinstance(metrics, dict) or not metrics:
        raise ValueError(f"{path}: expected an object under metrics, found {metrics!r}")
    metric = next(iter(metrics))
    column = f"{title} {metric.replace('_', ' ').replace('anls', 'ANLS')}"
    return _score(column, score, path, "metrics", metric) | {
        f"{title}{ITEMS}": _number(score, ("num_items",), path),
    }


def _control(path: Path, name: str, label: str) -> dict[str, Any]:
    return {"name": name, "label": label, **_captions(files.read_json(path), path)}


def _captions(score: Any, path: Path) -> dict[str, float]:
    row = {column: _number(score, ("metrics", metric), path) for metric, column in CAPTION_COLUMNS.items()}
    row["images"] = _number(score, ("num_images",), path)
    for metric, column in CAPTION_COLUMNS.items():
        row |= _score(column, score, path, "metrics", metric)
    return row


def _score(column: str, score: Any, path: Path, *keys: str) -> dict[str, float]:
    """A score and its standard error, which is under the same last key."""
    return {
        column: _number(score, keys, path),
        ERROR.format(column): _number(score, ("standard_errors", keys[-1]), path),
    }


def _number(score: Any, keys: tuple[str, ...], path: Path) -> float:
    for key in keys:
        score = score.get(key) if isinstance(score, dict) else None
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise ValueError(f"{path}: expected a number under {'.'.join(keys)}, found {score!r}")
    return score
