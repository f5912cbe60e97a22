"""Hand-worked cases: which option a response chooses, and what a free answer of MathVista says."""

from __future__ import annotations

from typing import Any

import pytest

from vlm.benchmarks import Question
from vlm.evaluate import choices

OPTIONS = ("leaf", "root", "stem", "Bark.")


@pytest.mark.parametrize(
    ("response", "place"),
    [
        pytest.param("B", 1, id="letter"),
        pytest.param(" (b). ", 1, id="letter-in-marks"),
        pytest.param("A", 0, id="the-letter-that-is-an-article"),
        pytest.param("E", None, id="no-such-letter"),
        pytest.param("C. stem", 2, id="letter-first"),
        pytest.param("(C) because of A", 2, id="bracket-first"),
        pytest.param("The answer is B, not C", 1, id="announced"),
        pytest.param("Answer: A? No, the answer is: (C)", 2, id="announced-last"),
        pytest.param("Surely (D) it is", 3, id="one-in-brackets"),
        pytest.param("(A) or (B)", 0, id="begins-with-one-of-two"),
        pytest.param("either (A) or (B)", None, id="two-in-brackets"),
        pytest.param("Stem.", 2, id="text-of-the-option"),
        pytest.param("bark", 3, id="text-without-its-stop"),
        pytest.param("the stem", None, id="more-than-the-text"),
        pytest.param("I cannot say", None, id="i-is-no-option"),
        pytest.param("", None, id="empty"),
    ],
)
def test_choose(response: str, place: int | None) -> None:
    assert choices.choose(response, OPTIONS) == place


def test_a_letter_that_is_also_a_text_is_the_letter() -> None:
    assert choices.choose("B", ["C", "A", "B"]) == 1
    assert choices.choose("same", ["same", "Same."]) is None


def test_ai2d_holds_the_place_of_the_right_option() -> None:
    question = Question("1", "", ("2",), OPTIONS)
    assert choices.judge_ai2d(question, "C").points == {"accuracy": 1.0}
    wrong, none = choices.judge_ai2d(question, "B"), choices.judge_ai2d(question, "hm")
    assert (wrong.points, wrong.parsed) == (none.points, True) == ({"accuracy": 0.0}, True) and not none.parsed
    for gold in ("4", "C", "-1"):
        with pytest.raises(ValueError, match=f"not the place of one of the 4 options: '{gold}'"):
            choices.judge_ai2d(Question("1", "", (gold,), OPTIONS), "C")


@pytest.mark.parametrize(
    ("asked", "gold", "answer", "right"),
    [
        pytest.param("Which?\nA. Left\nB. Right", "B", "right", True, id="option-by-text"),
        pytest.param("Which?\nA. Left\nB. Right", "B", "B. Right", True, id="option-by-letter"),
        pytest.param("Which?\nA. Left\nB. Right", "B", "A", False, id="wrong-option"),
        pytest.param("Is it red?", "Yes", " yes. ", True, id="word"),
        pytest.param("How many?", "3", "three", False, id="word-exactly"),
        pytest.param("Which lane, A or B?", "A", "a", True, id="letter-without-options"),
    ],
)
def test_realworldqa(asked: str, gold: str, answer: str, right: bool) -> None:
    question = Question("1", asked, (gold,), details={"question": asked})
    assert choices.judge_realworldqa(question, answer).points == {"accuracy": float(right)}


@pytest.mark.parametrize(
    ("response", "number"),
    [
        pytest.param("14", 14, id="alone"),
        pytest.param("The number missing in the sequence is 14.", 14, id="last-number"),
        pytest.param("Of 5 and 6, the answer is 11, 3 more", 11, id="first-after-announced"),
        pytest.param("x = 3\ny = 2 + 5 = 7", 7, id="after-the-last-equals"),
        pytest.param("The answer is unclear, 4 or 5", 4, id="tail-with-words"),
        pytest.param("4 of 9. The answer is unclear", 9, id="tail-without-numbers"),
        pytest.param("$1,234.50 in all", 1234.5, id="thousands"),
        pytest.param("-3.5", -3.5, id="negative"),
        pytest.param("2007-2008", 2008, id="dash-is-no-sign"),
        pytest.param(".5", 0.5, id="no-zero"),
        pytest.param("2e3", 2000, id="exponent"),
        pytest.param("1e999", None, id="beyond-floats"),
        pytest.param("fourteen", None, id="word"),
    ],
)
def test_number(response: str, number: float | None) -> None:
    assert choices.number_in(response) == number


def mathvista(kind: str, gold: str, answer: str, **more: Any) -> tuple[float, bool]:
    details = {"answer_type": kind, "precision": more.get("precision")}
    question = Question("1", "", (gold,), more.get("options", ()), details=details)
    judged = choices.judge_mathvista(question, answer)
    return judged.points["accuracy"], judged.parsed


@pytest.mark.parametrize(
    ("kind", "gold", "answer", "more", "expected"),
    [
        pytest.param("text", "8/11", "(B) 8/11", {"options": ("3/11", "8/11")}, (1.0, True), id="option-by-letter"),
        pytest.param("text", "8/11", "8 / 11", {"options": ("3/11", "8/11")}, (1.0, False), id="nearest-option"),
        pytest.param("text", "8/11", "3 / 11", {"options": ("3/11", "8/11")}, (0.0, False), id="nearest-is-wrong"),
        pytest.param("integer", "14", "14.7", {}, (1.0, True), id="integer-is-cut"),
        pytest.param("integer", "14", "about fifteen", {}, (0.0, False), id="no-number"),
        pytest.param("float", "1.2", "1.23", {"precision": 1.0}, (1.0, True), id="rounded-to-precision"),
        pytest.param("float", "1.20", "1.2", {"precision": 2.0}, (1.0, True), id="zeros-say-nothing"),
        pytest.param("float", "1.2", "1.26", {"precision": 1.0}, (0.0, True), id="rounded-away"),
        pytest.param("list", "[2007, 2008]", "between 2007 and 2008", {}, (1.0, True), id="list-of-all-numbers"),
        pytest.param("list", "[1, 2]", "of [3] it is [1.0, 2]", {}, (1.0, True), id="last-written-list"),
        pytest.param("list", "[1, 2]", "[2, 1]", {}, (0.0, True), id="order-counts"),
        pytest.param("list", "[1, 2]", "none", {}, (0.0, False), id="no-list"),
    ],
)
def test_mathvista(kind: str, gold: str, answer: str, more: dict[str, Any], expected: tuple[float, bool]) -> None:
    assert mathvista(kind, gold, answer, **more) == expected
