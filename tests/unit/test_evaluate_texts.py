"""Hand-worked cases of relaxed accuracy, ANLS, OCRBench's search and POPE's yes or no."""

from __future__ import annotations

import pytest

from vlm.benchmarks import Question
from vlm.evaluate import texts


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        pytest.param("105", "100", True, id="upper-edge"),
        pytest.param("95", "100", True, id="lower-edge"),
        pytest.param("105.01", "100", False, id="beyond"),
        pytest.param("4.2", "4", True, id="edge-that-floats-miss"),
        pytest.param("-21", "-20", True, id="negative-upper-edge"),
        pytest.param("-19", "-20", True, id="negative-lower-edge"),
        pytest.param("20", "-20", False, id="other-sign"),
        pytest.param("0.0", "0", True, id="zero"),
        pytest.param("0.01", "0", False, id="near-zero-is-not-zero"),
        pytest.param("57%", "57", True, id="percent-as-written"),
        pytest.param("57%", "0.57", True, id="percent-as-hundredths"),
        pytest.param("57", "57%", True, id="percent-in-the-answer-key"),
        pytest.param("60%", "57%", False, id="percent-on-both-sides-within-five-percent-only"),
        pytest.param("59%", "57%", True, id="percent-on-both-sides"),
        pytest.param("0.57%", "57%", False, id="percent-on-both-sides-is-no-hundredth"),
        pytest.param("1.2e3", "1200", True, id="exponent"),
        pytest.param("1_000", "1000", False, id="no-underscores"),
        pytest.param("nan", "nan", True, id="nan-is-a-word"),
        pytest.param("inf", "5", False, id="infinity-is-a-word"),
        pytest.param(" Yes", "yes", True, id="text-any-case"),
        pytest.param("Yes.", "yes", False, id="text-exactly"),
        pytest.param("2019 or 2020", "2019", False, id="text-around-a-number"),
        pytest.param("", "5", False, id="empty"),
    ],
)
def test_relaxed_match(answer: str, gold: str, right: bool) -> None:
    assert texts.relaxed_match(answer, gold) is right


@pytest.mark.parametrize(
    ("answer", "gold", "value"),
    [
        pytest.param("12 May", "12  MAY ", 1.0, id="capitals-and-blanks"),
        pytest.param("abcd", "abxd", 0.75, id="one-of-four"),
        pytest.param("abcd", "abxy", 0.5, id="at-the-threshold"),
        pytest.param("abcde", "abxyz", 0.0, id="below-the-threshold"),
        pytest.param("ab", "abcd", 0.5, id="half-the-length"),
        pytest.param("ab", "abcde", 0.0, id="less-than-half-the-length"),
        pytest.param("", "ab", 0.0, id="empty"),
    ],
)
def test_similarity(answer: str, gold: str, value: float) -> None:
    assert texts.similarity(answer, gold) == value == texts.similarity(gold, answer)


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("flaw", "lawn", 2)],
    ids=["mixed", "empty", "same", "shift"],
)
def test_edits(one: str, other: str, distance: int) -> None:
    assert texts.edits(one, other) == texts.edits(other, one) == distance


def test_anls_takes_the_best_of_the_accepted() -> None:
    question = Question("1", "", ("May 12", "12 May"))
    assert texts.judge_anls(question, "12 may").points == {"anls": 1.0}


@pytest.mark.parametrize(
    ("dataset", "accepted", "answer", "right"),
    [
        pytest.param("SROIE", ["STOP"], "It says stop.", True, id="inside-any-case"),
        pytest.param("SROIE", ["total due"], "TOTAL\nDUE: 5", True, id="over-a-line-end"),
        pytest.param("SROIE", ["total due"], "totaldue", False, id="blanks-count"),
        pytest.param("SROIE", ["5", "five"], "5 is five", True, id="one-point-for-both"),
        pytest.param("SROIE", [" ", "x"], "y", False, id="blank-answers-are-not-in-everything"),
        pytest.param("HME100k", ["x ^ { 2 }"], "x^{2}\n", True, id="formula-without-blanks"),
        pytest.param("HME100k", ["X ^ 2"], "x^2", False, id="formula-with-capitals"),
    ],
)
def test_ocrbench(dataset: str, accepted: list[str], answer: str, right: bool) -> None:
    question = Question("1", "", tuple(accepted), details={"dataset": dataset})
    assert texts.judge_ocrbench(question, answer).points == {"accuracy": float(right)}


@pytest.mark.parametrize(
    ("answer", "said", "parsed"),
    [
        pytest.param("Yes", "yes", True, id="yes"),
        pytest.param("No, there is a dog", "no", True, id="no-before-a-comma"),
        pytest.param("There is not", "no", True, id="not"),
        pytest.param("Yes. There is no cat", "yes", True, id="first-sentence-only"),
        pytest.param("NO", "yes", False, id="only-three-spellings-deny"),
        pytest.param("maybe", "yes", False, id="neither-word"),
        pytest.param("", "yes", False, id="empty-affirms"),
        pytest.param("nothing", "yes", False, id="whole-words"),
    ],
)
def test_pope(answer: str, said: str, parsed: bool) -> None:
    judged = texts.judge_pope(Question("1", "", ("Yes",)), answer)
    assert (judged.counts, judged.parsed) == ({"said": said, "gold": "yes"}, parsed)
    assert judged.points == {"accuracy": float(said == "yes")}
