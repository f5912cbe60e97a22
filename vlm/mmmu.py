"""MMMU's questions as they are written, and what an answer to one says by the rules of MMMU's own evaluation.

Published scores depend on these rules (`mmmu/utils/eval_utils.py`, and `mmmu-pro/evaluate.py` for MMMU-Pro) to the
letter, so their oddities are kept, each with a comment.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm import files, tables

MAX_IMAGES = 7
"""Columns image_1 to image_7 of a question."""
MULTIPLE_CHOICE = "multiple-choice"
ANSWERS = "answer_dict_val.json"
"""MMMU's file of the answers, in its GitHub repository and not on the Hub."""

PUNCTUATION = ",.!?;:'"
KEY_PHRASES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL = frozenset([":", ",", ".", "!", "?", ";", "'"])
SHORT_RESPONSE_WORDS = 5
"""Up to this many words, the text of an option inside a response is taken for chance."""

NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234,567
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.5e-3
    re.compile(r"-?(?:\d*\.\d+|\d+\b)(?![eE][+-]?\d)(?![,\d])"),  # 12, .5, -0.25
)

Normalised = str | float


def parse_options(value: Any, where: str) -> list[str]:
    """Options of a question. MMMU writes them as the text of a Python list; a real list is accepted as well.

    Args:
        value: the column `options`.
        where: names the question in messages.

    Raises:
        ValueError: it is no list.
    """
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"{where}: options are not a list: {value!r:.80}") from None
    if not isinstance(value, list | tuple | None):
        raise ValueError(f"{where}: options are not a list: {value!r:.80}")
    return [str(option) for option in value or ()]


def read_gold(path: Path, split: str = "validation") -> dict[str, dict[str, Any]]:
    """Type and answer of each question, by id, in the form of MMMU's own file.

    Args:
        path: that file; or a folder that holds it; or a copy of the Hub's repository, a folder of one setting of
            MMMU-Pro's, or a parquet file, whose columns hold the answers; or JSON lines or a list with `id` and
            `answer`, such as MMMU-Pro's result files.
        split: which parquet files of a folder to read.

    Returns:
        `{id: {"question_type": .., "ground_truth": ..}}`; MMMU-Pro's questions are all multiple-choice.

    Raises:
        ValueError: none of these, columns missing, or an id twice.
    """
    if path.is_dir() and (path / ANSWERS).is_file():
        path = path / ANSWERS
    if path.is_dir() or path.suffix == ".parquet":
        rows = _parquet_rows(path, split)
    else:
        content = files.read_records(path)
        if len(content) == 1 and "id" not in content[0]:
            return content[0]
        rows = [(path, row) for row in content]
    gold: dict[str, dict[str, Any]] = {}
    for where, row in rows:
        name = row.get("id")
        if not isinstance(name, str) or row.get("answer") is None:
            raise ValueError(f"{where}: expected an id and an answer, found {name!r} and {row.get('answer')!r}")
        if name in gold:
            raise ValueError(f"{where}: {name} is there more than once; of MMMU-Pro, name the folder of one setting")
        kind = row.get("question_type") or MULTIPLE_CHOICE
        gold[name] = {"question_type": kind, "ground_truth": row["answer"]}
        if kind != MULTIPLE_CHOICE and isinstance(row["answer"], str) and row["answer"].startswith("["):
            gold[name]["ground_truth"] = parse_options(row["answer"], f"{where}: {name}")  # several are accepted
    return gold


def _parquet_rows(path: Path, split: str) -> list[tuple[Path, dict[str, Any]]]:
    paths = [path]
    if path.is_dir():
        paths = tables.find(path, f"*/{split}-*.parquet") or tables.find(path, "*.parquet")
        if not paths:
            raise ValueError(f"{path}: holds neither {ANSWERS} nor <Subject>/{split}-*.parquet")
    rows = []
    for one in paths:
        there = tables.column_names(one)
        if missing := [name for name in ("id", "answer") if name not in there]:
            raise ValueError(f"{one}: columns {', '.join(missing)} are missing, is it MMMU's?")
        wanted = [name for name in ("id", "answer", "question_type") if name in there]
        rows += [(one, row) for row in tables.read_rows(one, wanted)]
    return rows


