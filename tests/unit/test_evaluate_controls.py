"""The controls: drawn by seed, nearest by pixels, and one reference against the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_fixtures import write_coco, write_config, write_json
from PIL import Image

from vlm.evaluate import controls

REFERENCES = {5: ["five a", "five b", "five c"], 2: ["two a", "two b"], 8: ["eight a", "eight b", "eight c"]}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Three test pictures, each a noisy copy of one of eighty training pictures of other sizes."""
    rng = np.random.default_rng(0)
    train = [np.kron(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)) for _ in range(40)]
    train += [pixels // 2 for pixels in train]  # darker copies correlate as well, and are shorter vectors
    folder = tmp_path / "LLaVA-Pretrain"
    (folder / "images/00000").mkdir(parents=True)
    entries = []
    for n, pixels in enumerate(train):
        Image.fromarray(pixels).resize((96, 96) if n % 2 else (64, 64)).save(folder / f"images/00000/{n}.png")
        turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": f"caption {n}"}]
        entries.append({"id": str(n), "image": f"00000/{n}.png", "conversations": turns})
    entries.append({"id": "text", "conversations": [{"from": "gpt", "value": "no picture"}]})
    write_json(folder / "blip_laion_cc_sbu_558k.json", entries)
    write_coco(tmp_path / "coco/annotations/captions_val2014.json", REFERENCES)
    (tmp_path / "coco/val2014").mkdir()
    for image, copied in zip(REFERENCES, (31, 4, 17), strict=True):
        noisy = np.clip(train[copied] + rng.normal(0, 20, train[copied].shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(tmp_path / f"coco/val2014/COCO_val2014_{image:012d}.jpg")
    return {"config": write_config(tmp_path / "config.yaml"), "source": tmp_path / "coco", "train": folder}


def said(files: dict[str, Any], out: Path, **options: Any) -> dict[int, str]:
    controls.predict(out=out, **(files | options))
    return {entry["image_id"]: entry["caption"] for entry in json.loads(out.read_text())}


def test_nearest_finds_the_picture_behind_the_noise(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {5: "caption 31", 2: "caption 4", 8: "caption 17"}
    assert said(files, tmp_path / "n.json", control="nearest") == expected
    monkeypatch.setattr(controls, "CHUNK", 7)  # ragged chunks
    assert said(files, tmp_path / "n.json", control="nearest") == expected
    shutil.make_archive(str(files["train"] / "images"), "zip", files["train"] / "images")
    shutil.rmtree(files["train"] / "images")
    assert said(files, tmp_path / "n.json", control="nearest") == expected, "not out of the archive"


def test_random_is_drawn_by_seed(files: dict[str, Any], tmp_path: Path) -> None:
    first = said(files, tmp_path / "r.json", control="random")
    assert list(first) == [5, 2, 8]
    assert all(caption.startswith("caption ") for caption in first.values())
    assert said(files, tmp_path / "r.json", control="random") == first
    other = files | {"config": write_config(tmp_path / "other.yaml", seed=99)}
    assert said(other, tmp_path / "r.json", control="random") != first


def test_reference_is_taken_out_of_the_references(files: dict[str, Any], tmp_path: Path) -> None:
    left = tmp_path / "left.json"
    taken = said(files, tmp_path / "t.json", control="reference", annotations_out=left)
    remaining: dict[int, list[str]] = {image: [] for image in REFERENCES}
    for entry in json.loads(left.read_text())["annotations"]:
        remaining[entry["image_id"]].append(entry["caption"])
    assert {image: sorted([taken[image], *remaining[image]]) for image in REFERENCES} == REFERENCES
    assert all(taken[image] not in remaining[image] for image in REFERENCES)
    with pytest.raises(ValueError, match="needs --annotations-out"):
        said(files, tmp_path / "t.json", control="reference")
    write_coco(files["source"] / "annotations/captions_val2014.json", REFERENCES | {11: ["alone"]})
    with pytest.raises(ValueError, match="1 images have one reference only, first image_id 11"):
        said(files, tmp_path / "t.json", control="reference", annotations_out=left)


def test_bad_input_is_refused_by_name(files: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"blip_laion_cc_sbu_558k\.json"):
        said(files | {"train": tmp_path / "coco"}, tmp_path / "r.json", control="random")
    (files["train"] / "images/00000/12.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"12\.png: not a picture that decodes"):
        said(files, tmp_path / "n.json", control="nearest")
