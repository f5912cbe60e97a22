"""The file of answers: appended as it goes, taken up after an interruption, never mixed. A stand-in model answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from evaluation_fixtures import (
    benchmark_rows,
    mmmu_row,
    overlay,
    write_benchmark,
    write_coco,
    write_config,
    write_mmmu,
    write_pictures,
)

from vlm.evaluate import answers, captions, mmmu
from vlm.generate import speaker, tasks

IMAGES = [4, 1, 9, 12, 7, 30, 22]
BATCH = 3


class KilledError(Exception):
    """Stands for the end of the process."""


@dataclass
class StandIn:
    """Answers with the names of a batch's prompts; dies at its n-th batch."""

    dies_at: int | None = None
    batches: list[list[str]] = field(default_factory=list)

    @property
    def prompter(self) -> StandIn:
        return self

    def generation(self, text: str, num_images: int, *, key: str) -> list[int]:
        return [0] * (10 + int(key) % 3 if key.isdigit() else len(text))  # sorting changes the order

    def prompt(self, text: str, pictures: tuple[Any, ...], name: str) -> str:
        return name

    def answer(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        if len(self.batches) == self.dies_at:
            raise KilledError
        self.batches.append(prompts)
        return [f"a – {prompt} of {max_new_tokens}" for prompt in prompts]


class Talker(StandIn):
    """Keeps what it was asked, and answers with the turns that it has heard."""

    def prompt(self, asked: str | list[dict[str, str]], pictures: tuple[Any, ...], name: str) -> str:
        heard = [asked] if isinstance(asked, str) else [turn["value"] for turn in asked]
        return " | ".join([f"{name}:", *heard])

    def answer(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        super().answer(prompts, max_new_tokens)
        return [f"{prompt.split(':')[0]} heard {prompt.count('|')}" for prompt in prompts]


class Keeper(StandIn):
    """Keeps the pictures that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, bytes] = {}

    def prompt(self, text: str, pictures: tuple[Any, ...], name: str) -> str:
        (self.shown[name],) = pictures
        return name


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., StandIn]:
    write_coco(tmp_path / "coco/annotations/captions_val2014.json", {image: ["a"] for image in IMAGES})
    write_pictures(tmp_path / "coco/val2014", IMAGES)

    def call(
        out: Path, model: StandIn | None = None, checkpoint: str = "one", task: str = "captions", **changes: Any
    ) -> StandIn:
        model = model or StandIn()
        monkeypatch.setattr(speaker, "load", lambda folder, **options: model)
        monkeypatch.setattr(speaker, "check", lambda config, folder: None)
        monkeypatch.setattr(speaker, "identity", lambda folder: folder.name * 30)
        settings = {"evaluation": {"batch_size": BATCH} | changes}
        config = write_config(tmp_path / "config.yaml", **settings)
        source = tmp_path / (task if task in ("mmmu", "pope") else "coco")
        tasks.generate(config, Path(checkpoint), task, source, out)
        return model

    return call


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_in_the_order_of_the_task_and_score(run: Callable[..., StandIn], tmp_path: Path) -> None:
    out = tmp_path / "new/captions.jsonl"
    model = run(out)
    assert [line["id"] for line in lines(out)] == IMAGES
    assert captions.read_predictions(out) == {image: f"a – {image} of 40" for image in IMAGES}
    assert [len(batch) for batch in model.batches] == [3, 3, 1]
    lengths = [[int(name) % 3 for name in batch] for batch in model.batches]
    assert lengths == [[1, 1, 1], [1, 0, 0], [0]]  # longest first
    assert sorted(path.name for path in out.parent.iterdir()) == ["captions.jsonl"]
    first = lines(out)[0]
    assert {"id", "image", "prompt", "response", "image_id", "checkpoint", "settings"} == set(first)


@pytest.mark.parametrize("torn", [0, 1, 25], ids=["whole-lines", "only-the-newline", "half-a-line"])
def test_an_interrupted_file_is_continued_as_if_undisturbed(
    run: Callable[..., StandIn], tmp_path: Path, torn: int
) -> None:
    run(tmp_path / "undisturbed.jsonl")
    out = tmp_path / "captions.jsonl"
    with pytest.raises(KilledError):
        run(out, StandIn(dies_at=2))
    partial = tmp_path / "captions.jsonl.partial"
    assert not out.exists() and len(lines(partial)) == 6
    content = partial.read_bytes()
    partial.write_bytes(content[: len(content) - torn])
    before = partial.read_bytes().rpartition(b"\n")[0]
    if torn:  # killed a second time, after the torn answer is there again
        with pytest.raises(KilledError):
            run(out, StandIn(dies_at=1))
        assert len(lines(partial)) == 6
    assert len(run(out).batches) == 1
    assert out.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
    assert all(line in out.read_bytes() for line in before.split(b"\n"))
    assert not partial.exists()


def test_a_finished_file_is_kept_and_a_cut_one_completed(run: Callable[..., StandIn], tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    run(out)
    content = out.read_bytes()
    assert run(out, StandIn(dies_at=0)).batches == []  # nothing is asked again
    out.write_bytes(content[: len(content) // 2])
    assert run(out).batches
    assert out.read_bytes() == content


@pytest.mark.parametrize(
    "other",
    [
        {"checkpoint": "two"},
        {"captions": {"prompt": "Else?"}},
        {"captions": {"max_new_tokens": 3}},
        {"task": "captions_shuffled"},
    ],
    ids=["checkpoint", "prompt", "length", "task"],
)
def test_answers_that_something_else_made_are_moved_aside(
    run: Callable[..., StandIn], tmp_path: Path, other: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "captions.jsonl"
    with pytest.raises(KilledError):
        run(out, StandIn(dies_at=1))
    before = (tmp_path / "captions.jsonl.partial").read_bytes()
    run(out, **other)
    assert len(lines(out)) == len(IMAGES)
    assert len({(line["checkpoint"], line["settings"]) for line in lines(out)}) == 1
    (aside,) = set(tmp_path.glob("captions.jsonl.partial.*"))
    assert aside.read_bytes() == before
    assert str(aside) in capsys.readouterr().err


def test_another_batch_size_goes_on_with_the_same_file(run: Callable[..., StandIn], tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    with pytest.raises(KilledError):
        run(out, StandIn(dies_at=1))
    run(out, batch_size=2)
    assert len(lines(out)) == len(IMAGES)
    assert not set(tmp_path.glob("captions.jsonl.partial*"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("<html>", "line 1 is not a generated answer"),
        ("[]", "line 1 is not"),
        ('{"id": 99}', "line 1 is not"),
    ],
    ids=["no-json", "no-object", "other-tool"],
)
def test_a_file_that_is_none_is_refused(run: Callable[..., StandIn], tmp_path: Path, line: str, message: str) -> None:
    out = tmp_path / "captions.jsonl"
    out.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        run(out)
    assert out.read_text() == line + "\n"


DIALOGUE = {"num_images": 5, "questions": ["What?", "Where?", "Why?"]}


def test_each_question_of_a_dialogue_is_asked_with_the_answers_before_it(
    run: Callable[..., StandIn], tmp_path: Path
) -> None:
    out = tmp_path / "dialogue.jsonl"
    model = run(out, Talker(), task="dialogue", dialogue=DIALOGUE)
    assert [line["id"] for line in lines(out)] == IMAGES[:5]
    assert [len(batch) for batch in model.batches] == [3, 3, 3, 2, 2, 2]  # all turns of a batch before the next batch
    assert [batch[0] for batch in model.batches[:3]] == [
        "4: | <image>\nWhat?",
        "4: | <image>\nWhat? | 4 heard 1 | Where?",
        "4: | <image>\nWhat? | 4 heard 1 | Where? | 4 heard 3 | Why?",
    ]
    for line in lines(out):
        name = line["id"]
        assert set(line) == {"id", "image", "conversation", "checkpoint", "settings"}
        assert [turn["from"] for turn in line["conversation"]] == ["human", "gpt"] * 3
        assert [turn["value"] for turn in line["conversation"]] == [
            *("<image>\nWhat?", f"{name} heard 1"),
            *("Where?", f"{name} heard 3"),
            *("Why?", f"{name} heard 5"),
        ]


def test_an_interrupted_dialogue_is_continued_as_if_undisturbed(run: Callable[..., StandIn], tmp_path: Path) -> None:
    run(tmp_path / "undisturbed.jsonl", Talker(), task="dialogue", dialogue=DIALOGUE)
    out = tmp_path / "dialogue.jsonl"
    with pytest.raises(KilledError):
        run(out, Talker(dies_at=4), task="dialogue", dialogue=DIALOGUE)  # between two turns of the second batch
    assert len(lines(tmp_path / "dialogue.jsonl.partial")) == 3
    assert len(run(out, Talker(), task="dialogue", dialogue=DIALOGUE).batches) == 3
    assert out.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
    other = DIALOGUE | {"questions": ["What?", "Where?", "Who?"]}
    run(out, Talker(), task="dialogue", dialogue=other)
    assert {line["conversation"][4]["value"] for line in lines(out)} == {"Who?"}


def test_mmmu_lines_score_as_they_are(run: Callable[..., StandIn], tmp_path: Path) -> None:
    rows = [mmmu_row(f"validation_Shapes_{n}", f"What {n}?", ["of 4", "x"], images=1) for n in range(5)]
    rows += [mmmu_row("validation_Shapes_9", "Count <image 1>", [], images=1, answer="4")]
    answers = write_mmmu(tmp_path / "mmmu", {"Shapes": rows})
    run(tmp_path / "mmmu.jsonl", task="mmmu")
    mmmu.score(answers, tmp_path / "mmmu.jsonl", tmp_path / "score.json", fallback="wrong")
    score = json.loads((tmp_path / "score.json").read_text())
    # "a – <id> of 4" is five words, too short to look for an option's text, and ends in the number 4.
    assert (score["num_fallback"], score["num_correct"], score["num_questions"]) == (5, 1, 6)


def test_a_benchmark_is_asked_part_by_part_and_scores_as_it_is(run: Callable[..., StandIn], tmp_path: Path) -> None:
    rows = [
        benchmark_rows("pope")[0] | {"question_id": str(n), "question": "Why? " * (n + 1), "category": "random"}
        for n in range(5)
    ]
    write_benchmark(tmp_path / "pope", "pope", rows, row_group_size=3)
    out, section = tmp_path / "pope.jsonl", overlay("benchmarks")["evaluation"]["pope"]
    model = run(out, Keeper(), task="pope", pope=section)
    assert [line["id"] for line in lines(out)] == [f"random_{n}" for n in range(5)]
    # Longest first in each row group, although the longest of all are in the second.
    assert model.batches == [["random_2", "random_1", "random_0"], ["random_4", "random_3"]]
    assert model.shown == {f"random_{n}": row["image"]["bytes"] for n, row in enumerate(rows)}
    answers.score("pope", [tmp_path / "pope"], [out], tmp_path / "score.json")
    assert json.loads((tmp_path / "score.json").read_text())["num_items"] == 5
