"""Base models become checkpoints without losing a bit; what cannot be is refused by name and leaves nothing."""

from __future__ import annotations

import json
import os

import pytest
import torch
from folder_fixtures import VOCABULARY, make_combined, names, write_language, write_settings, write_vision
from model_fixtures import LANGUAGE, VISION
from safetensors.torch import load_file, save_file

from vlm import checkpoint
from vlm.checkpoint import Tensors
from vlm.convert import combine, language, verify, vision
from vlm.weights import Folder, language_table, vision_table


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_language(folder / "language")
    write_vision(folder / "vision")
    return folder


@pytest.fixture(scope="module")
def combined(tmp_path_factory):
    return make_combined(tmp_path_factory.mktemp("combined"))


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    "options",
    [{}, {"max_shard_size": "20KB"}, {"llama": True, "tied": True}],
    ids=["mistral-gqa", "mistral-sharded", "llama-tied"],
)
def test_language_round_trip_is_bit_identical(tmp_path, options):
    source = write_language(tmp_path / "hub", **options)
    language.convert(source, tmp_path / "out")
    assert_same(source, language_table(read_config(source)), tmp_path / "out")
    place = checkpoint.huggingface(tmp_path / "out", "language")
    assert read_config(place) == read_config(source)
    assert (place / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("whole", [False, True], ids=["vision-alone", "with-text-tower"])
def test_vision_round_trip_is_bit_identical(tmp_path, whole):
    source = write_vision(tmp_path / "hub", whole=whole)
    vision.convert(source, tmp_path / "out")
    table = vision_table(read_config(source), theirs="vision_model." if whole else "")
    assert_same(source, table, tmp_path / "out")
    assert read_config(checkpoint.huggingface(tmp_path / "out", "vision"))["model_type"] == "clip_vision_model"


def assert_same(source, table, out):
    tensors, stored = Tensors(out), {}
    for path in source.glob("*.safetensors"):
        stored.update(load_file(path))
    known = {name for row in table.rows for name in row.theirs}
    assert {name for name in stored if not table.ignored.fullmatch(name)} == known
    assert set(tensors.specs) == {row.ours for row in table.rows}
    for row in table.rows:
        for name, tensor in row.split(tensors.read(row.ours)).items():
            assert tensor.dtype == stored[name].dtype and torch.equal(tensor, stored[name]), name


def edited(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncated(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_shard(folder):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(read_config(folder) | changes))


UP = "model.layers.1.mlp.up_proj.weight"
BAD_LANGUAGE = {
    "missing-weight": (lambda f: edited(f, lambda t: t.pop(UP)), f"{UP} is missing from model.safetensors"),
    "unexpected-weight": (
        lambda f: edited(f, lambda t: t.update({"model.layers.9.x": torch.zeros(2)})),
        "model.layers.9.x is unexpected",
    ),
    "shape-against-config": (
        lambda f: edited(f, lambda t: t.update({UP: torch.zeros(80, 48)})),
        rf"{UP} has shape \[80, 48\], config.json gives \[88, 48\] \(intermediate_size, hidden_size\)",
    ),
    "config-against-shapes": (lambda f: config(f, intermediate_size=64), r"gate_proj.weight has shape \[88, 48\]"),
    "truncated": (truncated, "model.safetensors: is truncated"),
    "not-safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x02" * 40), "not a safetensors file"),
    "pickle": (pickled, "pytorch_model.bin but no safetensors"),
    "missing-shard": (without_shard, "model-00001-of-00002.safetensors"),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors"),
    "no-tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
    "no-config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "hidden-size-does-not-divide": (
        lambda f: config(f, head_dim=None, num_attention_heads=7),
        "hidden_size 48 is not a multiple of num_attention_heads 7",
    ),
    "another-architecture": (lambda f: config(f, architectures=["MixtralForCausalLM"]), "MixtralForCausalLM"),
}


@pytest.mark.parametrize("case", BAD_LANGUAGE)
def test_bad_language_folder_is_refused_and_nothing_is_left(tmp_path, hub, case):
    break_it, message = BAD_LANGUAGE[case]
    copy_tree(hub / "language", tmp_path / "source")
    break_it(tmp_path / "source")
    before = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    with pytest.raises(ValueError, match=message):
        language.convert(tmp_path / "source", tmp_path / "out/language")
    assert names(tmp_path / "out") == set()
    assert {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()} == before


def test_bad_vision_folder_is_refused(tmp_path, hub):
    copy_tree(hub / "vision", tmp_path / "source")
    edited(tmp_path / "source", lambda t: t.pop("pre_layrnorm.bias"))
    with pytest.raises(ValueError, match="pre_layrnorm.bias is missing"):
        vision.convert(tmp_path / "source", tmp_path / "out")
    config(tmp_path / "source", patch_size=5)
    with pytest.raises(ValueError, match="image_size 24 is not a multiple of patch_size 5"):
        vision.convert(tmp_path / "source", tmp_path / "out")


def copy_tree(source, out):
    import shutil

    shutil.copytree(source, out)


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
    config(checkpoint.huggingface(tmp_path / "language", "language"), vocab_size=10)
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
    copy_tree(hub / part, tmp_path / part)
    edited(tmp_path / part, lambda tensors: tensors[weight][0].add_(0.1))
    folders = {"language": hub / "language", "vision": hub / "vision", part: tmp_path / part}
    assert verify.verify(combined, folders["language"], folders["vision"], tmp_path / "report.json") == 1
    checks = json.loads((tmp_path / "report.json").read_text())["checks"]
    assert {name for name, check in checks.items() if check["max_abs_difference"] > 1e-4} == above
