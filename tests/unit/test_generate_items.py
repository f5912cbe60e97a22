"""What is asked: captions, captions with shuffled pictures, and MMMU's questions with their pictures in place."""

from __future__ import annotations

import random
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

from vlm import config as configuration
from vlm.benchmarks import BENCHMARKS, read_to_score
from vlm.generate import items
from vlm.tiny import datasets

IMAGES = [4, 1, 9, 12, 7]


@pytest.fixture
def settings(tmp_path: Path) -> configuration.Config:
    return configuration.load(write_config(tmp_path / "config.yaml"))


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    write_coco(tmp_path / "coco/annotations/captions_val2014.json", {image: ["a"] for image in IMAGES})
    write_pictures(tmp_path / "coco/val2014", IMAGES)
    return tmp_path / "coco"


def test_captions(settings: configuration.Config, coco: Path) -> None:
    read = items.read_captions(settings, coco)
    assert [item.id for item in read] == [item.record["image_id"] for item in read] == IMAGES
    assert read[0].prompt == f"<image>\n{settings.evaluation.captions.prompt}"
    assert read[0].image == "COCO_val2014_000000000004.jpg"
    assert read[0].pictures == (coco / "val2014" / read[0].image,)
    (coco / "val2014" / read[2].image).unlink()
    with pytest.raises(ValueError, match=r"1 of 5 pictures are missing, first .*000000000009\.jpg"):
        items.read_captions(settings, coco)


def test_the_karpathy_file_lists_ids_alone(settings: configuration.Config, coco: Path) -> None:
    path = coco / "annotations/captions_val2014.json"
    path.write_text(path.read_text().replace('"file_name"', '"other"'))
    assert items.read_captions(settings, coco)[1].image == "COCO_val2014_000000000001.jpg"


def test_shuffled_pictures_are_a_derangement_by_seed(
    settings: configuration.Config, coco: Path, tmp_path: Path
) -> None:
    orders = set()
    for seed in range(12):
        seeded = configuration.load(write_config(tmp_path / "config.yaml", seed=seed))
        plain, shuffled = items.read_captions(seeded, coco), items.read_captions_shuffled(seeded, coco)
        assert [item.id for item in shuffled] == [item.id for item in plain]
        assert [item.record for item in shuffled] == [item.record for item in plain]
        assert all(one.pictures != other.pictures for one, other in zip(plain, shuffled, strict=True))
        assert {item.pictures for item in shuffled} == {item.pictures for item in plain}
        assert items.read_captions_shuffled(seeded, coco) == shuffled
        orders.add(tuple(str(item.image) for item in shuffled))
    assert len(orders) > 6


def test_a_dialogue_is_about_the_first_pictures(coco: Path, tmp_path: Path) -> None:
    dialogue = {"num_images": 3, "questions": ["What?", "Where?", "Why?"]}
    changed = configuration.load(write_config(tmp_path / "config.yaml", evaluation={"dialogue": dialogue}))
    read = items.read_dialogue(changed, coco)
    captions = items.read_captions(changed, coco)[:3]
    assert [(item.id, item.image, item.pictures) for item in read] == [
        (item.id, item.image, item.pictures) for item in captions
    ]
    assert {(item.prompt, item.follow_ups) for item in read} == {("<image>\nWhat?", ("Where?", "Why?"))}


def test_the_miniature_is_asked_what_it_has_learnt(settings: configuration.Config) -> None:
    rng, learnt = random.Random(0), set()
    for _ in range(2000):
        learnt |= {question for question, _ in datasets.conversation(rng, settings)[1]}
    assert set(settings.evaluation.dialogue.questions) <= learnt


def mmmu(settings: configuration.Config, folder: Path, *rows: dict[str, Any]) -> list[items.Item]:
    write_mmmu(folder, {"Shapes": list(rows)})
    return items.read_mmmu(settings, folder)


