"""Scores of the short-answer benchmarks from the Hub's files and from the benchmarks' own, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from evaluation_fixtures import ROOT, benchmark_rows, write_benchmark, write_json, write_lines

from vlm.benchmarks import BENCHMARKS, read_to_score
from vlm.cli import main
from vlm.evaluate import answers, judged

Json = dict[str, Any]


def run(folder: Path, name: str, said: object, *annotations: Path) -> Json:
    predictions = write_json(folder / "p.json", said)
    answers.score(name, annotations or [write_benchmark(folder / name, name)], [predictions], folder / "s.json")
    score: Json = json.loads((folder / "s.json").read_text())
    assert score["benchmark"] == name
    return score


def lines(said: dict[str, str]) -> list[Json]:
    return [{"id": name, "image": "x", "prompt": "p", "response": text} for name, text in said.items()]


def error(*values: float) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values) / len(values))


CASES = {
    # Of the ten cat, nine and eight say cat; and eight, nine and none of ten say stop.
    "vqav2": ({"100": "A cat.", "101": "dog", "102": "dog"}, "accuracy", [1.0, 0.3, 0.6]),
    "textvqa": ({"0": "Stop!", "1": "go", "2": "go"}, "accuracy", [1.0, 0.3, 0.6]),
    "chartqa": ({"0": "14.5", "1": "no", "2": "-20"}, "relaxed_accuracy", [1.0, 0.0, 1.0]),
    "ai2d": ({"0": "A", "1": "root", "2": "A"}, "accuracy", [1.0, 1.0, 0.0]),
    "realworldqa": ({"0": "B", "1": "yes", "2": "4"}, "accuracy", [1.0, 1.0, 0.0]),
    "docvqa": ({"7": "12 may", "8": "12 Max", "9": "5 dollars"}, "anls", [1.0, 5 / 6, 0.0]),
    "infovqa": ({"0": "62%", "1": "62", "2": "?"}, "anls", [1.0, 2 / 3, 0.0]),
    "mathvista": ({"1": "(B)", "2": "It is 14.", "3": "1.3"}, "accuracy", [1.0, 1.0, 0.0]),
    "ocrbench": ({"0": "a stop sign", "1": "X^2", "2": "x ^ 2"}, "accuracy", [1.0, 0.0, 1.0]),
    "pope": ({"popular_0": "Yes", "popular_1": "No", "random_0": "yes"}, "accuracy", [1.0, 0.0, 1.0]),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_generated_lines_against_the_hubs_files(tmp_path: Path, name: str) -> None:
    said, metric, points = CASES[name]
    score = run(tmp_path, name, lines(dict(reversed(said.items()))))
    assert next(iter(score["metrics"])) == metric
    assert score["metrics"][metric] == pytest.approx(sum(points) / 3, rel=1e-12)
    assert score["standard_errors"][metric] == pytest.approx(error(*points), rel=1e-12)
    assert (score["num_items"], score["num_empty"]) == (3, 0)
    assert set(score) == {
        *("benchmark", "metrics", "standard_errors", "num_items", "num_empty", "num_unparsed", "per_group")
    }


def test_groups_have_scores_of_their_own(tmp_path: Path) -> None:
    charts = run(tmp_path, "chartqa", lines({"0": "14", "1": "no", "2": "5"}))["per_group"]["type"]
    assert charts == {
        "augmented": {
            "metrics": {"relaxed_accuracy": 0.0},
            "standard_errors": {"relaxed_accuracy": 0.0},
            "num_items": 1,
        },
        "human": {
            "metrics": {"relaxed_accuracy": 0.5},
            "standard_errors": {"relaxed_accuracy": math.sqrt(0.5 * 0.5 / 2)},
            "num_items": 2,
        },
    }
    pages = run(tmp_path, "docvqa", lines({"7": "12 may", "8": "12 May", "9": "-"}))["per_group"]["question_types"]
    assert {kind: group["num_items"] for kind, group in pages.items()} == {"form": 3, "layout": 1}  # one is in both
    maths = run(tmp_path, "mathvista", lines({"1": "B", "2": "3", "3": "1.25"}))["per_group"]
    assert set(maths) == {"question_type", "answer_type", "task", "category", "skills"}
    assert maths["task"]["figure"]["metrics"] == {"accuracy": 0.5} and maths["skills"]["counting"]["num_items"] == 2


def test_pope_counts_by_hand_and_per_subset(tmp_path: Path) -> None:
    """Of 40: 12 said yes rightly, 4 wrongly, 6 said no wrongly, 18 rightly."""
    cells = [("yes", "yes")] * 12 + [("yes", "no")] * 4 + [("no", "yes")] * 6 + [("no", "no")] * 18
    row = benchmark_rows("pope")[0]
    rows = [
        row | {"question_id": str(n), "answer": gold, "category": ("random", "popular")[n % 2]}
        for n, (_, gold) in enumerate(cells)
    ]
    source = write_benchmark(tmp_path / "hub", "pope", rows)
    said = lines({f"{('random', 'popular')[n % 2]}_{n}": word for n, (word, _) in enumerate(cells)})
    score = run(tmp_path, "pope", said, source)
    expected = {"accuracy": 30 / 40, "precision": 12 / 16, "recall": 12 / 18, "f1": 24 / 34, "yes_share": 16 / 40}
    assert score["metrics"] == pytest.approx(expected, rel=1e-12)
    binomial = {name: math.sqrt(expected[name] * (1 - expected[name]) / 40) for name in ("accuracy", "yes_share")}
    errors = score["standard_errors"]
    assert {name: errors[name] for name in binomial} == pytest.approx(binomial, rel=1e-12)
    # The delta method for ratios of counts, which the bootstrap comes near.
    assert errors["precision"] == pytest.approx(math.sqrt(0.75 * 0.25 / 16), rel=0.15)
    assert errors["recall"] == pytest.approx(math.sqrt(12 / 18 * 6 / 18 / 18), rel=0.15)
    assert 0.05 < errors["f1"] < 0.12
    assert set(score["per_group"]["category"]) == {"random", "popular"}
    assert score["per_group"]["category"]["random"]["metrics"]["recall"] == pytest.approx(6 / 9)


def test_pope_without_a_yes_has_no_ratio(tmp_path: Path) -> None:
    metrics = run(tmp_path, "pope", lines(dict.fromkeys(CASES["pope"][0], "no")))["metrics"]
    assert metrics == {"accuracy": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_share": 0.0}


def without_pictures(name: str) -> list[Json]:
    return [{key: value for key, value in row.items() if key != BENCHMARKS[name].image} for row in benchmark_rows(name)]


def test_the_benchmarks_own_files_score_the_same(tmp_path: Path) -> None:
    """Annotations and results as the official tools of each benchmark read and write them."""
    rows = {name: without_pictures(name) for name in BENCHMARKS}
    said = {name: CASES[name][0] for name in BENCHMARKS}
    chart = {"0": "human", "1": "augmented", "2": "human"}
    own: dict[str, tuple[dict[str, object], dict[str, object]]] = {
        "vqav2": (
            {"a.json": {"info": {}, "annotations": rows["vqav2"]}},
            {"p.json": [{"question_id": int(n), "answer": text} for n, text in said["vqav2"].items()]},
        ),
        "textvqa": (
            {"a.json": {"data": rows["textvqa"], "dataset_type": "val"}},
            {"p.json": [{"question_id": int(n), "answer": text} for n, text in said["textvqa"].items()]},
        ),
        "chartqa": (
            {
                f"test_{part}.json": [
                    {"imgname": "x.png", "query": row["question"], "label": row["answer"], "id": n}
                    for n, row in enumerate(rows["chartqa"])
                    if chart[str(n)] == part
                ]
                for part in ("human", "augmented")
            },
            {"p.json": said["chartqa"]},
        ),
        "docvqa": (
            {"val.json": {"dataset_name": "docvqa", "data": rows["docvqa"]}},
            {"p.json": [{"questionId": int(n), "answer": text} for n, text in said["docvqa"].items()]},
        ),
        "mathvista": (
            {"testmini.json": {row["pid"]: row for row in rows["mathvista"]}},
            {"p.json": {n: {"pid": n, "query": "?", "response": text} for n, text in said["mathvista"].items()}},
        ),
        "ocrbench": (
            {"OCRBench.json": [ocrbench_row(row) for row in rows["ocrbench"]]},
            {
                "p.json": [
                    ocrbench_row(row) | {"predict": text}
                    for row, text in zip(rows["ocrbench"], said["ocrbench"].values(), strict=True)
                ]
            },
        ),
    }
    for name, (asked, predictions) in own.items():
        hub = run(tmp_path, name, lines(said[name]))
        folder = tmp_path / f"own_{name}"
        read = [write_json(folder / path, value) for path, value in asked.items()]
        told = [write_json(folder / path, value) for path, value in predictions.items()]
        answers.score(name, read, told, folder / "s.json")
        score = json.loads((folder / "s.json").read_text())
        assert score == hub, name


def ocrbench_row(row: Json) -> Json:
    return {
        "dataset_name": row["dataset"],
        "type": row["question_type"],
        "question": row["question"],
        "answers": row["answer"],
        "image_path": "a.png",
    }


def test_popes_own_lines_have_no_ids_and_go_by_order(tmp_path: Path) -> None:
    asked = [{"question_id": n, "image": "x.jpg", "text": f"Is there a {n}?", "label": "yes"} for n in range(2)]
    files = [write_lines(tmp_path / f"coco_pope_{part}.json", asked) for part in ("random", "adversarial")]
    said = [{"question": row["text"], "answer": text} for row, text in zip(asked * 2, ["Yes", "No"] * 2, strict=True)]
    score = run(tmp_path, "pope", said, *files)
    assert {part: group["num_items"] for part, group in score["per_group"]["category"].items()} == {
        "adversarial": 2,
        "random": 2,
    }
    assert score["metrics"]["recall"] == 0.5
    said[1]["question"] = "Is there a 7?"
    with pytest.raises(ValueError, match=r"entry 1 answers 'Is there a 7\?', where the question is 'Is there a 1\?'"):
        run(tmp_path, "pope", said, *files)
    with pytest.raises(ValueError, match="3 answers without ids for 4 questions"):
        run(tmp_path, "pope", said[:3], *files)
    parts = [write_lines(tmp_path / f"{part}.jsonl", asked) for part in ("random", "adversarial")]
    assert set(answers.read_predictions(parts, "pope", read_to_score(files, "pope", "test"))) == {
        *("random_0", "random_1", "adversarial_0", "adversarial_1")
    }


def test_empty_answers_are_counted_and_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = run(tmp_path, "ai2d", lines({"0": "A", "1": " ", "2": "well"}))
    assert (score["num_empty"], score["num_unparsed"], score["metrics"]["accuracy"]) == (1, 2, pytest.approx(1 / 3))
    assert "1 answers are empty: 1" in capsys.readouterr().err


GOOD = lines(CASES["textvqa"][0])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        pytest.param(GOOD[:2], r"1 of the 3 questions in .* have no prediction: 2$", id="missing"),
        pytest.param([*GOOD, {"id": 9, "response": "a"}], r"1 ids are not in .*textvqa: 9$", id="unknown"),
        pytest.param([*GOOD, GOOD[0]], "p.json: 0 is answered more than once", id="twice"),
        pytest.param([*GOOD[:2], {"id": 2, "response": None}], "entry 2: expected text .* found None", id="no-text"),
        pytest.param([*GOOD[:2], {"id": 2, "response": math.nan}], "entry 2: expected text .* found nan", id="nan"),
        pytest.param([*GOOD[:2], {"id": 2}], "entry 2: expected text or a number under one of", id="no-answer"),
        pytest.param([*GOOD[:2], {"response": "a"}], "entry 2: expected .* under `question_id`", id="no-id"),
        pytest.param([*GOOD[:2], {"id": True, "response": "a"}], "entry 2: expected .* under `id`", id="bool-id"),
        pytest.param(["a"], "entry 1 of the list is str, expected an object", id="not-objects"),
        pytest.param([], "0 answers without ids for 3 questions", id="none"),
    ],
)
def test_predictions_that_do_not_cover_the_questions_are_refused(tmp_path: Path, said: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "textvqa", said)
    assert not (tmp_path / "s.json").exists()


def test_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<html>proxy error</html>\n")
    good, hub = write_lines(tmp_path / "good.jsonl", GOOD), write_benchmark(tmp_path / "hub", "textvqa")
    for first, second, named in ((page, good, page), (hub, page, page), (hub, tmp_path / "none", tmp_path / "none")):
        with pytest.raises(ValueError, match=named.name):
            answers.score("textvqa", [first], [second], tmp_path / "s.json")
    table = tmp_path / "broken.parquet"
    table.write_text("<html>")
    with pytest.raises(ValueError, match=r"broken\.parquet: not a parquet file"):
        answers.score("textvqa", [table], [good], tmp_path / "s.json")
    with pytest.raises(ValueError, match=r"hub: holds no data/test-\*\.parquet \(evaluation\.textvqa\.split\)"):
        answers.score("textvqa", [hub], [good], tmp_path / "s.json", split="test")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_column_that_is_read_is_asked_for(tmp_path: Path, name: str) -> None:
    for column in dict.fromkeys(column.partition(".")[0] for column in BENCHMARKS[name].to_score):
        rows = [{key: value for key, value in row.items() if key != column} for row in benchmark_rows(name)]
        source = write_benchmark(tmp_path / column, name, rows)
        with pytest.raises(ValueError, match=rf"columns {column} are missing, is it {BENCHMARKS[name].title}'s"):
            read_to_score([source], name, BENCHMARKS[name].split)


def test_annotations_that_cannot_be_scored_are_refused(tmp_path: Path) -> None:
    rows = benchmark_rows("docvqa")
    twice = write_benchmark(tmp_path / "twice", "docvqa", [*rows, rows[0]])
    with pytest.raises(ValueError, match="1 ids occur more than once, first 7"):
        read_to_score([twice], "docvqa", "validation")
    bare = write_benchmark(tmp_path / "bare", "docvqa", [rows[0] | {"answers": []}, *rows[1:]])
    with pytest.raises(ValueError, match="1 questions have no answer, first 7; is the split a public one"):
        read_to_score([bare], "docvqa", "validation")
    other = write_json(tmp_path / "other.json", [{"query": "How many?"}])
    with pytest.raises(ValueError, match=r"other\.json: entry 0 has no answer \(or label\), is it ChartQA's"):
        read_to_score([other], "chartqa", "test")
    wrong = [benchmark_rows("ai2d")[0] | {"answer": "7"}]
    with pytest.raises(ValueError, match="question 0: the answer is not the place of one of the 3 options: '7'"):
        run(tmp_path, "ai2d", lines({"0": "A"}), write_benchmark(tmp_path / "wrong", "ai2d", wrong))


def test_standard_error_of_right_or_wrong_is_binomial() -> None:
    assert judged.standard_error([1.0] * 3 + [0.0]) == pytest.approx(math.sqrt(0.75 * 0.25 / 4), rel=1e-12)
    assert judged.standard_error([0.25]) == judged.standard_error([0.5, 0.5]) == 0.0


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    hub = write_benchmark(tmp_path / "hub", "chartqa")
    good = write_lines(tmp_path / "p.jsonl", lines(CASES["chartqa"][0]))
    arguments = ["score", "chartqa", "--annotations", hub, "--predictions", good, "--output", tmp_path / "s.json"]
    program = "import sys; from vlm.cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules; "
    subprocess.run([sys.executable, "-c", program + "sys.exit(code)", *arguments], check=True, cwd=ROOT)
    assert json.loads((tmp_path / "s.json").read_text())["metrics"]["relaxed_accuracy"] == pytest.approx(2 / 3)
    assert main([*map(str, arguments), "--split", "train"]) == 2


def test_every_benchmark_has_a_rule_and_a_section() -> None:
    from vlm.config import Benchmark, Evaluation

    sections = {name for name, key in Evaluation.model_fields.items() if key.annotation == Benchmark | None}
    assert set(answers.RULES) == set(BENCHMARKS) == sections
