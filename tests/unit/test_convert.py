"""Base models become checkpoints without losing a bit; what cannot be is refused by name and leaves nothing."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from folder_fixtures import (
    VOCABULARY,
    change_config,
    change_weights,
    make_combined,
    names,
    write_language,
    write_settings,
    write_vision,
)
from model_fixtures import LANGUAGE, VISION

from vlm import checkpoint
from vlm.checkpoint import Tensors
from vlm.convert import combine, language, verify
from vlm.weights import Folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_language(folder / "language")
    write_vision(folder / "vision")
    return folder


@pytest.fixture(scope="module")
def combined(tmp_path_factory):
    return make_combined(tmp_path_factory.mktemp("combined"))


def test_a_manifest_says_what_was_read(tmp_path, hub):
    language.convert(hub / "language", tmp_path / "out")
    found = checkpoint.read_manifest(tmp_path / "out")
    read = ("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    digests = {name: hashlib.sha256((hub / "language" / name).read_bytes()).hexdigest() for name in read}
    assert digests.items() <= {k.removeprefix("language/"): v for k, v in found.sources.items()}.items()
    assert {"vlm", "torch", "transformers", "safetensors", "megatron-core"} <= found.versions.keys()


def test_the_combined_manifest_says_which_settings_made_it(tmp_path, combined):
    found = checkpoint.read_manifest(combined)
    assert found.configuration == hashlib.sha256((combined.parent / "config.yaml").read_bytes()).hexdigest()
    for part in ("language", "vision"):
        assert checkpoint.read_manifest(combined.parent / part).sources.items() <= found.sources.items()
    other = write_settings(tmp_path / "config.yaml", evaluation__batch_size=3)
    combine.combine(other, combined.parent / "language", combined.parent / "vision", tmp_path / "again")
    again = checkpoint.read_manifest(tmp_path / "again")
    assert again.configuration != found.configuration and again.identity == found.identity


def test_combining_refuses_a_conversion_that_its_configuration_does_not_describe(tmp_path, combined):
    shutil.copytree(combined.parent / "language", tmp_path / "language")
    change_config(checkpoint.huggingface(tmp_path / "language", "language"), num_hidden_layers=2)
    settings = write_settings(tmp_path / "config.yaml")
    message = r"language: .*layers.2.* has shape \(.*\), its config.json gives None; convert it again"
    with pytest.raises(ValueError, match=message):
        combine.combine(settings, tmp_path / "language", combined.parent / "vision", tmp_path / "out")
    assert names(tmp_path) == {"language", "config.yaml"}


def test_an_interrupted_conversion_leaves_the_old_one(tmp_path, hub, monkeypatch):
    language.convert(hub / "language", tmp_path / "out")
    before = checkpoint.read_manifest(tmp_path / "out").identity
    reads = iter(range(5))

    def fail(self, name, read=Folder.read):
        if next(reads, None) is None:
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(Folder, "read", fail)
    with pytest.raises(KeyboardInterrupt):
        language.convert(hub / "language", tmp_path / "out")
    assert names(tmp_path) == {"out"}
    assert checkpoint.read_manifest(tmp_path / "out").identity == before
    assert len(Tensors(tmp_path / "out").read("language_model.output_layer.weight")) == VOCABULARY


def test_combine_draws_the_same_projector_from_the_same_seed(tmp_path, combined):
    key = "vision_projection.encoder.linear_fc{}.{}"
    first = Tensors(combined)
    weight = first.read(key.format(1, "weight"))
    assert weight.shape == (LANGUAGE["hidden_size"], VISION["hidden_size"])
    assert 0.9 < weight.std() / 0.05 < 1.1 and not first.read(key.format(2, "bias")).any()
    parents = combined.parent
    for seed, same in ((1234, True), (5, False)):
        settings = write_settings(tmp_path / "config.yaml", seed=seed)
        combine.combine(settings, parents / "language", parents / "vision", tmp_path / "again")
        again = Tensors(tmp_path / "again")
        assert torch.equal(again.read(key.format(1, "weight")), weight) is same
        identities = {checkpoint.read_manifest(path).identity for path in (combined, tmp_path / "again")}
        assert len(identities) == (1 if same else 2)
    for part in ("language", "vision"):
        for name, spec in Tensors(parents / part).specs.items():
            assert first.specs[name] == spec
            assert torch.equal(first.read(name), Tensors(parents / part).read(name))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"models__language__image_token": "[image]"}, r"image_token: '\[image\]' is \d+ tokens"),
        ({"models__vision__feature_layer": -9}, "models.vision.feature_layer: -9"),
        (
            {"models__projector__hidden_size": 80},
            "models.projector.hidden_size: 80 cannot be exported .* size 48 in the middle; .* set export: false",
        ),
    ],
    ids=["token-not-in-vocabulary", "no-such-layer", "export-of-another-width"],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, combined, changes, message):
    settings = write_settings(tmp_path / "config.yaml", **changes)
    with pytest.raises(ValueError, match=message):
        combine.combine(settings, combined.parent / "language", combined.parent / "vision", tmp_path / "out")
    assert names(tmp_path) == {"config.yaml"}


def test_image_token_beyond_the_vocabulary_is_refused(tmp_path, hub):
    language.convert(hub / "language", tmp_path / "language")
    assert combine.image_token_id(tmp_path / "language", "[control_8]") == 10
    change_config(checkpoint.huggingface(tmp_path / "language", "language"), vocab_size=10)
    with pytest.raises(ValueError, match="'\\[control_8\\]' has id 10, the model's vocab_size is 10"):
        combine.image_token_id(tmp_path / "language", "[control_8]")


def test_combine_wants_one_of_each_kind(tmp_path, combined):
    settings = write_settings(tmp_path / "config.yaml")
    parents = combined.parent
    with pytest.raises(ValueError, match="vision: is a vision checkpoint, expected one of `vlm convert language`"):
        combine.combine(settings, parents / "vision", parents / "vision", tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"models__vision__feature_layer": -2},
        {"models__projector__hidden_size": 80, "models__projector__bias": False, "export": False},
    ],
    ids=["last-layer", "layer-before-last", "projector-of-another-width"],
)
def test_verify_agrees_with_transformers(tmp_path, combined, changes, capsys):
    parents = combined.parent
    settings = write_settings(tmp_path / "config.yaml", **changes)
    combine.combine(settings, parents / "language", parents / "vision", tmp_path / "combined")
    hub = parents / "hub"
    assert verify.verify(tmp_path / "combined", hub / "language", hub / "vision", tmp_path / "report.json") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] and set(report["checks"]) == {"language logits", "vision features", "combined logits"}
    for name, check in report["checks"].items():
        assert check["max_abs_difference"] < 1e-4 < 1 < check["max_abs_value"], name
    assert "combined logits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "part, weight, above",
    [
        ("language", "model.layers.2.self_attn.k_proj.weight", {"language logits", "combined logits"}),
        ("vision", "encoder.layers.0.mlp.fc1.bias", {"vision features", "combined logits"}),
    ],
)
def test_verify_notices_one_changed_weight(tmp_path, combined, part, weight, above, capsys):
    hub = combined.parent / "hub"
    shutil.copytree(hub / part, tmp_path / part)
    change_weights(tmp_path / part, lambda tensors: tensors[weight][0].add_(0.1))
    folders = {"language": hub / "language", "vision": hub / "vision", part: tmp_path / part}
    assert verify.verify(combined, folders["language"], folders["vision"], tmp_path / "report.json") == 1
    checks = json.loads((tmp_path / "report.json").read_text())["checks"]
    assert {name for name, check in checks.items() if check["max_abs_difference"] > 1e-4} == above


@pytest.mark.parametrize(("grown", "wrong", "code"), [(1e3, 0.0, 0), (1e3, 0.1, 1)], ids=["rounding", "wrong-too"])
def test_verify_allows_the_rounding_of_large_logits(tmp_path, combined, grown, wrong, code):
    """Of logits a thousand times as large, as a model of large hidden states has."""
    hub = combined.parent / "hub"
    shutil.copytree(hub / "language", tmp_path / "hub")
    change_weights(tmp_path / "hub", lambda tensors: tensors["model.norm.weight"].mul_(grown))
    language.convert(tmp_path / "hub", tmp_path / "language")
    settings = write_settings(tmp_path / "config.yaml")
    combine.combine(settings, tmp_path / "language", combined.parent / "vision", tmp_path / "combined")
    change_weights(tmp_path / "hub", lambda tensors: tensors["model.layers.2.self_attn.k_proj.weight"][0].add_(wrong))
    report = tmp_path / "report.json"
    assert verify.verify(tmp_path / "combined", tmp_path / "hub", hub / "vision", report) == code
    check = json.loads(report.read_text())["checks"]["language logits"]
    assert check["max_abs_difference"] > 1e-4 and check["max_abs_value"] > 100
