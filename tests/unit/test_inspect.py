"""The page of packed sequences says what the loader gives, and marks what is trained."""

from __future__ import annotations

import base64
import io
import json
import re
from html import unescape
from itertools import islice
from pathlib import Path
from typing import Any

import data_fixtures as fixtures
import numpy as np
import pytest
from PIL import Image

from vlm import cli, loader
from vlm import config as settings
from vlm.data.index import index
from vlm.data.inspect import inspect
from vlm.data.shard import shard


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    config = fixtures.write_config(root / "config.yaml")
    for number, name in enumerate(fixtures.SETS):
        fixtures.write_source(root / name, 60, seed=number, text_only_share=0.3 * number)
        shard(config, name, root / name, root / "data" / name)
        index(root / "data" / name)
    fixtures.write_tokenizer(root / "language")
    fixtures.write_vision(root / "vision")
    return root


def draw(folder: Path, out: Path, **options: Any) -> str:
    models = {"language": folder / "language", "vision": folder / "vision"}
    inspect(folder / "config.yaml", "pretrain", folder / "data", out, **(models | options))
    return out.read_text()


def plain(html: str) -> str:
    return unescape(re.sub("<[^>]*>", "", html))


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_page_shows_the_sequences_of_the_loader(folder: Path, tmp_path: Path, split: Any) -> None:
    html = draw(folder, tmp_path / "page.html", sequences=2, split=split)
    config = settings.load(folder / "config.yaml")
    dirs = {name: folder / "data" / name for name in fixtures.SETS}
    batches = list(
        islice(loader.build(config, "pretrain", dirs, folder / "language", folder / "vision", split=split), 2)
    )
    records = {name: json.loads((folder / name / "annotations.json").read_text()) for name in fixtures.SETS}
    sections = html.split("<h2>")[1:]
    assert len(sections) == 2
    for section, batch in zip(sections, batches, strict=True):
        assert f"{len(batch.sample_keys)} samples and {len(batch.images)} pictures in 512 slots" in section
        assert f"{len(batch.trained_positions)} trained" in section and str(batch.cu_seqlens.tolist()) in section
        assert f"{512 - batch.num_tokens} padding" in section
        cards = section.split("<article")[1:]
        for card, key in zip(cards, batch.sample_keys, strict=True):
            name, position = key.split("/")
            record = records[name][int(position)]
            trained = re.findall(r'<span class="trained">(.*?</s.*?>)</span>', card.replace("&lt;/s&gt;", "</s>"))
            answers = [turn["value"] for turn in record["conversations"][1::2]]
            assert [plain(text).strip() for text in trained] == answers
            pictures = [base64.b64decode(data) for data in re.findall(r"data:image/jpeg;base64,([^\"]*)", card)]
            found = [fixtures.picture_index(pixels(picture)) for picture in pictures]
            assert found == ([int(position)] if "image" in record else [])
            assert card.count("64 image tokens") == len(found) and key in card


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture))).transpose(2, 0, 1)


def test_the_strip_is_to_scale(folder: Path, tmp_path: Path) -> None:
    html = draw(folder, tmp_path / "page.html")
    strip = html.split('<div class="strip">')[1].split("</div>")[0]
    widths = {kind: sum(map(int, re.findall(rf'"{kind}" style="flex:(\d+)', strip))) for kind in KINDS}
    assert sum(widths.values()) == 512
    said = re.search(r"filled: (\d+) read, (\d+) trained, (\d+) of pictures(?:, (\d+) padding)?", html)
    assert said and list(widths.values()) == [int(number or 0) for number in said.groups()]


KINDS = ("text", "trained", "image", "padding")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision": None}, "give --checkpoint, or both --language and --vision"),
        ({"split": "val", "sequences": 99}, "--sequences: 99 asked for, the val split has "),
        ({"out": "page.pdf"}, "page.pdf must end in .html"),
    ],
    ids=["no-models", "fewer-sequences", "not-html"],
)
def test_what_cannot_be_drawn_is_refused(folder: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    out = tmp_path / options.pop("out", "page.html")
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(folder, out, **options)
    assert not out.exists()


def test_the_command_finds_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = [f"--{name}={folder / name}" for name in ("data", "language", "vision")]
    arguments = ["data", "inspect", f"--config={folder / 'config.yaml'}", *known, f"--out={tmp_path / 'page.html'}"]
    assert cli.main([*arguments, "--stage=pretrain"]) == 0 and (tmp_path / "page.html").is_file()
    assert cli.main([*arguments, "--stage=sft"]) == 2
    assert "--stage: 'sft' is not a stage, allowed are pretrain" in capsys.readouterr().err
