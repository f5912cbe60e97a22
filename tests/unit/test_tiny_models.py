"""The base models can be made again, over the committed ones, complete or not at all, and go on where they stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import emoji_fixtures
import pytest
import yaml
from data_fixtures import _merge
from transformers import CLIPVisionModel

from vlm import config as settings
from vlm.tiny import vision

ROOT = Path(__file__).resolve().parents[2]
TRAINING = {"num_layers": 1, "hidden_size": 64, "num_heads": 1, "steps": 6, "batch": 3, "lr": 1e-3, "save_interval": 2}


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "COMMITTED", vision.COMMITTED.model_copy(update={"batch": 4}))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of a run that trains its own vision model on emoji."""
    folder = tmp_path_factory.mktemp("emoji")
    return _config(folder / "config.yaml", str(emoji_fixtures.write_stamps(folder)))


def _config(path: Path, stamps: str, **changes: Any) -> Path:
    tree = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    _merge(tree, yaml.safe_load((ROOT / "config/small.yaml").read_text()))
    tree["miniature"] |= {"stamps": stamps, "vision": TRAINING | changes}
    path.write_text(settings.dump(settings.validate(tree)))
    return path


def _stopped(config: Path, out: Path, state: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Train, and be killed while the step after `after` is computed."""
    contrast, calls = vision.contrast, []

    def killed(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) > after:
            raise KeyboardInterrupt
        return contrast(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(vision, "contrast", killed)
        vision.train(out, config=config, state=state, device="cpu")


def test_a_stopped_training_ends_as_one_that_was_not(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vision.train(tmp_path / "whole", config=config, device="cpu")
    _stopped(config, tmp_path / "vision", tmp_path / "state.pt", monkeypatch, after=3)
    assert not (tmp_path / "vision").exists() and (tmp_path / "state.pt").is_file()
    vision.train(tmp_path / "vision", config=config, state=tmp_path / "state.pt", device="cpu", workers=1)
    assert "going on after step 2" in capsys.readouterr().out
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "vision"))
    assert one.read_bytes() == other.read_bytes()
    assert not (tmp_path / "state.pt").exists()


def test_the_state_of_another_training_is_not_gone_on_from(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _stopped(config, tmp_path / "vision", tmp_path / "state.pt", monkeypatch, after=3)
    stamps = settings.load(config).miniature.stamps
    other = _config(tmp_path / "other.yaml", stamps, hidden_size=128, num_heads=2)
    vision.train(tmp_path / "vision", config=other, state=tmp_path / "state.pt", device="cpu")
    assert "with other settings" in capsys.readouterr().out
    made = CLIPVisionModel.from_pretrained(tmp_path / "vision").config
    assert (made.hidden_size, made.num_attention_heads, made.image_size, made.patch_size) == (128, 2, 168, 14)


def test_settings_without_a_vision_model_to_train_are_refused(config: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(config.read_text())
    tree["miniature"]["vision"], tree["models"]["vision"]["source"] = None, "resources/tiny/vision"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match="miniature.vision is not set"):
        vision.train(tmp_path / "vision", config=tmp_path / "config.yaml", device="cpu")


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
