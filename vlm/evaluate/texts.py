"""Answers read from charts and documents: relaxed accuracy, ANLS, and OCRBench's search for a text."""

from __future__ import annotations

import re
from decimal import Decimal

from vlm.benchmarks import Question
from vlm.evaluate.judged import Judged, right

TOLERANCE = Decimal("0.05")
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")
"""A decimal number as Python reads one, without its `inf`, `nan` and underscores."""
ANLS_THRESHOLD = 0.5
FORMULAS = "HME100k"
"""OCRBench's data set of written formulas, which are compared with their capitals and without blanks."""


def judge_chartqa(question: Question, answer: str) -> Judged:
    return Judged({"relaxed_accuracy": float(relaxed_match(answer, question.answers[0]))})


def relaxed_match(answer: str, gold: str) -> bool:
    """Whether a number is within 5 % of a number, or a text the same but for capitals (Masry et al. 2022, section 5.1).

    |answer - gold| <= 0.05 |gold|, in decimal arithmetic, so that the edges of the interval and negative numbers count
    right; only 0 is near 0. A percent sign on both sides says nothing; on one side alone the number is read both as
    written and as a hundredth, since charts label 0.57, 57 and 57 % alike.
    """
    answer, gold = answer.strip(), gold.strip()
    said, wanted = _number(answer), _number(gold)
    if said is None or wanted is None:
        return answer.lower() == gold.lower()
    readings = [(said, wanted)]
    if answer.endswith("%") != gold.endswith("%"):
        readings.append((said / 100, wanted) if answer.endswith("%") else (said, wanted / 100))
    return any(abs(one - other) <= TOLERANCE * abs(other) for one, other in readings)


def _number(text: str) -> Decimal | None:
    text = text.removesuffix("%").strip()
    return Decimal(text) if NUMBER.fullmatch(text) else None


def judge_anls(question: Question, answer: str) -> Judged:
    return Judged({"anls": max(similarity(answer, gold) for gold in question.answers)})


def similarity(answer: str, gold: str) -> float:
    """1 - edits / length of the longer text, or 0 where that is below the threshold of 0.5 (Biten et al. 2019, eq. 1).

    Both sides without capitals and doubled blanks, as in the challenge's script. At exactly 0.5 the script counts 0.5
    and the paper nothing; this is the script's.
    """
    one, other = (" ".join(text.lower().split()) for text in (answer, gold))
    longer = max(len(one), len(other))
    if not longer:
        return 1.0
    if abs(len(one) - len(other)) > (1 - ANLS_THRESHOLD) * longer:  # as many edits at least
        return 0.0
    value = 1 - edits(one, other) / longer
    return value if value >= ANLS_THRESHOLD else 0.0


def edits(one: str, other: str) -> int:
    """Levenshtein distance: fewest letters to insert, delete or replace."""
    above = list(range(len(other) + 1))
    for row, letter in enumerate(one, start=1):
        line = [row]
        for column, wanted in enumerate(other, start=1):
            line.append(min(above[column] + 1, line[-1] + 1, above[column - 1] + (letter != wanted)))
        above = line
    return above[-1]


def judge_ocrbench(question: Question, answer: str) -> Judged:
    """One point if any accepted text occurs in the answer (Liu et al. 2023, `OCRBench/example.py`), never more."""
    formula = question.details["dataset"] == FORMULAS
    said = _searched(answer, formula)
    return right(any(_searched(gold, formula) in said for gold in question.answers if gold.strip()))


def _searched(text: str, formula: bool) -> str:
    text = text.strip().replace("\n", " ")
    return text.replace(" ", "") if formula else text.lower()


def judge_pope(question: Question, answer: str) -> Judged:
    """Yes or no by POPE's `evaluate.py`: "no" if the first sentence has the word No, no or not, else "yes".

    So also an empty answer says yes; `parsed` is False where neither word is there.
    """
    words = answer.partition(".")[0].replace(",", "").split(" ")
    denies = any(word in ("No", "not", "no") for word in words)
    said, gold = "no" if denies else "yes", question.answers[0].strip().lower()
    if gold not in ("yes", "no"):
        raise ValueError(f"the answer is neither yes nor no: {gold!r}")
    affirms = any(word.lower().strip("!\n") == "yes" for word in words)
    return Judged({"accuracy": float(said == gold)}, denies or affirms, {"said": said, "gold": gold})
