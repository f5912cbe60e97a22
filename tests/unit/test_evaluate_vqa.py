"""Hand-worked cases of VQA accuracy: the rules of normalising and the leave-one-out mean."""

from __future__ import annotations

import pytest

from vlm.benchmarks import Question
from vlm.evaluate import vqa


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        pytest.param("A Red Dog", "red dog", id="capitals-and-article"),
        pytest.param("the", "", id="only-an-article"),
        pytest.param("Two", "2", id="number-word"),
        pytest.param("none", "0", id="none-is-zero"),
        pytest.param("eleven", "eleven", id="numbers-end-at-ten"),
        pytest.param("dont", "don't", id="contraction"),
        pytest.param("yalld've", "yalld've", id="two-apostrophes-missing"),
        pytest.param("yall'd've", "y'all'd've", id="one-of-three-missing"),
        pytest.param("Im", "im", id="of-i-is-unreachable"),
        pytest.param("somebody'd", "somebodyd", id="the-wrong-way-round"),
        pytest.param("dog.", "dog", id="full-stop"),
        pytest.param("3.5", "3.5", id="decimal-point"),
        pytest.param("5.", "5", id="stop-after-number"),
        pytest.param("red-blue", "red blue", id="mark-between-letters"),
        pytest.param("red - blue", "red blue", id="mark-beside-a-blank"),
        pytest.param("yes!", "yes", id="mark-at-the-end"),
        pytest.param("1,000", "1000", id="comma-between-digits"),
        pytest.param("a/b 1,000", "ab 1000", id="comma-between-digits-closes-all-marks"),
        pytest.param("a/b", "b", id="article-from-a-split"),
        pytest.param("men's", "men's", id="genitive"),
        pytest.param("in\nthe\tbox ", "in box", id="blanks"),
    ],
)
def test_normalise(answer: str, normalised: str) -> None:
    assert vqa.normalise(answer) == normalised


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        pytest.param("men's", "men 's", id="genitive-is-a-word"),
        pytest.param("Really?", "really", id="question-mark"),
        pytest.param("red,blue", "redblue", id="comma-closes"),
        pytest.param("The One", "1", id="the-rest-as-vqav2"),
    ],
)
def test_normalise_textvqa(answer: str, normalised: str) -> None:
    assert vqa.normalise_textvqa(answer) == normalised


@pytest.mark.parametrize(
    ("matching", "expected"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
    ids=lambda value: str(value),
)
def test_accuracy_leaves_each_person_out_once(matching: int, expected: float) -> None:
    accepted = ["dog"] * matching + [f"cat {n}" for n in range(10 - matching)]
    assert vqa.accuracy("dog", accepted) == pytest.approx(expected, abs=1e-12)


def test_one_persons_answer_is_none_to_agree_with() -> None:
    with pytest.raises(ValueError, match=r"several people \(ten\), found 1"):
        vqa.accuracy("dog", ["dog"])


def points(judge: object, answers: list[str], said: str) -> dict[str, float]:
    return dict(judge(Question("1", "", tuple(answers)), said).points)  # type: ignore[operator]


def test_where_all_people_agree_the_script_compares_letters() -> None:
    both = {"accuracy": 1.0, "accuracy_raw_if_unanimous": 1.0}
    assert points(vqa.judge_vqav2, ["yes"] * 10, "yes\n") == both
    assert points(vqa.judge_vqav2, ["yes"] * 10, "Yes.") == both | {"accuracy_raw_if_unanimous": 0.0}
    assert points(vqa.judge_vqav2, ["two"] * 10, "two") == both
    assert points(vqa.judge_vqav2, ["yes"] * 9 + ["no"], "Yes.") == both


def test_both_sides_of_textvqa_are_normalised() -> None:
    assert points(vqa.judge_textvqa, ["Coca-Cola"] * 10, "the coca cola") == {"accuracy": 1.0}
    assert points(vqa.judge_textvqa, ["Coca-Cola"] * 2 + ["Pepsi"] * 8, "coca cola") == {"accuracy": pytest.approx(0.6)}
