"""Scores of the short-answer benchmarks: the answers of one file against the questions of another, none left out."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm import files
from vlm.benchmarks import BENCHMARKS, Question, read_to_score
from vlm.evaluate import choices, judged, texts, vqa
from vlm.evaluate.judged import Judged

ANSWER_KEYS = ("extraction", "response", "predict", "prediction", "answer", "text")
"""Where a prediction keeps its text, the first that is there: what MathVista extracted, our lines, OCRBench's results,
other tools', the results of the challenges."""
SHOWN = 5


@dataclass(frozen=True)
class Rule:
    judge: Callable[[Question, str], Judged]
    together: Callable[[Sequence[Judged]], dict[str, Any]] = judged.means


RULES = {
    "vqav2": Rule(vqa.judge_vqav2),
    "textvqa": Rule(vqa.judge_textvqa),
    "chartqa": Rule(texts.judge_chartqa),
    "ai2d": Rule(choices.judge_ai2d),
    "realworldqa": Rule(choices.judge_realworldqa),
    "docvqa": Rule(texts.judge_anls),
    "infovqa": Rule(texts.judge_anls),
    "mathvista": Rule(choices.judge_mathvista),
    "ocrbench": Rule(texts.judge_ocrbench),
    "pope": Rule(texts.judge_pope, judged.detection),
}


def score(
    benchmark: str, annotations: Sequence[Path], predictions: Sequence[Path], output: Path, split: str | None = None
) -> None:
    """Score predictions and write measures as fractions with their standard errors, overall and per group.

    Args:
        benchmark: key of RULES; the rules themselves are named there.
        annotations: a copy of the Hub's repository, its parquet files, or the benchmark's own JSON files.
        predictions: generated JSON lines, or the benchmark's own results: a list, JSON lines, or an object by id. Only
            where no entry of theirs has an id are they taken in the order of the questions.
        output: JSON `{"benchmark", "metrics": {..}, "standard_errors": {..}, "num_items", "num_empty", "num_unparsed",
            "per_group": {column: {value: {"metrics", "standard_errors", "num_items"}}}}`. Empty answers are scored as
            such. An unparsed answer is one in which the rules found none; what it counts is the rule's to say.
        split: of the repository (default: the one that is usually published).

    Raises:
        ValueError: a broken file, an id twice, ids on one side only, or an answer that is no text.
    """
    questions = read_to_score(annotations, benchmark, split or BENCHMARKS[benchmark].split)
    told = ", ".join(map(str, predictions))
    answers = read_predictions(predictions, benchmark, questions)
    same_ids(answers, questions, told, ", ".join(map(str, annotations)))
    empty = [name for name, answer in answers.items() if not answer.strip()]
    if empty:
        print(f"{told}: {len(empty)} answers are empty: {some(empty)}", file=sys.stderr)
    rule = RULES[benchmark]
    found: dict[str, Judged] = {}
    for name, question in questions.items():
        try:
            found[name] = rule.judge(question, answers[name])
        except ValueError as error:
            raise ValueError(f"{', '.join(map(str, annotations))}: question {name}: {error}") from None
    files.write_json(
        output,
        {
            "benchmark": benchmark,
            **rule.together(list(found.values())),
            "num_empty": len(empty),
            "num_unparsed": sum(not one.parsed for one in found.values()),
            "per_group": _per_group(questions, found, rule.together),
        },
    )


def _per_group(
    questions: Mapping[str, Question],
    found: Mapping[str, Judged],
    together: Callable[[Sequence[Judged]], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, list[Judged]]] = defaultdict(lambda: defaultdict(list))
    for name, question in questions.items():
        for column, values in question.groups.items():
            for value in dict.fromkeys(values):
                groups[column][value].append(found[name])
    return {column: {value: together(values[value]) for value in sorted(values)} for column, values in groups.items()}


def read_predictions(paths: Sequence[Path], benchmark: str, questions: Mapping[str, Question]) -> dict[str, str]:
    """Answers by the ids of the questions.

    Raises:
        ValueError: a broken file, an id twice, some ids missing, or an answer that is no text.
    """
    keys = ("id", *BENCHMARKS[benchmark].id)
    entries = [(path, number, entry) for path in paths for number, entry in enumerate(_entries(path, keys))]
    if not any(key in entry for _, _, entry in entries for key in keys):
        return _in_order(entries, questions, ", ".join(map(str, paths)))
    answers: dict[str, str] = {}
    for path, number, entry in entries:
        where = f"{path}: entry {number}"
        name = _name(entry, benchmark, path, where)
        if name in answers:
            raise ValueError(f"{path}: {name} is answered more than once")
        answers[name] = _answer(entry, where)
    return answers


def _name(entry: Mapping[str, Any], benchmark: str, path: Path, where: str) -> str:
    """Id of the question that an entry answers: its `id`, or what names a question in the benchmark's own files."""
    table = BENCHMARKS[benchmark]
    part = next((part for part in table.parts if part in path.stem), None)
    columns = ("id",) if "id" in entry or not table.id else table.id
    values = [entry.get(column, part if column in table.groups else None) for column in columns]
    for column, value in zip(columns, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError(f"{where}: expected a whole number or a string under `{column}`, found {value!r}")
    return "_".join(map(str, values))


def _entries(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Entries of a list or of JSON lines, or of one object `{id: answer}` or `{id: {"response": answer, ..}}`."""
    records = files.read_records(path)
    if len(records) != 1 or any(key in records[0] for key in (*keys, *ANSWER_KEYS)):
        return records
    return [
        {"id": name} | ({"answer": value} if not isinstance(value, dict) else _without_id(value))
        for name, value in records[0].items()
    ]


def _without_id(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "id"}


def _in_order(
    entries: Sequence[tuple[Path, int, dict[str, Any]]], questions: Mapping[str, Question], told: str
) -> dict[str, str]:
    """Answers without ids belong to the questions in their order; a text of the question has to be the same."""
    if len(entries) != len(questions):
        raise ValueError(f"{told}: {len(entries)} answers without ids for {len(questions)} questions")
    answers = {}
    for (path, number, entry), question in zip(entries, questions.values(), strict=True):
        asked = entry.get("question")
        if isinstance(asked, str) and question.text and asked.strip() != question.text:
            raise ValueError(
                f"{path}: entry {number} answers {asked!r:.80}, where the question is {question.text!r:.80}"
            )
        answers[question.id] = _answer(entry, f"{path}: entry {number}")
    return answers


def _answer(entry: Mapping[str, Any], where: str) -> str:
    value = next((entry[key] for key in ANSWER_KEYS if key in entry), None)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise ValueError(f"{where}: expected text or a number under one of {', '.join(ANSWER_KEYS)}, found {value!r:.80}")


def same_ids(answers: Mapping[str, Any], questions: Mapping[str, Any], told: str, asked: str) -> None:
    """An incomplete file must not score silently.

    Raises:
        ValueError: ids on one side only.
    """
    if unknown := [name for name in answers if name not in questions]:
        raise ValueError(f"{told}: {len(unknown)} ids are not in {asked}: {some(unknown)}")
    if missing := [name for name in questions if name not in answers]:
        raise ValueError(
            f"{told}: {len(missing)} of the {len(questions)} questions in {asked} have no prediction: {some(missing)}"
        )


def some(names: Sequence[str]) -> str:
    """The first few of many ids."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
