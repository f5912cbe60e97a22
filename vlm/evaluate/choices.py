"""Questions with options: which one a response chooses, for AI2D, RealWorldQA and MathVista."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from string import ascii_uppercase

from vlm.benchmarks import Question
from vlm.evaluate.judged import Judged, right
from vlm.evaluate.texts import edits

LISTED = re.compile(r"^\s*([A-Z])[.):]\s+(.+?)\s*$", re.MULTILINE)
"""An option on a line of its own inside a question, as RealWorldQA writes them."""
LEADING = re.compile(r"\W*([A-Z])\s*[).:](?:\s|$)")
"""A response that begins with an option: `(B) blue`, `B. blue`, `B: blue`."""
BRACKETED = re.compile(r"\(([A-Z])\)")
ANNOUNCED = re.compile(r"\b(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*[(\"'*]*([A-Z])\b(?!')")
"""`The answer is B`, `Answer: (B)`, `option B`."""
SAID = re.compile(r"\b(?:answer|result)\s*(?:is|:|=)\s*(.+)|.*=\s*(.+)", re.IGNORECASE)
"""What follows `the answer is`, or the last equals sign of a line."""
DIGITS = re.compile(r"(?<![\w.])-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+)")
"""A number with its sign; the dash of `2007-2008` is none."""
BRACES = re.compile(r"\[[^\[\]]*\]")


def choose(response: str, options: Sequence[str]) -> int | None:
    """Place of the option that a response names, or None where these rules, taken in order, find none.

    The letter alone, the letter at the beginning with a mark after it, the last letter after words such as "answer is",
    a single letter in brackets, the text of exactly one option (capitals and a final stop aside). A letter that is also
    the text of an option, as AI2D's labels can be, is read as the letter that was asked for.
    """
    letters = ascii_uppercase[: len(options)]
    alone = response.strip(" \t\r\n.,:;!?()[]\"'*`")
    if len(alone) == 1 and alone.upper() in letters:
        return letters.index(alone.upper())
    found = []
    if leading := LEADING.match(response):
        found.append(leading.group(1))
    elif announced := ANNOUNCED.findall(response):
        found.append(announced[-1])
    elif len(bracketed := set(BRACKETED.findall(response))) == 1:
        found += bracketed
    if found and found[0] in letters:
        return letters.index(found[0])
    said = _plain(response)
    same = [place for place, option in enumerate(options) if _plain(option) == said]
    return same[0] if said and len(same) == 1 else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".").strip()


def judge_ai2d(question: Question, answer: str) -> Judged:
    """Accuracy; the Hub's table holds the place of the right option, from 0."""
    gold = question.answers[0].strip()
    if not gold.isdecimal() or int(gold) >= len(question.options):
        raise ValueError(f"the answer is not the place of one of the {len(question.options)} options: {gold!r}")
    chosen = choose(answer, question.options)
    return right(chosen == int(gold), parsed=chosen is not None)


def judge_realworldqa(question: Question, answer: str) -> Judged:
    """Accuracy: by option where the question lists some and the answer is a letter, else the same word or number.

    Words are compared without capitals, blanks around them and a final stop.
    """
    listed = dict(LISTED.findall(str(question.details["question"] or "")))
    gold = question.answers[0].strip()
    if len(gold) == 1 and gold in listed and "".join(listed) == ascii_uppercase[: len(listed)]:
        chosen = choose(answer, list(listed.values()))
        return right(chosen == ascii_uppercase.index(gold), parsed=chosen is not None)
    return right(_plain(answer) == _plain(gold))


def judge_mathvista(question: Question, answer: str) -> Judged:
    """Accuracy on MathVista (Lu et al. 2024), by rules alone.

    Published scores let a language model extract the answer from the response; here rules do, so a response that
    reasons at length may be read otherwise. What is extracted is compared as in `calculate_score.py`: an option as it
    stands, an integer cut to its whole part, a float rounded to the question's precision, lists number by number.
    """
    gold = question.answers[0].strip()
    kind = question.details["answer_type"]
    if question.options:
        chosen = choose(answer, question.options)
        parsed = chosen is not None
        if chosen is None:  # the official last resort: the option with the fewest edits
            distances = [edits(answer.strip(), option) for option in question.options]
            chosen = distances.index(min(distances))
        return right(question.options[chosen].strip() == gold, parsed=parsed)
    if kind == "list":
        numbers = _list(answer)
        return right(numbers == _list(gold), parsed=bool(numbers))
    if kind in ("integer", "float"):
        value = number_in(answer)
        if value is None:
            return right(False, parsed=False)
        if kind == "integer":
            return right(int(value) == int(float(gold)))
        places = int(question.details["precision"] or 0)
        return right(round(value, places) == round(float(gold), places))
    return right(_plain(answer) == _plain(gold))


def number_in(response: str) -> float | None:
    """The first number after the last "answer is" or equals sign; where neither has one, the last of the response.

    Thousands may have commas.
    """
    tails = [one or other for one, other in SAID.findall(response)]
    found = [numbers[0] for tail in reversed(tails) if (numbers := DIGITS.findall(tail))]
    found += DIGITS.findall(response)[-1:]
    value = float(found[0].replace(",", "")) if found else math.inf
    return value if math.isfinite(value) else None


def _list(text: str) -> list[float]:
    """Numbers of the last list in square brackets that Python can read, else all numbers of the text."""
    for written in reversed(BRACES.findall(text)):
        try:
            return [float(one) for one in ast.literal_eval(written)]
        except (ValueError, SyntaxError, TypeError):
            continue
    return [float(number.replace(",", "")) for number in DIGITS.findall(text)]