def parse_choice(response: str, choices: Sequence[str], options: Mapping[str, str]) -> str | None:
    """The letter a response chooses, or None where the official code draws one at random.

    A bracketed letter counts first, then a letter standing alone, then (in responses of more than five words) the
    text of an option; among several, the one that occurs last in the response.

    Args:
        response: text of the model.
        choices: the letters, in order.
        options: text of each letter's option.
    """
    for mark in PUNCTUATION:  # one mark after the other, so "A.," loses both and "A,." only its stop
        response = response.strip(mark)
    response = f" {response} "
    lower = response.lower()
    bracketed = {letter: response.rfind(f"({letter})") for letter in choices}
    alone = {letter: response.rfind(f" {letter} ") for letter in choices}
    worded = {letter: lower.rfind(text.lower()) for letter, text in options.items()}
    if len(response.split()) <= SHORT_RESPONSE_WORDS:
        worded = {}
    for last_positions in (bracketed, alone, worded):
        found = [letter for letter, position in last_positions.items() if position >= 0]
        if found:
            return max(found, key=last_positions.__getitem__)  # the first of equals
    return None


def parse_choice_pro(response: str, choices: Sequence[str], options: Mapping[str, str]) -> str | None:
    """The letter a response chooses by the rules of MMMU-Pro, or None where its code draws one at random.

    What follows the last "Answer:" counts first, if it holds exactly one of the letters. Then as in `parse_choice`, but
    any letter before a blank counts as standing alone, and one before a full stop after those.

    Args:
        response: text of the model.
        choices: the letters, in order, up to ten.
        options: text of each letter's option.
    """
    _, announced, answer = response.rpartition("Answer:")
    if announced:
        inside = [letter for letter in choices if letter in answer.strip()]  # also inside a word
        if len(inside) == 1:
            return inside[0]
    for mark in PUNCTUATION:
        response = response.strip(mark)
    response = f" {response} "
    for pattern, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        # Several are told apart by their last place with a blank before it, which one found without may not have.
        last = {one: response.rfind(place.format(one)) for one in choices if pattern.format(one) in response}
        if last:
            return max(last, key=last.__getitem__)  # the first of equals
    if len(response.split()) <= SHORT_RESPONSE_WORDS:
        return None
    lower = response.lower()
    worded = {letter: lower.rfind(text.lower()) for letter, text in options.items() if text.lower() in lower}
    return max(worded, key=worded.__getitem__, default=None)


def parse_open(response: str) -> list[Normalised]:
    """What an open response may be claiming: its key phrases and every number in them, normalised."""
    claims = _key_phrases(response)
    numbers = [number for claim in claims for pattern in NUMBERS for number in pattern.findall(claim)]
    return [form for text in (*claims, *numbers) for form in normalise(text)]


def _key_phrases(response: str) -> list[str]:
    """Per line, the shortest tail after a phrase such as "is " or "answer "; the whole response where no line has one.

    The official code means to split at sentence ends too, by a full stop before a capital letter, but lower-cases the
    response first, so only line ends split.
    """
    response = response.strip().strip(".").lower()
    lines = response.split("\n")
    phrases = []
    for number, line in enumerate(lines, start=1):
        marks = (*KEY_PHRASES, "=") if number == len(lines) else KEY_PHRASES  # the last line may be an equation
        tails = [line.rsplit(mark, 1)[-1].strip() for mark in marks if mark in line]
        # An empty tail never stays the shortest: the official code takes "" for "none yet" and looks on.
        shortest = ""
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in TRIVIAL:
            phrases.append(shortest)
    return phrases or [response]


def normalise(text: str) -> list[Normalised]:
    """A number rounded to two decimals; else lower-case text, one character only with a space on either side.

    The space keeps a single letter from matching inside every word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def choice_is_correct(gold: str | list[str], choice: str | None) -> bool:
    """Whether a letter is the answer, or one of several accepted."""
    return choice in (gold if isinstance(gold, list) else [gold])


def open_is_correct(gold: str | list[str], claims: Sequence[Normalised]) -> bool:
    """Whether any claim contains an accepted text or equals an accepted number.

    Args:
        gold: accepted answer or answers.
        claims: result of `parse_open`.
    """
    accepted = [form for answer in (gold if isinstance(gold, list) else [gold]) for form in normalise(answer)]
    texts = [form for form in accepted if isinstance(form, str)]
    return any(
        any(text in claim for text in texts) if isinstance(claim, str) else claim in accepted for claim in claims
    )
