"""The items of each evaluation task: what is asked about which pictures, and what is written of the answer."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from vlm import benchmarks, coco, tables
from vlm.config import Benchmark, Captions, Config, Dialogue, Mmmu
from vlm.mmmu import MAX_IMAGES, MULTIPLE_CHOICE, parse_options
from vlm.prompt import IMAGE_TAG

MARKER = re.compile(r"<image (\d)>")
"""Place of a picture in an MMMU question or option."""


@dataclass(frozen=True)
class Item:
    id: int | str
    prompt: str
    """The user's turn, with one `<image>` per picture."""
    image: str | list[str]
    """Name of the picture, or of each."""
    pictures: tuple[bytes | Path | tables.Picture, ...]
    record: dict[str, Any] = field(default_factory=dict)
    """What else is written beside the response, so that the file can be scored."""
    follow_ups: tuple[str, ...] = ()
    """User turns after the first, each asked when the one before it is answered. As many for all items of a task."""
    part: int = 0
    """Which part of the data its pictures are in; items are asked part by part, so that each part is read once."""

    def opened(self) -> list[bytes | Path]:
        """The pictures as something to decode; those inside tables are read now.

        Raises:
            ValueError: a table holds no picture where one should be.
        """
        return [one.read() if isinstance(one, tables.Picture) else one for one in self.pictures]


Turn = dict[str, str]
"""`{"from": "human" | "gpt", "value": text}`, as LLaVA writes it."""


def _response(conversation: Sequence[Turn]) -> dict[str, Any]:
    return {"prompt": conversation[0]["value"], "response": conversation[-1]["value"]}


def _conversation(conversation: Sequence[Turn]) -> dict[str, Any]:
    return {"conversation": list(conversation)}


@dataclass(frozen=True)
class Task:
    read: Callable[[Config, Path], list[Item]]
    settings: Callable[[Config], Captions | Dialogue | Mmmu | Benchmark]
    said: Callable[[Sequence[Turn]], dict[str, Any]] = _response
    """What a line holds of the questions and answers."""


def read_captions(config: Config, source: Path) -> list[Item]:
    """One item per picture of the COCO captions file.

    Args:
        config: `evaluation.captions` names the files below `source`.

    Raises:
        ValueError: the file or a picture is missing.
    """
    pictures = _pictures(config, source)
    return _captions(config, list(pictures), list(pictures.values()))


def read_captions_shuffled(config: Config, source: Path) -> list[Item]:
    """The same items, each shown another's picture: one cycle through all of them, drawn by seed (Sattolo's algorithm).

    Raises:
        ValueError: as `read_captions`, or fewer than two pictures.
    """
    pictures = _pictures(config, source)
    if len(pictures) < 2:
        raise ValueError(f"{source / config.evaluation.captions.annotations}: one picture cannot be shuffled")
    shown = list(pictures.values())
    rng = random.Random(config.seed)
    for last in range(len(shown) - 1, 0, -1):
        other = rng.randrange(last)  # never `last` itself, so that no picture stays
        shown[last], shown[other] = shown[other], shown[last]
    return _captions(config, list(pictures), shown)


def read_dialogue(config: Config, source: Path) -> list[Item]:
    """The first pictures of the captions, with several questions about each.

    Raises:
        ValueError: as `read_captions`.
    """
    test = config.evaluation.dialogue
    first, *follow_ups = test.questions
    prompt = f"{IMAGE_TAG}\n{first}"
    return [
        Item(image, prompt, path.name, (path,), follow_ups=tuple(follow_ups))
        for image, path in list(_pictures(config, source).items())[: test.num_images]
    ]


def _pictures(config: Config, source: Path) -> dict[coco.ImageId, Path]:
    test = config.evaluation.captions
    pictures = coco.read_pictures(source / test.annotations, source / test.images)
    if lost := [path for path in pictures.values() if not path.is_file()]:
        raise ValueError(
            f"{source / test.images}: {len(lost)} of {len(pictures)} pictures are missing, first {lost[0]}"
        )
    return pictures


def _captions(config: Config, images: Sequence[coco.ImageId], shown: Sequence[Path]) -> list[Item]:
    prompt = f"{IMAGE_TAG}\n{config.evaluation.captions.prompt}"
    return [
        Item(image, prompt, path.name, (path,), {"image_id": image}) for image, path in zip(images, shown, strict=True)
    ]


def read_mmmu(config: Config, source: Path) -> list[Item]:
    """Every question of the parquet files `<Subject>/<split>-*.parquet` below `source`.

    Raises:
        ValueError: no file or not all, another schema, an id twice, or a question that its pictures do not fit.
    """
    test = config.evaluation.mmmu
    paths = tables.find(source, f"*/{test.split}-*.parquet")
    if not paths:
        raise ValueError(f"{source}: holds no <Subject>/{test.split}-*.parquet (evaluation.mmmu.split)")
    images = [f"image_{number}" for number in range(1, MAX_IMAGES + 1)]
    items = []
    for path in paths:
        there = tables.column_names(path)
        if missing := {"id", "question", "options", "question_type", "image_1"} - set(there):
            raise ValueError(f"{path}: columns {', '.join(sorted(missing))} are missing, is it MMMU's?")
        wanted = {"id", "question", "options", "question_type", "answer", *images}
        rows = tables.read_rows(path, [name for name in there if name in wanted])
        items += [_question(row, test, path) for row in rows]
    benchmarks.refuse_twins([str(item.id) for item in items], str(source))
    return items


