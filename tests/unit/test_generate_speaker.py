"""A model is asked only under the settings it was made with, which is found out before it is loaded."""

from __future__ import annotations

import shutil

import pytest
from evaluation_fixtures import write_coco, write_pictures
from folder_fixtures import make_combined, write_settings

from vlm import config as configuration
from vlm.export import llava
from vlm.generate import speaker, tasks

OTHER = [
    ({"models__language__image_token": "[control_7]"}, r"models\.language\.image_token: is '\[control_7\]', but .*_8"),
    ({"models__vision__feature_layer": -2}, r"models\.vision\.feature_layer: is -2, but the checkpoint .* with -1"),
    ({"models__projector__hidden_size": 80}, r"models\.projector\.hidden_size: is 80, but the checkpoint .* with 48"),
    ({"models__projector__bias": False}, r"models\.projector\.bias: is False, but the checkpoint .* with True"),
    ({"data__image_resize": "square"}, r"data\.image_resize: is 'square', but the checkpoint .* with 'crop'"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    combined = make_combined(tmp_path_factory.mktemp("run"))
    llava.export(combined, combined.parent / "exported")
    return combined.parent


@pytest.mark.parametrize("folder", ["combined", "exported"])
@pytest.mark.parametrize(("changes", "message"), OTHER, ids=["token", "layer", "width", "bias", "resize"])
def test_a_model_made_with_other_settings_is_refused(tmp_path, folders, folder, changes, message):
    speaker.check(configuration.load(write_settings(tmp_path / "same.yaml")), folders / folder)
    with pytest.raises(ValueError, match=message):
        speaker.check(configuration.load(write_settings(tmp_path / "other.yaml", **changes)), folders / folder)


def test_a_base_model_alone_is_refused(tmp_path, folders):
    settings = configuration.load(write_settings(tmp_path / "config.yaml"))
    with pytest.raises(ValueError, match="language: holds a language model alone"):
        speaker.check(settings, folders / "language")


def test_generating_checks_before_it_loads(tmp_path, folders, monkeypatch):
    write_coco(tmp_path / "coco/annotations/captions_val2014.json", {4: ["a"]})
    write_pictures(tmp_path / "coco/val2014", [4])
    settings = write_settings(tmp_path / "config.yaml", data__image_resize="square")
    monkeypatch.setattr(speaker, "load", lambda *arguments, **options: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="data.image_resize"):
        tasks.generate(settings, folders / "combined", "captions", tmp_path / "coco", tmp_path / "out/captions.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_changed_manifest_is_no_excuse(tmp_path, folders):
    shutil.copytree(folders / "combined", tmp_path / "combined")
    path = tmp_path / "combined/manifest.json"
    path.write_text(path.read_text().replace('"crop"', '"square"'))
    settings = configuration.load(write_settings(tmp_path / "config.yaml", data__image_resize="square"))
    with pytest.raises(ValueError, match="was changed by hand"):
        speaker.check(settings, tmp_path / "combined")
