"""The base models can be made again, over the committed ones, complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPVisionModel

from vlm.tiny import vision


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision.Pairs.__init__, "__defaults__", (4,))


def test_a_vision_model_takes_the_place_of_the_one_before(small_batches: None, tmp_path: Path) -> None:
    out = tmp_path / "vision"
    vision.train(out, steps=1, device="cpu")
    first = (out / "model.safetensors").read_bytes()
    (out / "left_over.txt").write_text("of an older version")
    vision.train(out, steps=1, device="cpu", seed=1)
    assert (out / "model.safetensors").read_bytes() != first
    assert not (out / "left_over.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["vision"]
    assert CLIPVisionModel.from_pretrained(out).config.patch_size == 8


def test_an_interrupted_training_keeps_the_model_before(
    small_batches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "vision"
    vision.train(out, steps=1, device="cpu")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(vision, "_write_card", killed)
    with pytest.raises(KeyboardInterrupt):
        vision.train(out, steps=1, device="cpu", seed=1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