def _question(row: Mapping[str, Any], test: Mmmu, path: Path) -> Item:
    """One row of MMMU as a prompt; a marker such as `<image 2>` gives its place to that picture.

    A picture that no marker places comes first, as in training; one that is placed twice is shown twice.
    """
    where = f"{path}: {row['id']}"
    options = parse_options(row["options"], where)
    choice = row["question_type"] == MULTIPLE_CHOICE
    if choice and not 2 <= len(options) <= len(ascii_uppercase):
        raise ValueError(f"{where}: a multiple-choice question with {len(options)} options")
    letters = list(ascii_uppercase[: len(options)]) if choice else []
    listed = _listed(options if choice else [], "({}) {}")
    key = "prompt_multiple_choice" if choice else "prompt_open"
    text = _fill(getattr(test, key), f"evaluation.mmmu.{key}", question=row["question"].strip(), options=listed)
    there = [n for n in range(1, MAX_IMAGES + 1) if (row.get(f"image_{n}") or {}).get("bytes")]
    placed = [int(number) for number in MARKER.findall(text)]
    if lost := sorted(set(placed) - set(there)):
        raise ValueError(f"{where}: <image {lost[0]}> stands in the text, but image_{lost[0]} is empty")
    unplaced = [number for number in there if number not in placed]
    prompt = f"{IMAGE_TAG}\n" * len(unplaced) + MARKER.sub(IMAGE_TAG, text)
    shown = [*unplaced, *placed]
    record: dict[str, Any] = {"question_type": row["question_type"]}
    if choice:
        record |= {"all_choices": letters, "index2ans": dict(zip(letters, options, strict=True))}
    if row.get("answer") is not None:
        record["answer"] = row["answer"]
    names = [row[f"image_{number}"].get("path") or f"image_{number}" for number in shown]
    return Item(row["id"], prompt, names, tuple(row[f"image_{number}"]["bytes"] for number in shown), record)


def _listed(options: Sequence[str], line: str) -> str:
    return "\n".join(line.format(letter, option) for letter, option in zip(ascii_uppercase, options, strict=False))


def _fill(template: str, key: str, **texts: str) -> str:
    try:
        return template.format(**texts)
    except (KeyError, IndexError, ValueError) as error:
        *others, last = (f"{{{name}}}" for name in texts)
        raise ValueError(f"{key}: cannot be filled ({error}), allowed are {', '.join(others)} and {last}") from None


def read_benchmark(name: str, config: Config, source: Path) -> list[Item]:
    """Every question of a short-answer benchmark; the pictures stay in the files until they are shown.

    Args:
        name: key of `vlm.benchmarks.BENCHMARKS`, and of the section under `evaluation`.
        source: a copy of the Hub's repository.

    Raises:
        ValueError: no file, another schema, an id twice, more options than letters, or a broken template.
    """
    test = benchmark_settings(name, config)
    found = benchmarks.read_to_ask(source, name, test.split)
    parts = {place: part for part, place in enumerate(dict.fromkeys((p.path, p.row_group) for _, p in found))}
    items = []
    for question, picture in found:
        if len(question.options) > len(ascii_uppercase):
            raise ValueError(f"{picture.path}: question {question.id} has {len(question.options)} options")
        multiple = bool(question.options) and test.prompt_multiple_choice is not None
        key = "prompt_multiple_choice" if multiple else "prompt"
        texts = {"question": question.text, "options": _listed(question.options, "{}. {}")}
        if "query" in question.details:
            texts["query"] = str(question.details["query"] or "").removeprefix("Hint: ")
        prompt = f"{IMAGE_TAG}\n{_fill(getattr(test, key), f'evaluation.{name}.{key}', **texts)}"
        where = f"{picture.path.name}:{picture.row_group}:{picture.row}"
        part = parts[picture.path, picture.row_group]
        items.append(Item(question.id, prompt, where, (picture,), part=part))
    return items


def benchmark_settings(name: str, config: Config) -> Benchmark:
    """The section of a benchmark.

    Raises:
        ValueError: the configuration has none.
    """
    if name not in config.evaluation.benchmarks:
        raise ValueError(f"evaluation.{name}: is not set, so there is nothing to ask; config/benchmarks.yaml has it")
    return config.evaluation.benchmarks[name]


TASKS = {
    "captions": Task(read_captions, lambda config: config.evaluation.captions),
    "captions_shuffled": Task(read_captions_shuffled, lambda config: config.evaluation.captions),
    "dialogue": Task(read_dialogue, lambda config: config.evaluation.dialogue, _conversation),
    "mmmu": Task(read_mmmu, lambda config: config.evaluation.mmmu),
} | {
    name: Task(functools.partial(read_benchmark, name), functools.partial(benchmark_settings, name))
    for name in benchmarks.BENCHMARKS
}
