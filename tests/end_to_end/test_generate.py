"""From base models to answers through the command line: the checkpoint and its export say the same, in any batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from evaluation_fixtures import mmmu_row, write_coco, write_config, write_mmmu, write_pictures

from vlm import cli, parallel

IMAGES = [4, 1, 9]


@dataclass(frozen=True)
class Run:
    folder: Path
    projector: dict[str, Any]

    def generate(self, task: str, out: str, checkpoint: str = "combined", **evaluation: Any) -> list[dict[str, Any]]:
        changes: dict[str, Any] = {"models": {"projector": self.projector}, "evaluation": evaluation}
        config = write_config(self.folder / "config.yaml", **changes)
        path = self.folder / out
        source = self.folder / ("mmmu" if task == "mmmu" else "coco")
        arguments = ["--config", config, "--checkpoint", self.folder / checkpoint, "--task", task]
        assert cli.main(["generate", *map(str, [*arguments, "--source", source, "--out", path])]) == 0
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_language_dir: Path, tiny_vision_dir: Path) -> Iterator[Run]:
    """The miniature's base models, converted and combined with a fresh projector, and exported."""
    folder = tmp_path_factory.mktemp("generate")
    # transformers can express this projector alone.
    hidden = json.loads((tiny_language_dir / "config.json").read_text())["hidden_size"]
    projector = {"hidden_size": hidden, "init_std": 0.05}
    config = write_config(folder / "config.yaml", models={"projector": projector})
    for part, source in (("language", tiny_language_dir), ("vision", tiny_vision_dir)):
        assert cli.main(["convert", part, str(source), str(folder / part)]) == 0
    parts = [f"--{part}={folder / part}" for part in ("language", "vision")]
    assert cli.main(["convert", "combine", f"--config={config}", *parts, f"--out={folder / 'combined'}"]) == 0
    assert cli.main(["export", str(folder / "combined"), str(folder / "exported")]) == 0
    write_coco(folder / "coco/annotations/captions_val2014.json", {image: ["a", "b"] for image in IMAGES})
    write_pictures(folder / "coco/val2014", IMAGES)
    texts = ["What is this?", "Compare <image 2> with <image 1>, if you can see both of them.", "How many?"]
    rows = [
        mmmu_row(f"validation_Shapes_{n}", text, ["red", "blue"] if n < 2 else [], images=2 if n == 1 else 1)
        for n, text in enumerate(texts)
    ]
    write_mmmu(folder / "mmmu", {"Shapes": rows})
    yield Run(folder, projector)
    parallel.destroy()


def test_captions_follow_the_picture(run: Run) -> None:
    plain, shuffled = run.generate("captions", "captions.jsonl"), run.generate("captions_shuffled", "shuffled.jsonl")
    said = {line["image"]: line["response"] for line in plain}
    assert len(set(said.values())) > 1  # else the rest would hold for a model that sees nothing
    assert [line["id"] for line in plain] == [line["id"] for line in shuffled] == IMAGES
    assert {line["image"]: line["response"] for line in shuffled} == said
    assert all(one["image"] != other["image"] for one, other in zip(plain, shuffled, strict=True))


def test_mixed_lengths_answer_in_a_batch_as_alone(run: Run) -> None:
    long = {"mmmu": {"max_new_tokens": 12}}
    together = run.generate("mmmu", "together.jsonl", batch_size=3, **long)
    assert together == run.generate("mmmu", "alone.jsonl", batch_size=1, **long)
    assert [len(line["image"]) for line in together] == [1, 2, 1]


def test_a_dialogue_goes_on_in_a_batch_as_alone(run: Run) -> None:
    """After answers of different lengths the next turn's prompts differ in length too."""
    asked = {"num_images": 3, "questions": ["What is this?", "How many?", "Why?"], "max_new_tokens": 12}
    together = run.generate("dialogue", "dialogue.jsonl", batch_size=3, dialogue=asked)
    assert together == run.generate("dialogue", "dialogue_alone.jsonl", batch_size=1, dialogue=asked)
    first = run.generate("dialogue", "first.jsonl", dialogue=asked | {"questions": ["What is this?"]})
    assert [line["conversation"][:2] for line in together] == [line["conversation"] for line in first]
    assert {len(line["conversation"]) for line in together} == {6}


def test_the_export_answers_like_the_checkpoint(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run.generate("captions", "plain.jsonl")
    exported = run.generate("captions", "exported.jsonl", checkpoint="exported")
    assert [line["response"] for line in exported] == [line["response"] for line in lines]
    assert exported[0]["checkpoint"] != lines[0]["checkpoint"]
    picture = run.folder / "coco/val2014" / lines[0]["image"]
    question = lines[0]["prompt"].removeprefix("<image>\n")
    capsys.readouterr()
    for folder in ("combined", "exported"):
        asked = ["ask", "--checkpoint", run.folder / folder, "--image", picture, "--prompt", question]
        assert cli.main([*map(str, asked), "--max-new-tokens", "40"]) == 0
        assert capsys.readouterr().out == lines[0]["response"] + "\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--checkpoint": "language"}, "holds a language model alone"),
        ({"--checkpoint": "mmmu"}, "holds no checkpoint"),
        ({"--image": "missing.png"}, "missing.png does not exist"),
        ({"--image": "config.yaml"}, "not a picture"),
        ({"--prompt": "Compare <image> and <image>."}, "2 <image> in the text, 1 picture"),
    ],
    ids=["language-alone", "no-checkpoint", "no-file", "no-picture", "places"],
)
def test_ask_refuses_by_name(
    run: Run, changes: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = f"coco/val2014/COCO_val2014_{IMAGES[0]:012d}.jpg"
    options = {"--checkpoint": "combined", "--image": picture, "--prompt": "What is this?"} | changes
    paths = {key: value if key == "--prompt" else str(run.folder / value) for key, value in options.items()}
    assert cli.main(["ask", *(text for pair in paths.items() for text in pair)]) == 2
    assert message in capsys.readouterr().err
