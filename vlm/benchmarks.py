"""The short-answer benchmarks: what is in their Hub repositories and where, for the commands that ask and that score.

The standard library alone at import, since the command line takes the names from here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm import files, tables


@dataclass(frozen=True)
class Benchmark:
    """One benchmark's table. Columns are those of its Hub repository; `metadata.task` is a field inside a column."""

    title: str
    split: str
    """The split that scores are published on and whose answers are public."""
    id: tuple[str, ...] = ()
    """Columns that name a question together; where there is none, its number in the sorted files does, from 0."""
    answers: str = "answer"
    options: str | None = None
    image: str = "image"
    question: str = "question"
    groups: tuple[str, ...] = ()
    """Columns with a score for each of their values; where a column holds lists, a question is in several groups."""
    details: tuple[str, ...] = ()
    """Columns that the rules of scoring or the prompt need besides."""
    folder: str = "data"
    """Of the files `<split>-*.parquet` in the repository."""
    official: Mapping[str, str] = field(default_factory=dict)
    """Names that the benchmark's own JSON files have for columns."""
    parts: tuple[str, ...] = ()
    """Values of the first of `groups`, which the names of the benchmark's own JSON files carry instead of a column."""

    @property
    def to_score(self) -> tuple[str, ...]:
        """Columns that scoring reads."""
        return (*self.id, self.answers, *((self.options,) if self.options else ()), *self.groups, *self.details)


BENCHMARKS = {
    "vqav2": Benchmark(
        "VQAv2", "validation", id=("question_id",), answers="answers", groups=("answer_type", "question_type")
    ),
    "textvqa": Benchmark("TextVQA", "validation", id=("question_id",), answers="answers"),
    "chartqa": Benchmark(
        "ChartQA",
        "test",
        groups=("type",),
        official={"query": "question", "label": "answer"},
        parts=("human", "augmented"),
    ),
    "ai2d": Benchmark("AI2D", "test", options="options"),
    "realworldqa": Benchmark("RealWorldQA", "test", details=("question",)),
    "docvqa": Benchmark(
        "DocVQA", "validation", id=("questionId",), answers="answers", groups=("question_types",), folder="DocVQA"
    ),
    "infovqa": Benchmark(
        "InfographicVQA",
        "validation",
        id=("questionId",),
        answers="answers",
        groups=("answer_type",),
        folder="InfographicVQA",
    ),
    "mathvista": Benchmark(
        "MathVista",
        "testmini",
        id=("pid",),
        options="choices",
        image="decoded_image",
        groups=("question_type", "answer_type", "metadata.task", "metadata.category", "metadata.skills"),
        details=("answer_type", "precision", "query"),
    ),
    "ocrbench": Benchmark(
        "OCRBench",
        "test",
        groups=("question_type",),
        details=("dataset",),
        official={"answers": "answer", "type": "question_type", "dataset_name": "dataset"},
    ),
    "pope": Benchmark(
        "POPE",
        "test",
        id=("category", "question_id"),
        groups=("category",),
        official={"text": "question", "label": "answer"},
        parts=("random", "popular", "adversarial"),
    ),
}


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    """Empty where the benchmark's own annotations keep questions in another file."""
    answers: tuple[str, ...]
    """Accepted ones. Empty where a split's answers are not public."""
    options: tuple[str, ...] = ()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Column of `Benchmark.groups` without what is before its dot -> values."""
    details: Mapping[str, Any] = field(default_factory=dict)


def find(source: Path, name: str, split: str) -> list[Path]:
    """Parquet files of a split in a copy of the Hub's repository, in their order; a parquet file is its own.

    Raises:
        ValueError: there is none, or not all of a table's files.
    """
    if source.is_file():
        return [source]
    folder = BENCHMARKS[name].folder
    found = tables.find(source / folder, f"{split}-*.parquet")
    if not found:
        raise ValueError(f"{source}: holds no {folder}/{split}-*.parquet (evaluation.{name}.split)")
    return found


def read_to_ask(source: Path, name: str, split: str) -> list[tuple[Question, tables.Picture]]:
    """Every question of a split and where its picture is.

    Raises:
        ValueError: no files, another schema, or a question twice.
    """
    benchmark = BENCHMARKS[name]
    columns = dict.fromkeys((*benchmark.to_score, benchmark.question))
    found: list[tuple[Question, tables.Picture]] = []
    for path in find(source, name, split):
        rows = _read_columns(path, benchmark, list(columns), need=(benchmark.image,))
        for (row_group, row), content in zip(tables.places(path), rows, strict=True):
            question = question_of(name, content, len(found), f"{path}: row {row} of row group {row_group}")
            found.append((question, tables.Picture(path, row_group, row, benchmark.image)))
    refuse_twins([question.id for question, _ in found], str(source))
    return found


def read_to_score(sources: Sequence[Path], name: str, split: str) -> dict[str, Question]:
    """Every question by its id, without the pictures.

    Args:
        sources: a copy of the Hub's repository, parquet files, or the benchmark's own JSON or JSON-lines files.
        name: key of BENCHMARKS.
        split: which files to read of a repository.

    Raises:
        ValueError: a missing or broken file, another schema, a question twice or without an answer.
    """
    benchmark = BENCHMARKS[name]
    found: list[Question] = []
    for source in sources:
        if source.is_dir() or source.suffix == ".parquet":
            paths = find(source, name, split)
            rows = [(row, path) for path in paths for row in _read_columns(path, benchmark, list(benchmark.to_score))]
        else:
            rows = [(row, source) for row in _read_official(source, benchmark)]
        for row, path in rows:
            found.append(question_of(name, row, len(found), f"{path}: question {len(found)}"))
    where = ", ".join(map(str, sources))
    if not found:
        raise ValueError(f"{where}: holds no question")
    refuse_twins([question.id for question in found], where)
    if bare := [question.id for question in found if not any(answer.strip() for answer in question.answers)]:
        raise ValueError(f"{where}: {len(bare)} questions have no answer, first {bare[0]}; is the split a public one?")
    return {question.id: question for question in found}


def refuse_twins(names: Sequence[str], where: str) -> None:
    """Check that every id is there once, since answers are told apart by it.

    Raises:
        ValueError: one is there more than once.
    """
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{where}: {len(twice)} ids occur more than once, first {twice[0]}")


def _read_columns(
    path: Path, benchmark: Benchmark, columns: Sequence[str], need: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Rows of the columns that hold `columns`; those in `need` have to be there and are not read."""
    wanted = list(dict.fromkeys(column.partition(".")[0] for column in columns))
    there = tables.column_names(path)
    if missing := [name for name in (*wanted, *need) if name not in there]:
        raise ValueError(f"{path}: columns {', '.join(missing)} are missing, is it {benchmark.title}'s?")
    return tables.read_rows(path, wanted)