def test_mmmu_prompts(settings: configuration.Config, tmp_path: Path) -> None:
    choice = mmmu_row("validation_Shapes_1", "Which of <image 2> and <image 1>?", ["the {left}", "<image 2>"], images=2)
    open_one = mmmu_row("validation_Shapes_2", " How many? ", [], images=1, answer="3")
    first, second = mmmu(settings, tmp_path, choice, open_one)
    pictures = [choice[f"image_{n}"]["bytes"] for n in (1, 2)]
    assert first.prompt == ("Which of <image> and <image>?\n(A) the {left}\n(B) <image>\nAnswer with the letter.")
    assert first.pictures == (pictures[1], pictures[0], pictures[1])
    assert first.image == ["2.png", "1.png", "2.png"]
    assert first.record == {
        "question_type": "multiple-choice",
        "all_choices": ["A", "B"],
        "index2ans": {"A": "the {left}", "B": "<image 2>"},
        "answer": "A",
    }
    assert second.prompt == "<image>\nHow many?\nAnswer with one word."
    assert second.record == {"question_type": "open", "answer": "3"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            mmmu_row("v_S_1", "See <image 2>", ["a", "b"], images=1),
            "v_S_1: <image 2> stands in the text, but image_2 is",
        ),
        (mmmu_row("v_S_1", "What?", ["a"], images=1) | {"question_type": "multiple-choice"}, "with 1 options"),
        (mmmu_row("v_S_1", "What?", ["a", "b"], images=1) | {"options": "[a"}, "options are not a list"),
    ],
    ids=["no-picture", "one-option", "options"],
)
def test_mmmu_questions_that_do_not_fit_are_refused(
    settings: configuration.Config, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mmmu(settings, tmp_path, row)


def test_mmmu_files_that_are_none_are_refused(settings: configuration.Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no <Subject>/validation-\*\.parquet"):
        items.read_mmmu(settings, tmp_path)
    row = mmmu_row("validation_Shapes_1", "What?", ["a", "b"], images=1)
    with pytest.raises(ValueError, match="1 ids occur more than once, first validation_Shapes_1"):
        mmmu(settings, tmp_path, row, row)
    with pytest.raises(ValueError, match="columns options are missing"):
        mmmu(settings, tmp_path, {key: value for key, value in row.items() if key != "options"})
    path = tmp_path / "Shapes/validation-00000-of-00001.parquet"
    path.rename(path.with_name("validation-00000-of-00003.parquet"))
    with pytest.raises(ValueError, match=r"Shapes: 2 of the 3 files validation-\* are missing, first number 1"):
        items.read_mmmu(settings, tmp_path)
    path.with_name("validation-00000-of-00003.parquet").unlink()
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="not a parquet file"):
        items.read_mmmu(settings, tmp_path)


def test_a_template_that_cannot_be_filled_is_refused_by_key(tmp_path: Path) -> None:
    changes = {"mmmu": {"prompt_open": "{query}"}}
    seeded = configuration.load(write_config(tmp_path / "config.yaml", evaluation=changes))
    with pytest.raises(ValueError, match=r"evaluation\.mmmu\.prompt_open: cannot be filled"):
        mmmu(seeded, tmp_path, mmmu_row("validation_Shapes_2", "What?", [], images=1))


def benchmark(folder: Path, name: str, rows: list[dict[str, Any]] | None = None, **changes: Any) -> list[items.Item]:
    section = overlay("benchmarks")["evaluation"][name] | changes
    settings = configuration.load(write_config(folder / "config.yaml", evaluation={name: section}))
    return items.TASKS[name].read(settings, write_benchmark(folder / name, name, rows))


PROMPTS = {
    "vqav2": "What is it?\nAnswer the question using a single word or phrase.",
    "textvqa": "What is it?\nAnswer the question using a single word, phrase, or number.",
    "chartqa": "What is it?\nAnswer the question using a single word or phrase.",
    "ai2d": "What is it?\nA. leaf\nB. root\nC. stem\nAnswer with the option's letter from the given choices directly.",
    "realworldqa": "Which way?\nA. Left\nB. Right\nAnswer with the letter.",
    "docvqa": "What is it?\nAnswer the question using a single word, phrase, or number.",
    "infovqa": "What is it?\nAnswer the question using a single word, phrase, or number.",
    "mathvista": "What is it?\nA. 3/11\nB. 8/11\nAnswer with the option's letter from the given choices directly.",
    "ocrbench": "What is it?",
    "pope": "What is it?\nAnswer the question using a single word or phrase.",
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_are_asked_as_the_reference_asks(tmp_path: Path, name: str) -> None:
    read = benchmark(tmp_path, name)
    assert read[0].prompt == f"<image>\n{PROMPTS[name]}"
    assert [item.id for item in read] == list(read_to_score([tmp_path / name], name, BENCHMARKS[name].split))
    assert [item.opened() for item in read] == [[row[BENCHMARKS[name].image]["bytes"]] for row in benchmark_rows(name)]
    assert [item.part for item in read] == [0, 0, 1]  # row groups of two
    assert len({item.image for item in read}) == 3 and not any(item.record for item in read)


def test_mathvista_asks_for_the_kind_of_answer(tmp_path: Path) -> None:
    assert benchmark(tmp_path, "mathvista")[1].prompt == "<image>\nBe short.\nQuestion: How many?"


def test_questions_of_several_files_are_numbered_on(tmp_path: Path) -> None:
    rows = benchmark_rows("ai2d")
    for number, part in enumerate((rows[:2], rows[2:])):
        write_benchmark(tmp_path / "ai2d", "ai2d", part)
        path = tmp_path / "ai2d/data/test-00000-of-00001.parquet"
        path.rename(path.with_name(f"test-0000{number}-of-00002-1a2b3c.parquet"))
    section = overlay("benchmarks")["evaluation"]["ai2d"]
    chosen = configuration.load(write_config(tmp_path / "config.yaml", evaluation={"ai2d": section}))
    read = items.TASKS["ai2d"].read(chosen, tmp_path / "ai2d")
    assert [(item.id, item.part) for item in read] == [("0", 0), ("1", 0), ("2", 1)]
    (tmp_path / "ai2d/data/test-00000-of-00002-1a2b3c.parquet").unlink()
    for reads in (lambda: items.TASKS["ai2d"].read(chosen, tmp_path / "ai2d"), lambda: scored(tmp_path / "ai2d")):
        with pytest.raises(ValueError, match=r"data: 1 of the 2 files test-\* are missing, first number 0"):
            reads()


def scored(source: Path) -> object:
    return read_to_score([source], "ai2d", "test")


def test_benchmarks_that_cannot_be_asked_are_refused(settings: configuration.Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.pope: is not set"):
        items.TASKS["pope"].settings(settings)
    with pytest.raises(ValueError, match=r"evaluation\.pope\.prompt: cannot be filled \('text'\), allowed are"):
        benchmark(tmp_path, "pope", prompt="{text}")
    rows = [{key: value for key, value in row.items() if key != "image"} for row in benchmark_rows("pope")]
    with pytest.raises(ValueError, match="columns image are missing, is it POPE's"):
        benchmark(tmp_path, "pope", rows)
    with pytest.raises(ValueError, match=r"holds no data/dev-\*\.parquet \(evaluation\.pope\.split\)"):
        benchmark(tmp_path, "pope", split="dev")
    rows = benchmark_rows("pope")
    with pytest.raises(ValueError, match="1 ids occur more than once, first popular_0"):
        benchmark(tmp_path, "pope", [*rows, rows[0]])
    rows[2] |= {"image": None}
    with pytest.raises(ValueError, match="row 0 of row group 1 has no `image`"):
        benchmark(tmp_path, "pope", rows)[2].opened()
    options = [benchmark_rows("ai2d")[0] | {"options": [str(n) for n in range(27)]}]
    with pytest.raises(ValueError, match="question 0 has 27 options"):
        benchmark(tmp_path, "ai2d", options)
