"""Emoji scenes show what their texts say, and keep the held-out pairs and the held-out style to the test."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import emoji_fixtures as drawings
import pytest
import torch
import yaml
from data_fixtures import _merge
from pyarrow import parquet

from vlm import coco
from vlm import config as settings
from vlm.config import Miniature
from vlm.tiny import datasets, emoji, scenes, stamps, text, world
from vlm.tiny.emoji import Emoji

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"pretrain_samples": 40, "sft_samples": 60, "test_images": 12, "questions_per_subject": 6}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawings.write_stamps(tmp_path_factory.mktemp("emoji"))


@pytest.fixture(scope="module")
def shown(made: Path) -> Emoji:
    return Emoji(made)


def _pairs(scene: Any) -> set[tuple[str, str]]:
    nouns = [thing.noun for thing in scene.things]
    return {(a, b) for a in nouns for b in nouns if a < b}


def test_stamps_are_the_names_that_captions_can_say_in_every_style(made: Path) -> None:
    loaded = stamps.load(made)
    assert loaded.nouns == drawings.NOUNS and set(loaded.styles) == set(drawings.STYLES)
    assert loaded.groups[3] == "activities" and loaded.subgroups[3] == "kind-6"
    rows = parquet.read_table(made).to_pylist()
    assert {row["style"]: row["licence"] for row in rows} == stamps.STYLES


def test_every_stamp_is_its_drawing_in_the_middle_of_a_square(made: Path) -> None:
    loaded = stamps.load(made)
    assert loaded.pixels.shape == (10, 4, 4, stamps.SIZE, stamps.SIZE)
    middle = stamps.SIZE // 2
    for concept, noun in enumerate(loaded.nouns):
        for style, name in enumerate(loaded.styles):
            assert tuple(loaded.pixels[concept, style, :, middle, middle].tolist()) == (
                *drawings.colour(noun, name),
                255,
            )
    opaque = (loaded.pixels[loaded.nouns.index("camera"), 0, 3] > 127).sum(0)
    assert opaque.unique().tolist() == [stamps.SIZE // 2]


def test_what_is_not_there_is_named(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="openmoji/chars.json: there is no such file"):
        packages = drawings.write_packages(tmp_path / "node_modules")
        (packages / "@iconify-json/openmoji/chars.json").unlink()
        stamps.prepare(packages, tmp_path / "out.parquet")
    with pytest.raises(ValueError, match="miniature.stamps: there is no .*; `vlm tiny stamps` makes it"):
        stamps.load(tmp_path / "out.parquet")
    table = parquet.read_table(made)
    parquet.write_table(table.slice(1), tmp_path / "lost.parquet")
    with pytest.raises(ValueError, match="'anchor' is not drawn in all of"):
        stamps.load(tmp_path / "lost.parquet")
    parquet.write_table(table.drop(["png"]), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="has the columns name, group"):
        stamps.load(tmp_path / "other.parquet")


def test_training_scenes_hold_no_held_out_pair_and_no_unseen_art(shown: Emoji) -> None:
    rng = random.Random(0)
    counts, styles = Counter(), Counter()
    for _ in range(500):
        scene = shown.sample(rng)
        assert not any(emoji.is_held_out(*pair) for pair in _pairs(scene))
        counts[len(scene.things)] += 1
        styles.update(thing.style for thing in scene.things)
        assert any(emoji.is_held_out(*pair) for pair in _pairs(shown.sample(rng, held_out=True)))
    assert set(counts) == {1, 2, 3} and counts[2] > counts[1] + counts[3]
    assert set(styles) == {index for index, name in enumerate(shown.stamps.styles) if name != emoji.UNSEEN_STYLE}


def test_every_thing_is_drawn_where_its_scene_has_it(shown: Emoji) -> None:
    rng = random.Random(1)
    drawn = [shown.sample(rng) for _ in range(40)]
    pictures = shown.render(drawn, seed=3).float()
    assert pictures.shape == (40, 3, shown.canvas, shown.canvas)
    for scene, picture in zip(drawn, pictures, strict=True):
        ground = scenes.background(scene.background, shown.canvas, "cpu")
        free = torch.ones(shown.canvas, shown.canvas, dtype=torch.bool)
        for thing in scene.things:
            red, green, blue = drawings.colour(thing.noun, shown.stamps.styles[thing.style])
            found = picture[:, int(thing.y) - 2 : int(thing.y) + 3, int(thing.x) - 2 : int(thing.x) + 3].mean((1, 2))
            light = found[2].item() / blue  # the same for all three
            assert 0.6 < light < 1.5
            assert abs(found[0].item() - red * light) < 8 and abs(found[1].item() - green * light) < 8
            reach = int(1.25 * thing.radius) + 2  # corners of a turned square
            top, left = max(int(thing.y) - reach, 0), max(int(thing.x) - reach, 0)
            free[top : int(thing.y) + reach, left : int(thing.x) + reach] = False
        assert (picture - ground).abs().amax(0)[free].max() < 20
    again = shown.render(drawn, seed=3).float()
    assert (pictures == again).all() and not (pictures == shown.render(drawn, seed=4).float()).all()


def test_a_large_thing_covers_what_its_radius_says(shown: Emoji) -> None:
    for size, (low, high) in emoji.SIZES.items():
        thing = emoji.Sticker("dog", 3, 0, size, 84.0, 84.0, (low + high) / 2, emoji.TURN)
        picture = shown.render([scenes.Scene((thing,), "black")], 0)[0].float()
        covered = (picture[2] > 70).sum().item()
        assert abs(covered / (2 * thing.radius) ** 2 - 1) < 0.05, size


def test_cells_name_what_lies_on_them(shown: Emoji) -> None:
    rng = random.Random(2)
    for _ in range(50):
        scene = shown.sample(rng)
        cells = shown.cells(scene)
        assert len(cells) == (shown.canvas // shown.cell) ** 2 and set(cells) <= set(shown.phrases)
        for thing in scene.things:
            place = int(thing.y // shown.cell) * (shown.canvas // shown.cell) + int(thing.x // shown.cell)
            assert cells[place] == thing.name
        assert f"{scene.background} background" in cells


@pytest.mark.parametrize("subject", Emoji.subjects)
def test_answers_are_true_and_options_tell_them_apart(shown: Emoji, subject: str) -> None:
    rng, answers = random.Random(3), Counter()
    while answers.total() < 120:
        asked = shown.question(rng, subject, shown.sample(rng), shown.sample(rng))
        if asked is None:
            continue
        answers[asked.answer] += 1
        assert len(set(asked.options)) == len(asked.options)
        assert not asked.options or asked.answer in asked.options
        nouns = [thing.noun for thing in asked.scenes[0].things]
        if subject in ("Objects", "Unseen art"):
            assert [option for option in asked.options if option in nouns] == [asked.answer]
        if subject == "Neighbours":
            other = nouns[1 - nouns.index(asked.answer)]
            relation = asked.scenes[0].relation(nouns.index(asked.answer), nouns.index(other))
            assert asked.text == f"What is {relation} the {other}?"
            assert not asked.options or other in asked.options
        if subject == "Comparison":
            wanted = asked.text.removeprefix("Which picture has a ").removesuffix("?")
            there = [wanted in [thing.noun for thing in scene.things] for scene in asked.scenes]
            if not all(there):
                assert asked.answer == {(True, False): "only 1", (False, True): "only 2"}.get(tuple(there), "none")
    assert len(answers) >= shown.num_answers.get(subject, 5)


def test_unseen_art_is_drawn_in_the_style_of_no_other_picture(shown: Emoji) -> None:
    asked = shown.question(random.Random(4), "Unseen art", shown.sample(random.Random(5)))
    assert asked and {thing.style for thing in asked.scenes[0].things} == {shown.unseen_style}
    assert "Unseen art" not in shown.taught


def test_small_things_come_from_a_stamp_of_half_the_width(shown: Emoji) -> None:
    """Sampled from the large one, every second of its pixels would be skipped."""
    large, small = shown._level("large", "cpu"), shown._level("small", "cpu")
    assert small.shape[-1] * 2 == large.shape[-1]
    assert (small == large[..., ::2, ::2]).all()  # of plain rectangles at even places


def _config(path: Path, made: Path) -> Path:
    tree = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    _merge(tree, yaml.safe_load((ROOT / "config/small.yaml").read_text()))
    tree["miniature"] |= SIZES | {"stamps": str(made)}
    path.write_text(settings.dump(settings.validate(tree)))
    return path


def test_the_data_sets_are_those_of_the_emoji(made: Path, tmp_path: Path) -> None:
    datasets.write(_config(tmp_path / "config.yaml", made), tmp_path / "sources")
    records = json.loads((tmp_path / "sources/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json").read_text())
    assert len(records) == 40
    said = Counter(noun for one in records for noun in drawings.NOUNS if noun in one["conversations"][1]["value"])
    assert set(said) == set(drawings.NOUNS)
    references = coco.read_references(tmp_path / "sources/coco/annotations/captions_val2014.json")
    assert len(references) == 12 and all(len(texts) == 5 for texts in references.values())
    for subject, domain in Emoji.subjects.items():
        table = parquet.read_table(tmp_path / f"sources/MMMU/{subject}/validation-00000-of-00001.parquet").to_pylist()
        assert len(table) == 6 and {row["subfield"] for row in table} == {domain}


def test_counting_ends_though_no_held_out_scene_has_one_thing(shown: Emoji) -> None:
    asked = datasets.questions(random.Random(6), shown, "Counting", 12, set())
    assert Counter(one.answer for one in asked) == {"1": 4, "2": 4, "3": 4}


def test_the_miniature_without_stamps_shows_shapes(made: Path) -> None:
    assert world.of(None) is world.SHAPES
    assert world.of(Miniature(**SIZES)) is world.SHAPES
    assert isinstance(world.of(Miniature(**SIZES, stamps=str(made))), Emoji)


def test_captions_are_those_of_the_shapes(shown: Emoji) -> None:
    scene = shown.sample(random.Random(8), held_out=True)
    first, second = scene.things[:2]
    assert first.name in text.captions(scene)[0] and second.name in text.captions(scene)[0]
