"""Hand-worked cases of MMMU's parsing rules, and the three forms of predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
from evaluation_fixtures import mmmu_row, write_json, write_lines, write_mmmu

from vlm import mmmu as mmmu_rules
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
    "standard_errors": {
        "accuracy": (0.75 * 0.25 / 4) ** 0.5,
        "per_subject": {"Accounting": 0.0, "Art_Theory": 0.0, "Shapes": 0.0},
        "per_domain": {"Art and Design": 0.0, "Business": 0.0, "Other": 0.0},
    },
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


def test_answers_come_from_the_hubs_files_where_mmmus_own_is_not_there(tmp_path: Path) -> None:
    rows = {mmmu.subject(name): [] for name in ANSWERS}
    for name, answer in ANSWERS.items():
        gold = answer["ground_truth"]
        options = list(OPTIONS.values()) if answer["question_type"] == "multiple-choice" else []
        written = str(gold) if isinstance(gold, list) and not options else gold  # several open answers: a list as text
        rows[mmmu.subject(name)].append(mmmu_row(name, "What?", options, images=1, answer=written))
    rows["Art_Theory"][0]["answer"] = "B"  # the Hub's files hold one letter
    answers = write_mmmu(tmp_path / "hub", rows)
    answers.unlink()
    lines = write_lines(tmp_path / "lines.jsonl", raw(RESPONSES | {"validation_Art_Theory_2": "B"}))
    for source in (tmp_path / "hub", tmp_path / "hub/Art_Theory"):
        if source.name == "Art_Theory":
            lines = write_lines(tmp_path / "lines.jsonl", raw({n: r for n, r in RESPONSES.items() if "Theory" in n}))
        mmmu.score(source, lines, tmp_path / "score.json")
        score = json.loads((tmp_path / "score.json").read_text())
        assert score["per_subject"]["Art_Theory"] == (1.0 if source.name == "hub" else 0.5)
    mmmu.score(tmp_path / "hub", write_lines(tmp_path / "all.jsonl", raw(RESPONSES)), tmp_path / "score.json")
    assert json.loads((tmp_path / "score.json").read_text())["num_correct"] == 2
    write_json(answers, ANSWERS)  # where it lies there, it counts
    mmmu.score(tmp_path / "hub", tmp_path / "all.jsonl", tmp_path / "score.json")
    assert json.loads((tmp_path / "score.json").read_text())["num_correct"] == 3
    with pytest.raises(ValueError, match=r"holds neither answer_dict_val\.json nor <Subject>/test-\*\.parquet"):
        mmmu_rules.read_gold(tmp_path, "test")


TEN = [f"colour {letter}" for letter in "ABCDEFGHIJ"]


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        pytest.param("H", "H", id="letter-alone"),
        pytest.param("Because of A.\nAnswer: J", "J", id="announced"),
        pytest.param("Answer: B or C", "C", id="two-announced-so-the-last"),
        pytest.param("Answer: Bed", "B", id="letter-inside-a-word"),
        pytest.param("(A) and then (J)", "J", id="last-bracket"),
        pytest.param("USA is red", "A", id="any-letter-before-a-blank"),
        pytest.param("G. colour", "G", id="letter-before-a-stop"),
        pytest.param("it is of the colour h it seems", "H", id="option-text-in-more-than-five-words"),
        pytest.param("hm", None, id="none"),
    ],
)
def test_choice_by_the_rules_of_mmmu_pro(response: str, letter: str | None) -> None:
    letters = "ABCDEFGHIJ"
    assert mmmu_rules.parse_choice_pro(response, letters, dict(zip(letters, TEN, strict=True))) == letter


@pytest.mark.parametrize("setting", ["standard (10 options)", "vision"])
def test_result_files_of_mmmu_pro(tmp_path: Path, setting: str) -> None:
    names = [f"test_{subject}_{n}" for subject in ("History", "Music") for n in (1, 2)]
    picture = {"image_1" if setting.startswith("standard") else "image": {"bytes": b"x", "path": None}}
    rows = [{"id": name, "options": str(TEN), "answer": "J", "subject": "?"} | picture for name in names]
    path = tmp_path / setting / "test-00000-of-00001.parquet"
    path.parent.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    responses = ["Answer:J", "(J)", "Answer: A", "hm"]  # MMMU itself finds no letter after a colon
    lines = [
        {key: row[key] for key in ("id", "options", "answer", "subject")} | {"response": response}
        for row, response in zip(rows, responses, strict=True)
    ]
    lines[1]["options"] = TEN  # a list as well as its text
    predictions = write_lines(tmp_path / "model_vision_direct.jsonl", lines)
    for answers in (path, path.parent, predictions):
        mmmu.score(answers, predictions, tmp_path / "s.json", fallback="wrong", split="test")
        score = json.loads((tmp_path / "s.json").read_text())
        assert score["per_subject"] == {"History": 1.0, "Music": 0.0}
        assert (score["num_correct"], score["num_fallback"]) == (2, 1)
        assert score["per_domain"] == {"Art and Design": 0.0, "Humanities and Social Science": 1.0}
    other = tmp_path / "standard (4 options)" / path.name
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"test_History_1 is there more than once; of MMMU-Pro, name the folder"):
        mmmu.score(tmp_path, predictions, tmp_path / "s.json", split="test")


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
