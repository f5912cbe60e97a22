"""Hand-worked cases of MMMU's parsing rules, and the three forms of predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_fixtures import write_json, write_lines

from vlm.evaluate import mmmu
from vlm.mmmu import normalise, open_is_correct, parse_choice, parse_open

OPTIONS = {"A": "red box", "B": "blue ball", "C": "a red", "D": "12"}


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        pytest.param("B", "B", id="letter-alone"),
        pytest.param("B.", "B", id="stop-is-stripped"),
        pytest.param("B.,", "B", id="marks-stripped-in-order"),
        pytest.param("B,.", None, id="comma-before-stop-stays"),
        pytest.param("b", None, id="lower-case-is-no-letter"),
        pytest.param("(C) because A is wrong", "C", id="bracket-beats-alone"),
        pytest.param("(A) or rather (D)", "D", id="last-bracket"),
        pytest.param("I think A , no B it is", "B", id="last-alone"),
        pytest.param("C)", None, id="half-bracket"),
        pytest.param("I can see the red box", "A", id="option-text-in-six-words"),
        pytest.param("see the red box", None, id="option-text-in-four-words"),
        pytest.param("I see the red box now", "A", id="option-text"),
        pytest.param("it shows a red box and a BLUE Ball", "B", id="last-option-text-any-case"),
        pytest.param("it is a red box I think", "A", id="overlapping-texts-by-start"),
        pytest.param("Answer:B", None, id="no-space"),
        pytest.param("", None, id="empty"),
    ],
)
def test_choice(response: str, letter: str | None) -> None:
    assert parse_choice(response, "ABCD", OPTIONS) == letter


@pytest.mark.parametrize(
    ("response", "claims"),
    [
        pytest.param("Paris", ["paris"], id="whole-response"),
        pytest.param("The answer is Paris.", ["paris"], id="shortest-tail"),
        pytest.param("x = 5", [5.0], id="equation-in-last-line"),
        pytest.param("y = 7\nfoo", ["y = 7\nfoo", 7.0], id="equation-only-in-last-line"),
        pytest.param("It is red. So blue", ["blue"], id="no-split-at-full-stops"),
        pytest.param("It is red\nresult blue", ["red", "blue"], id="split-at-lines"),
        pytest.param("the sum is ,", ["the sum is ,"], id="trivial-tail"),
        pytest.param("of .256 or 7 m", ["of .256 or 7 m", 0.26, 7.0], id="simple-numbers"),
        # The official patterns for plain numbers also find the tails of the other two kinds.
        pytest.param("of 1,234", ["of 1,234", 1234.0, 234.0], id="thousands"),
        pytest.param("of 1.5e3", ["of 1.5e3", 1500.0, 1.0, 3.0], id="scientific"),
        pytest.param("-3.456 m", ["-3.456 m", -3.46], id="negative-rounded"),
        pytest.param("so a", [" a", "a "], id="single-letter"),
    ],
)
def test_open(response: str, claims: list[Any]) -> None:
    assert set(parse_open(response)) == set(claims)


def test_normalise_and_open_correctness() -> None:
    assert normalise(" 1,234.567 ") == [1234.57]
    assert normalise("Red") == ["red"]
    assert open_is_correct("Red box", parse_open("I see a red box here"))
    assert open_is_correct(["7", "seven"], parse_open("there are 7.001 of them"))
    assert not open_is_correct("7", parse_open("there are 17 of them"))  # numbers match as numbers
    assert open_is_correct("r", parse_open("r")) and not open_is_correct("r", parse_open("red"))


ANSWERS = {
    "validation_Accounting_1": {"question_type": "multiple-choice", "ground_truth": "A"},
    "validation_Art_Theory_2": {"question_type": "multiple-choice", "ground_truth": ["B", "C"]},
    "validation_Art_Theory_10": {"question_type": "short-answer", "ground_truth": ["12", "twelve"]},
    "validation_Shapes_1": {"question_type": "open", "ground_truth": "red"},
}
RESPONSES = {
    "validation_Art_Theory_10": "the answer is 12",
    "validation_Accounting_1": "(B)",
    "validation_Art_Theory_2": "C.",
    "validation_Shapes_1": "It is a red box",
}


def raw(responses: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "id": name,
            "question_type": ANSWERS[name]["question_type"],
            "all_choices": list("ABCD"),
            "index2ans": OPTIONS,
            "response": response,
        }
        for name, response in responses.items()
    ]


def run(folder: Path, predictions: Path, **options: Any) -> dict[str, Any]:
    answers = write_json(folder / "answers.json", ANSWERS)
    mmmu.score(answers, predictions, folder / "score.json", **options)
    return json.loads((folder / "score.json").read_text())


EXPECTED = {
    "accuracy": 0.75,
    "num_correct": 3,
    "num_questions": 4,
    "per_subject": {"Accounting": 0.0, "Art_Theory": 1.0, "Shapes": 1.0},
    "per_domain": {"Art and Design": 1.0, "Business": 0.0, "Other": 1.0},
    "num_fallback": 0,
}


def test_all_forms_give_the_same_score(tmp_path: Path) -> None:
    records = raw(RESPONSES)
    forms = {
        "list": write_json(tmp_path / "list.json", records),
        "lines": write_lines(tmp_path / "lines.jsonl", records),
        "final": write_json(
            tmp_path / "final.json", {**RESPONSES, "validation_Accounting_1": "B", "validation_Art_Theory_2": "C"}
        ),
        "folder": tmp_path / "folder",
    }
    for record in records:
        path = forms["folder"] / mmmu.subject(record["id"]) / "output.json"
        write_json(path, [*(json.loads(path.read_text()) if path.exists() else []), record])
    assert {name: run(tmp_path, form) for name, form in forms.items()} == dict.fromkeys(forms, EXPECTED)


def test_one_generated_line_is_a_record_and_not_final_answers(tmp_path: Path) -> None:
    one = {"validation_Accounting_1": {"question_type": "multiple-choice", "ground_truth": "A"}}
    lines = write_lines(tmp_path / "one.jsonl", raw({"validation_Accounting_1": "(A)"}))
    mmmu.score(write_json(tmp_path / "a.json", one), lines, tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["accuracy"] == 1.0


def test_fallback(tmp_path: Path) -> None:
    names = [f"validation_Math_{n}" for n in range(400)]
    answers = write_json(
        tmp_path / "a.json", {n: {"question_type": "multiple-choice", "ground_truth": "A"} for n in names}
    )
    records = [{"id": n, "all_choices": list("ABCD"), "index2ans": OPTIONS, "response": "hm"} for n in names]
    lines = write_lines(tmp_path / "p.jsonl", records)

    def accuracy(**options: Any) -> float:
        mmmu.score(answers, lines, tmp_path / "s.json", **options)
        score = json.loads((tmp_path / "s.json").read_text())
        assert score["num_fallback"] == 400
        return score["accuracy"]

    assert accuracy(fallback="first") == 1.0
    assert accuracy(fallback="wrong") == 0.0
    assert 0.15 < accuracy(fallback="random", seed=1) < 0.35
    assert accuracy(seed=1) == accuracy(seed=1)
    assert len({accuracy(seed=seed) for seed in range(5)}) > 1
    with pytest.raises(ValueError, match="fallback: 'last'"):
        accuracy(fallback="last")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (raw(RESPONSES)[1:], "1 of the 4 questions in .* no prediction: validation_Art_Theory_10"),
        ([*raw(RESPONSES), {"id": "validation_Art_9", "response": "A"}], "1 ids are not in .*validation_Art_9"),
        ([*raw(RESPONSES), raw(RESPONSES)[0]], "validation_Art_Theory_10 is answered more than once"),
        (
            [{"id": n, "response": r} for n, r in RESPONSES.items()],
            "validation_Accounting_1 is multiple-choice and lacks",
        ),
        ([{"id": "validation_Art_1", "response": None}], "expected strings under `id` and `response`"),
    ],
    ids=["missing", "unknown", "twice", "no-choices", "no-response"],
)
def test_predictions_that_do_not_fit_the_answers_are_refused(
    tmp_path: Path, records: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, write_json(tmp_path / "p.json", records))


def test_final_answers_and_answer_files_of_another_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation_Shapes_1: expected a string or a number, found None"):
        run(tmp_path, write_json(tmp_path / "p.json", {**RESPONSES, "validation_Shapes_1": None}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no <Subject>/output\.json"):
        run(tmp_path, tmp_path / "empty")
    lines = write_lines(tmp_path / "p.jsonl", raw(RESPONSES))
    for content, message in (
        ([], "expected an object of questions"),
        ({"validation_Art_1": {"ground_truth": "A"}}, "has no `question_type`"),
        ({"validation_Art_1": {"question_type": "open"}}, "ground_truth: expected a string"),
        ({"one": {"question_type": "open", "ground_truth": "A"}}, "expected <split>_<Subject>_<number>"),
    ):
        with pytest.raises(ValueError, match=message):
            mmmu.score(write_json(tmp_path / "bad.json", content), lines, tmp_path / "s.json")


def test_the_thirty_subjects_are_in_six_domains() -> None:
    subjects = [one for group in mmmu.DOMAINS.values() for one in group]
    assert len(subjects) == len(set(subjects)) == 30
    assert len(mmmu.DOMAINS) == 6