def _read_official(path: Path, benchmark: Benchmark) -> Iterator[dict[str, Any]]:
    """Rows of a benchmark's own file under the Hub's names: a list, JSON lines, an object that holds the list, or an
    object of rows by id."""
    records = files.read_records(path)
    if len(records) == 1 and (
        inner := [key for key in ("annotations", "data") if isinstance(records[0].get(key), list)]
    ):
        records = records[0][inner[0]]
    elif len(records) == 1 and records[0] and all(isinstance(row, dict) for row in records[0].values()):
        key = benchmark.id[-1] if benchmark.id else "id"
        records = [{key: name} | row for name, row in records[0].items()]
    part = next((part for part in benchmark.parts if part in path.stem), None)
    needed = (*benchmark.id, benchmark.answers, *((benchmark.options,) if benchmark.options else ()))
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: entry {number} is {type(record).__name__}, expected an object")
        row = {benchmark.official.get(key, key): value for key, value in record.items()}
        if part and benchmark.groups[0] not in row:
            row[benchmark.groups[0]] = part
        if missing := [name for name in (*needed, *benchmark.details) if name not in row]:
            names = {new: old for old, new in benchmark.official.items()}
            listed = ", ".join(f"{name} (or {names[name]})" if name in names else name for name in missing)
            raise ValueError(f"{path}: entry {number} has no {listed}, is it {benchmark.title}'s?")
        yield row


def question_of(name: str, row: Mapping[str, Any], number: int, where: str) -> Question:
    """One row as a question.

    Args:
        name: key of BENCHMARKS.
        row: values by the Hub's names of columns.
        number: of the row among all.
        where: names the row in messages.

    Raises:
        ValueError: a value of another type.
    """
    benchmark = BENCHMARKS[name]
    own = [_text(row.get(column), f"{where}, {column}") for column in benchmark.id]
    options = row.get(benchmark.options) if benchmark.options else None
    return Question(
        id="_".join(own) if own else str(row.get("id", number)),
        text=str(row.get(benchmark.question) or "").strip(),
        answers=tuple(_texts(row.get(benchmark.answers), f"{where}, {benchmark.answers}")),
        options=tuple(_texts(options, f"{where}, {benchmark.options}")),
        groups={column.rpartition(".")[2]: _values(row, column) for column in benchmark.groups},
        details={column: row.get(column) for column in benchmark.details},
    )


def _values(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """Groups of a row: none where the field is empty. ChartQA's `human_test` is the group `human`."""
    outer, _, inner = column.partition(".")
    value = row.get(outer)
    if inner:
        value = value.get(inner) if isinstance(value, Mapping) else None
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(re.sub("_test$", "", str(one)) for one in values if one is not None)


def _texts(value: Any, where: str) -> list[str]:
    """VQAv2 keeps each answer in an object of its own; a single answer stands for a list of one."""
    if value is None:
        return []
    listed = value if isinstance(value, list | tuple) else [value]
    return [_text(one.get("answer") if isinstance(one, Mapping) else one, where) for one in listed]


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise ValueError(f"{where}: expected text or a number, found {value!r:.80}")
