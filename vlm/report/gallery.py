"""A page of held-out pictures and what each model said about them, to see what the scores mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from vlm import coco, files, mmmu
from vlm import config as configuration
from vlm.config import COMBINED, Captions, Mmmu
from vlm.report import page

NUM_QUESTIONS = 28
MARKER = re.compile(r"<image( \d)?>\s*")
"""Place of a picture in a question, as MMMU or as LLaVA writes it."""
WORD = re.compile(r"\w+|\W+")

NOTHING = '<span class="nothing">nothing</span>'

Record = dict[str, Any]
Gold = str | list[str]
"""The accepted answer or answers: a letter where there are options."""
Said = dict[str, dict[Any, Record]]
"""Model -> id of the item -> its line of the generated file."""
Dialogues = dict[coco.ImageId, list[tuple[str, str]]]
"""Picture -> questions and answers, in their order."""


def write(config: Path, sources: Path, generated: Path, out: Path) -> None:
    """Write one HTML file that needs no other: captions and a dialogue beside their pictures, then MMMU's questions.

    Args:
        config: resolved settings; they name the models and the files of the evaluation data.
        sources: folder that holds the folders of the evaluation data, named as their sources are.
        generated: folder with `{model}/{captions,mmmu}.jsonl`, and `dialogue.jsonl` of the last stage.
        out: the page.

    Raises:
        ValueError: a file is missing or broken, or a model did not answer an item, named.
    """
    settings = configuration.load(config)
    labels = {COMBINED: "before training", **{stage: f"after {stage}" for stage in settings.ordered_stages}}
    captions, questions = settings.evaluation.captions, settings.evaluation.mmmu
    dialogues = _read_dialogues(generated / list(labels)[-1] / "dialogue.jsonl")
    body = [
        "<h1>What the model says</h1>\n",
        f"<p>Run {escape(settings.run)}: {escape(_name(settings.models.language))} and "
        f"{escape(_name(settings.models.vision))}, about pictures that training never showed.</p>\n",
        *_captions(
            captions, sources / captions.folder("captions"), _said(generated, "captions", labels), dialogues, labels
        ),
        *_questions(questions, sources / questions.folder("mmmu"), _said(generated, "mmmu", labels), labels),
    ]
    files.write_text(out, page.page(f"{settings.run}: what the model says", "".join(body)))


def _name(model: Any) -> str:
    return str(model.source)


def _said(generated: Path, task: str, labels: Mapping[str, str]) -> Said:
    """Lines of each model by id."""
    said: Said = {}
    for model in labels:
        path = generated / model / f"{task}.jsonl"
        said[model] = {}
        for number, record in enumerate(files.read_records(path), start=1):
            if "id" not in record or not isinstance(record.get("response"), str):
                raise ValueError(f"{path}: line {number} has no `id` and `response`")
            said[model][record["id"]] = record
    return said


def _read_dialogues(path: Path) -> Dialogues:
    dialogues: Dialogues = {}
    for number, record in enumerate(files.read_records(path), start=1):
        try:
            turns = [(turn["from"], turn["value"]) for turn in record["conversation"]]
            said = [text for _, text in turns]
            texts = all(isinstance(text, str) for text in said)
            if not (turns and texts) or [role for role, _ in turns] != ["human", "gpt"] * (len(turns) // 2):
                raise ValueError
            dialogues[record["id"]] = list(zip(said[::2], said[1::2], strict=True))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: line {number} has no `id` and `conversation` of questions and answers") from None
    return dialogues


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spaced, in their order."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _answers(said: Said, item: Any, where: Path) -> dict[str, Record]:
    """What each model said about one item."""
    if silent := [model for model, records in said.items() if item not in records]:
        raise ValueError(f"{where}: the model {silent[0]} has no line with id {item!r}")
    return {model: records[item] for model, records in said.items()}


def _captions(test: Captions, source: Path, said: Said, dialogues: Dialogues, labels: Mapping[str, str]) -> list[str]:
    annotations = source / test.annotations
    references = coco.read_references(annotations)
    pictures = coco.read_pictures(annotations, source / test.images)
    cards = []
    for image, dialogue in dialogues.items():
        if image not in pictures:
            raise ValueError(f"{annotations}: has no picture {image!r}, about which there is a dialogue")
        known = set(_words(" ".join(references[image])))
        answers = _answers(said, image, annotations)
        rows = [
            _row(labels[model], _marked(record["response"], known), last=model == list(labels)[-1])
            for model, record in answers.items()
        ]
        shown = page.picture(pictures[image], str(pictures[image]))
        words = _references(references[image]) + f"<dl>\n{''.join(rows)}</dl>\n" + _dialogue(dialogue)
        cards.append(_card([shown], words))
    return [
        f"<h2>Captions</h2>\n<p>Asked: {escape(test.prompt)} {len(cards)} of {len(pictures)} pictures; words that no "
        "reference has are <mark>underlined</mark>. Then a dialogue with the model "
        f"{escape(list(labels.values())[-1])}, each question asked with all that was said before it.</p>\n",
        f'<div class="cards">\n{"".join(cards)}</div>\n',
    ]


def _references(texts: Sequence[str]) -> str:
    others = "".join(f"<li>{escape(one)}</li>" for one in texts[1:])
    more = f"<details><summary>{len(texts) - 1} more</summary><ul>{others}</ul></details>\n" if others else ""
    return f'<div class="reference"><dl><dt>reference</dt><dd>{escape(texts[0])}</dd></dl>\n{more}</div>\n'


def _dialogue(turns: Sequence[tuple[str, str]]) -> str:
    lines = "".join(
        f"<dt>{escape(MARKER.sub('', question).strip())}</dt><dd>{escape(answer.strip()) or NOTHING}</dd>\n"
        for question, answer in turns
    )
    return f'<dl class="dialogue" aria-label="dialogue">\n{lines}</dl>\n'


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _marked(text: str, known: set[str]) -> str:
    """The text with the words underlined that are not known."""
    if not text.strip():
        return NOTHING
    pieces = WORD.findall(text.strip())
    return "".join(
        f"<mark>{escape(piece)}</mark>" if piece[0].isalnum() and piece.lower() not in known else escape(piece)
        for piece in pieces
    )


def _row(label: str, said: str, *, last: bool) -> str:
    css = ' class="last"' if last else ""
    return f"<dt{css}>{escape(label)}</dt><dd{css}>{said}</dd>\n"


def _card(pictures: Sequence[str], words: str) -> str:
    shown = f'<div class="pictures">{"".join(pictures)}</div>'
    return f'<article class="card">{shown}<div class="words">\n{words}</div></article>\n'


def _questions(test: Mmmu, source: Path, said: Said, labels: Mapping[str, str]) -> list[str]:
    gold = mmmu.read_gold(source, test.split)
    rows = _read_questions(test, source)
    cards = []
    for row in rows:
        if row["id"] not in gold:
            raise ValueError(f"{source / mmmu.ANSWERS}: has no answer to {row['id']}")
        answers = _answers(said, row["id"], source)
        cards.append(_question(row, gold[row["id"]]["ground_truth"], answers, labels))
    return [
        f"<h2>Questions</h2>\n<p>{len(cards)} of {len(gold)}, right and wrong by the rules of MMMU; "
        "an answer from which no letter can be read is wrong here.</p>\n",
        f'<div class="cards">\n{"".join(cards)}</div>\n',
    ]


def _read_questions(test: Mmmu, source: Path) -> list[Record]:
    from pyarrow import parquet

    paths = sorted(source.glob(f"*/{test.split}-*.parquet"))
    if not paths:
        raise ValueError(f"{source}: holds no <Subject>/{test.split}-*.parquet (evaluation.mmmu.split)")
    places = [(path, row) for path in paths for row in range(parquet.read_metadata(path).num_rows)]
    chosen = _spread(places, NUM_QUESTIONS)
    rows = []
    for path in sorted({path for path, _ in chosen}):  # one table in memory at a time
        rows += parquet.read_table(path).take([row for where, row in chosen if where == path]).to_pylist()
    return rows


def _question(row: Record, gold: Gold, answers: Mapping[str, Record], labels: Mapping[str, str]) -> str:
    names = [f"image_{number}" for number in range(1, mmmu.MAX_IMAGES + 1)]
    shown = [page.picture(row[name]["bytes"], f"{row['id']} {name}") for name in names if row.get(name)]
    asked = f'<div class="asked">{escape(MARKER.sub("", row["question"]).strip())}</div>\n'
    listed = mmmu.parse_options(row["options"], row["id"]) if row["question_type"] == mmmu.MULTIPLE_CHOICE else []
    options = dict(zip(ascii_uppercase, listed, strict=False))
    if options:
        right = {letter for letter in options if mmmu.choice_is_correct(gold, letter)}
        lines = "".join(
            f"<li{' class=answer' if letter in right else ''}>({letter}) {escape(option)}</li>"
            for letter, option in options.items()
        )
        asked += f'<ul class="options">{lines}</ul>\n'
    else:
        accepted = " or ".join(gold) if isinstance(gold, list) else str(gold)
        asked += f'<ul class="options"><li class="answer">{escape(accepted)}</li></ul>\n'
    said = "".join(
        _row(labels[model], _verdict(record["response"], gold, options), last=model == list(labels)[-1])
        for model, record in answers.items()
    )
    return _card(shown, f'{asked}<dl class="said">\n{said}</dl>\n')


def _verdict(response: str, gold: Gold, options: Mapping[str, str]) -> str:
    if options:
        letter = mmmu.parse_choice(response, list(options), options)
        right = mmmu.choice_is_correct(gold, letter)
    else:
        right = mmmu.open_is_correct(gold, mmmu.parse_open(response))
    said = escape(response.strip()) or NOTHING
    return f'<span class="verdict {"right" if right else "wrong"}">{"right" if right else "wrong"}</span>{said}'
