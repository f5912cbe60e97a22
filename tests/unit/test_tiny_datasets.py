"""The rendered data sets are what the commands that read the real ones expect, and keep the test to themselves."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import data_fixtures as fixtures
import numpy as np
import pytest
import yaml
from PIL import Image
from pyarrow import parquet

from vlm import coco, mmmu
from vlm import config as settings
from vlm.data.index import index
from vlm.data.shard import shard
from vlm.generate import items
from vlm.loader import build
from vlm.tiny import datasets, scenes, text, world

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"pretrain_samples": 60, "sft_samples": 120, "test_images": 20, "questions_per_subject": 12}
PRETRAIN = "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
SFT = "LLaVA-Instruct-150K/llava_v1_5_mix665k.json"
WORDS = {"Colour": scenes.COLOURS, "Shape": scenes.SHAPES, "Background": scenes.BACKGROUNDS, "Counting": "123"}
"""Answers of open questions."""
MMMU_COLUMNS = [
    *("id", "question", "options", "explanation", *(f"image_{number}" for number in range(1, 8))),
    *("img_type", "answer", "topic_difficulty", "question_type", "subfield"),
]


def _config(path: Path, **changes: Any) -> Path:
    tree = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    fixtures._merge(tree, yaml.safe_load((ROOT / "config/tiny.yaml").read_text()))
    tree["miniature"] = SIZES
    tree.update(changes)
    path.write_text(settings.dump(settings.validate(tree)))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    datasets.write(_config(folder / "config.yaml"), folder / "sources")
    return folder


def _records(made: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((made / "sources" / name).read_text())


def _paths(record: dict[str, Any]) -> list[str]:
    image = record.get("image", [])
    return image if isinstance(image, list) else [image]


def _pixels(picture: Image.Image) -> np.ndarray:
    assert picture.size == (scenes.CANVAS, scenes.CANVAS) and picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize(("name", "count"), [(PRETRAIN, 60), (SFT, 120)], ids=["captions", "conversations"])
def test_every_record_has_its_pictures_and_every_picture_its_record(made: Path, name: str, count: int) -> None:
    records, folder = _records(made, name), (made / "sources" / name).parent / "images"
    named = [path for record in records for path in _paths(record)]
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.jpg")}
    assert len(records) == count and len(set(named)) == len(named) and found == set(named)
    for path in named[:5]:
        with Image.open(folder / path) as picture:
            assert picture.format == "JPEG" and _pixels(picture).std() > 5


def test_captions_are_asked_as_in_the_real_set(made: Path) -> None:
    places = Counter()
    for record in _records(made, PRETRAIN):
        human, gpt = record["conversations"]
        before, after = human["value"].split("\n")
        places[before == "<image>"] += 1
        assert (after if before == "<image>" else before) in text.INSTRUCTIONS
        assert (human["from"], gpt["from"]) == ("human", "gpt")
    assert places[True] > 4 * places[False] > 0


def test_conversations_have_none_one_or_two_pictures(made: Path) -> None:
    kinds = Counter()
    for record in _records(made, SFT):
        kinds[len(_paths(record))] += 1
        asked = record["conversations"][0]["value"]
        assert asked.startswith("<image>\n" * len(_paths(record)))
        assert sum(turn["value"].count("<image>") for turn in record["conversations"]) == len(_paths(record))
        assert ("Which picture" in asked) == (len(_paths(record)) == 2)
    assert min(kinds[number] for number in (0, 1, 2)) > 0 and kinds[1] > kinds[0] + kinds[2]


def test_conversations_teach_the_prompts_of_the_evaluation(made: Path) -> None:
    config = settings.load(made / "config.yaml")
    said = [turn["value"] for record in _records(made, SFT) for turn in record["conversations"]]
    assert any(config.evaluation.captions.prompt in one for one in said)
    for template in (config.evaluation.mmmu.prompt_multiple_choice, config.evaluation.mmmu.prompt_open):
        assert sum(one.endswith(template.rsplit("}", 1)[1]) for one in said) > 20


def test_the_base_model_learnt_the_prompts_of_the_configuration(made: Path) -> None:
    test = settings.load(made / "config.yaml").evaluation
    assert test.captions.prompt == text.CAPTION_PROMPT
    assert test.mmmu.prompt_multiple_choice == text.CHOICE_PROMPT
    assert test.mmmu.prompt_open == text.OPEN_PROMPT


def test_training_texts_never_name_a_held_out_pair(made: Path) -> None:
    for name in (PRETRAIN, SFT):
        for record in _records(made, name):
            assert not any(world.SHAPES.names_held_out(turn["value"]) for turn in record["conversations"]), record["id"]


def test_training_scenes_and_wrong_options_hold_no_held_out_pair(made: Path) -> None:
    config, rng = settings.load(made / "config.yaml"), random.Random(0)
    for _ in range(400):
        shown, turns = datasets.conversation(rng, config)
        assert not any(scenes.held_out(scene) for scene in shown)
        assert not any(world.SHAPES.names_held_out(part) for turn in turns for part in turn)


def test_half_of_the_test_pictures_show_a_held_out_pair(made: Path) -> None:
    references = coco.read_references(made / "sources/coco/annotations/captions_val2014.json")
    assert len(references) == 20 and all(len(set(texts)) == 5 for texts in references.values())
    assert sum(world.SHAPES.names_held_out(texts[0]) for texts in references.values()) == 10
    pictures = coco.read_pictures(
        made / "sources/coco/annotations/captions_val2014.json", made / "sources/coco/val2014"
    )
    assert all(path.is_file() and path.name.startswith("COCO_val2014_0000") for path in pictures.values())


def test_no_test_scene_is_drawn_twice_or_from_training() -> None:
    training = {scenes.sample(random.Random(seed)) for seed in range(300)}
    seen = set(training)
    drawn = [datasets._unseen(random.Random(seed), world.SHAPES, False, seen) for seed in range(300)]
    assert not training & set(drawn) and len(set(drawn)) == 300 and set(drawn) <= seen


@pytest.mark.parametrize("subject", text.SUBJECTS)
def test_every_subject_has_its_table_with_answers_that_can_be_given(made: Path, subject: str) -> None:
    table = parquet.read_table(made / f"sources/MMMU/{subject}/validation-00000-of-00001.parquet")
    assert table.column_names == MMMU_COLUMNS
    answers = json.loads((made / "sources/MMMU/answer_dict_val.json").read_text())
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == [f"validation_{subject}_{number}" for number in range(1, 13)]
    for row in rows:
        kind = {"multiple-choice": 4, "open": 0}[row["question_type"]]
        options = mmmu.parse_options(row["options"], row["id"])
        assert len(set(options)) == len(options) == kind
        assert row["answer"] in (list("ABCD") if kind else WORDS[subject])
        assert answers[row["id"]] == {"question_type": row["question_type"], "ground_truth": row["answer"]}
        shown = [row[f"image_{number}"] for number in range(1, 8) if row[f"image_{number}"]]
        assert len(shown) == 1 + (subject == "Comparison")
        assert row["question"].count("<image ") == len(shown)


def test_generation_reads_all_items(made: Path) -> None:
    config = settings.load(made / "config.yaml")
    assert len(items.read_captions(config, made / "sources/coco")) == 20
    asked = items.read_mmmu(config, made / "sources/MMMU")
    assert len(asked) == 12 * len(text.SUBJECTS)
    both = [item for item in asked if "Comparison" in str(item.id)]
    assert all(item.prompt.startswith("<image>\n<image>\nWhich picture") and len(item.pictures) == 2 for item in both)


def test_answers_come_equally_often() -> None:
    rng = random.Random(3)
    for subject, number in world.SHAPES.num_answers.items():
        counts = Counter(one.answer for one in datasets.questions(rng, world.SHAPES, subject, 5 * number, set()))
        assert set(counts.values()) == {5} and len(counts) == number, subject


def _most_like_the_others(options: tuple[str, ...]) -> list[str]:
    """The options that share most words with the rest, at their places."""
    split = [option.split() for option in options]
    shared = [sum(a == b for other in split for a, b in zip(words, other, strict=False)) for words in split]
    return [option for option, count in zip(options, shared, strict=True) if count == max(shared)]


def _with_their_inverse(options: tuple[str, ...]) -> list[str]:
    return [option for option in options if scenes.INVERSE[option] in options]


@pytest.mark.parametrize(
    ("subject", "favoured"),
    [("Objects", _most_like_the_others), ("Position", _with_their_inverse)],
    ids=["objects-central-option", "position-paired-option"],
)
def test_options_alone_do_not_tell_the_answer(subject: str, favoured: Any) -> None:
    rng = random.Random(5)
    asked = datasets.questions(rng, world.SHAPES, subject, 600, set())
    right = sum(rng.choice(favoured(one.options) or list(one.options)) == one.answer for one in asked)
    assert 0.18 < right / len(asked) < 0.32  # a quarter, give or take four standard errors


def test_conversations_with_two_pictures_reach_the_trainer_in_order(
    made: Path, tiny_language_dir: Path, tiny_vision_dir: Path
) -> None:
    out = made / "data/sft"
    shard(made / "config.yaml", "sft", made / "sources/LLaVA-Instruct-150K", out)
    index(out)
    assert json.loads((out / "rejected.json").read_text())["num_rejected"] == 0
    records = _records(made, SFT)
    config = settings.load(_config(made / "small.yaml"))
    loader = build(config, "sft", {"sft": out}, tiny_language_dir, tiny_vision_dir, 0, 1)
    compared = Counter()
    for batch in islice(loader, 25):
        pictures = iter(batch.images.numpy())
        for key in batch.sample_keys:
            paths = _paths(records[int(key.split("/")[1])])
            compared[len(paths)] += 1
            for path in paths:
                with Image.open(made / "sources/LLaVA-Instruct-150K/images" / path) as picture:
                    assert (next(pictures).transpose(1, 2, 0) == _pixels(picture)).all()
        assert next(pictures, None) is None
    loader.close()
    assert min(compared[number] for number in (0, 1, 2)) > 0


def test_same_settings_same_bytes_in_place_of_the_old_ones(made: Path, tmp_path: Path) -> None:
    (tmp_path / "coco/val2014").mkdir(parents=True)
    (tmp_path / "coco/val2014/left_from_before.jpg").write_bytes(b"")
    (tmp_path / ".MMMU.writing").mkdir()  # left by a killed run
    datasets.write(made / "config.yaml", tmp_path)
    assert _hashes(tmp_path) == _hashes(made / "sources")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_seed_decides(made: Path, tmp_path: Path) -> None:
    datasets.write(_config(tmp_path / "config.yaml", seed=5), tmp_path / "sources")
    one, other = _hashes(made / "sources"), _hashes(tmp_path / "sources")
    assert one.keys() & other.keys() and not [name for name in one if one[name] == other.get(name)]


def _hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_full_recipe_is_not_rendered(tmp_path: Path) -> None:
    config = _config(tmp_path / "config.yaml", miniature=None)
    with pytest.raises(ValueError, match="miniature is not set"):
        datasets.write(config, tmp_path)
