"""Checkpoints are complete or absent, know their parents, and bring a stage back to the bit."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch
from folder_fixtures import make_combined, names, write_settings
from model_fixtures import huggingface, initialize, ours

from vlm import checkpoint, config, parallel
from vlm.checkpoint import Manifest, Parent, Tensors
from vlm.checkpoint import model as models


@pytest.fixture(scope="module", autouse=True)
def processes():
    initialize()
    yield
    parallel.destroy()


@pytest.fixture(scope="module")
def combined(tmp_path_factory):
    return make_combined(tmp_path_factory.mktemp("run") / "models")


def weights(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "_extra_state" not in name}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_finding_a_checkpoint_imports_no_torch():
    code = "import sys, vlm.checkpoint, vlm.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OSError, match="disk"), checkpoint.writing(out) as folder:
        (folder / "half").touch()
        raise OSError("disk full")
    assert names(tmp_path) == set()
    (tmp_path / ".out.writing").mkdir()  # left by a killed run
    (tmp_path / ".out.writing/half").touch()
    for content in ("first", "second"):
        with checkpoint.writing(out) as folder:
            assert names(folder) == set()
            (folder / "file").write_text(content)
        assert names(tmp_path) == {"out"} and (out / "file").read_text() == content


def test_identity_is_what_went_in_not_where_it_lies():
    manifest = Manifest("combined", ("language_model",), {"a": "1"}, {"language": {"source": "x", "image_token": "t"}})
    moved = dataclasses.replace(manifest, models={"language": {"source": "y", "image_token": "t"}}, versions={"a": "2"})
    assert moved.identity == manifest.identity
    for change in (
        {"models": {"language": {"source": "x", "image_token": "u"}}},
        {"sources": {"a": "2"}},
        {"settings": {"seed": 1}},
        {"iteration": 3},
        {"training": "x"},
        {"parent": Parent("..", "x")},
    ):
        assert dataclasses.replace(manifest, **change).identity != manifest.identity, change


def test_an_edited_manifest_is_refused(tmp_path, combined):
    shutil.copytree(combined, tmp_path / "copy")
    path = tmp_path / "copy/manifest.json"
    path.write_text(path.read_text().replace('"seed": 1234', '"seed": 1'))
    with pytest.raises(ValueError, match=r"manifest.json: was changed by hand"):
        checkpoint.read_manifest(tmp_path / "copy")
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"manifest.json: is not a manifest"):
        checkpoint.read_manifest(tmp_path / "copy")
    with pytest.raises(ValueError, match="hub: holds no checkpoint"):
        checkpoint.resolve(combined.parent / "hub")
    with pytest.raises(ValueError, match="nowhere: does not exist"):
        checkpoint.resolve(tmp_path / "nowhere")


def test_a_model_is_saved_and_loaded_to_the_bit(tmp_path):
    """Against weights translated by the fixtures, so that names and layouts are checked by something else."""
    reference = huggingface()
    saved, loaded = ours(reference), ours(huggingface(tied=False))
    manifest = Manifest("combined", tuple(checkpoint.PARTS.values()))
    checkpoint.save(tmp_path / "out", models.sharded_state(saved), manifest)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert checkpoint.load_model(loaded, tmp_path / "out").identity == manifest.identity
    assert_equal(weights(saved), weights(loaded))
    fc1 = Tensors(tmp_path / "out").read("language_model.decoder.layers.1.mlp.linear_fc1.weight")
    mlp = reference.model.language_model.layers[1].mlp
    assert torch.equal(fc1, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))


def test_megatron_core_itself_reads_what_was_streamed(combined):
    from megatron.core import dist_checkpointing

    found = dist_checkpointing.load_plain_tensors(str(combined))
    tensors = Tensors(combined)
    assert {key for key in found if "." in key} == set(tensors.specs)
    for key in tensors.specs:
        assert torch.equal(found[key], tensors.read(key)), key


def test_a_model_without_a_weight_in_the_checkpoint_is_refused(combined):
    from vlm.model import build_from_checkpoint

    model = build_from_checkpoint(combined)
    model.vision_projection.register_parameter("scale", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match="no weight vision_projection.scale"):
        checkpoint.load_model(model, combined)
    smaller = ours(huggingface())  # a vocabulary of 131 fits into 400 rows only by padding; its projector does not
    smaller.vision_projection.encoder.linear_fc1.weight = torch.nn.Parameter(torch.zeros(48, 30))
    with pytest.raises(ValueError, match=r"linear_fc1.weight has shape \[48, 32\], the model has \[48, 30\]"):
        checkpoint.load_model(smaller, combined)


class Training:
    """A stage with megatron-core's optimizer, whose gradients are random numbers."""

    def __init__(self, combined, stage, dtype, settings):
        from vlm.model import build_from_checkpoint
        from vlm.train import optimizer

        self.trainable = ("projector",) if stage == "pretrain" else ("projector", "language")
        self.model = build_from_checkpoint(combined, dtype=dtype)
        self.model.freeze(self.trainable)
        self.model.train()
        self.wrapped = optimizer.wrap(self.model)
        run = config.load(settings).model_copy(update={"dtype": dtype})
        self.optimizer, self.scheduler = optimizer.build(self.wrapped, run, next(iter(run.stages.values())))

    def steps(self, count):
        for _ in range(count):
            self.scheduler.step(1)
            self.wrapped.zero_grad_buffer()
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.main_grad.copy_(torch.randn(parameter.shape))
            self.optimizer.step()

    def save(self, out, parent, iteration, stage="pretrain", identity="settings", **more):
        return checkpoint.save_stage(
            out,
            stage=stage,
            iteration=iteration,
            parent=parent,
            trainable=self.trainable,
            identity=identity,
            model=self.wrapped,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            **more,
        )

    def load(self, path):
        return checkpoint.load_stage(path, model=self.wrapped, optimizer=self.optimizer, scheduler=self.scheduler)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_settings(tmp_path_factory.mktemp("settings") / "config.yaml")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_resumed_stage_is_the_undisturbed_one(tmp_path, combined, settings, stage, dtype):
    undisturbed = Training(combined, stage, dtype, settings)
    undisturbed.steps(3)
    saved = undisturbed.save(tmp_path, combined, 3, stage, loader=b"\x00place\xff", extra={"totals": {"tokens": 7}})
    undisturbed.steps(4)
    drawn = torch.randn(5)

    resumed = Training(combined, stage, dtype, settings)
    torch.manual_seed(99)
    for parameter in resumed.model.parameters():
        parameter.data.zero_()
    found = resumed.load(tmp_path)
    alone = {"tensor": 1, "pipeline": 1, "data": 1}
    assert found == checkpoint.Resumed(3, b"\x00place\xff", {"totals": {"tokens": 7}}, alone)
    resumed.steps(4)
    assert torch.equal(torch.randn(5), drawn)
    assert_equal(weights(resumed.model), weights(undisturbed.model))
    assert resumed.optimizer.param_groups[0]["lr"] == undisturbed.optimizer.param_groups[0]["lr"]
    held = {key.split(".")[0] for key, place in Tensors(saved).folders.items() if place == saved}
    assert held == {"vision_projection"} | ({"language_model"} if stage == "sft" else set())


@pytest.mark.parametrize("name", ["rank_00000.pt", "data_00000.pt"])
def test_a_stage_without_a_rank_s_file_is_refused_by_name(tmp_path, combined, settings, name):
    training = Training(combined, "pretrain", "float32", settings)
    (training.save(tmp_path, combined, 1) / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: is missing; remove its folder"):
        training.load(tmp_path)


def test_a_chain_of_stages_moves_as_a_whole(tmp_path, combined, settings):
    run = tmp_path / "run"
    shutil.copytree(combined.parent, run / "models")
    pretrain = Training(run / "models/combined", "pretrain", "float32", settings)
    pretrain.steps(2)
    pretrain.save(run / "train/pretrain", run / "models/combined", 2)
    sft = Training(run / "train/pretrain", "sft", "float32", settings)
    sft.steps(2)
    sft.save(run / "train/sft", run / "train/pretrain", 2, "sft")
    expected = {name: tensor.clone() for name, tensor in weights(sft.model).items()}
    run.rename(tmp_path / "moved")

    from vlm.model import build_from_checkpoint

    moved = tmp_path / "moved/train"
    assert_equal(weights(build_from_checkpoint(moved / "sft")), expected)
    kinds = [manifest.stage or manifest.kind for _, manifest in checkpoint.chain(moved / "sft")]
    assert kinds == ["sft", "pretrain", "combined"]

    Training(tmp_path / "moved/models/combined", "pretrain", "float32", settings).save(
        moved / "pretrain", tmp_path / "moved/models/combined", 2
    )
    assert checkpoint.chain(moved / "sft"), "the same provenance is the same parent"
    pretrain.save(moved / "pretrain", combined, 2, identity="other settings")
    with pytest.raises(ValueError, match="was replaced by another checkpoint"):
        checkpoint.chain(moved / "sft")
    shutil.rmtree(moved / "pretrain")
    with pytest.raises(ValueError, match=r"its parent .*pretrain.* is missing"):
        build_from_checkpoint(moved / "sft")


def test_latest_moves_only_to_a_complete_checkpoint(tmp_path, combined, settings, monkeypatch):
    training = Training(combined, "pretrain", "float32", settings)
    assert checkpoint.latest(tmp_path) is None
    first = training.save(tmp_path, combined, 1)
    assert checkpoint.latest(tmp_path) == first == checkpoint.resolve(tmp_path)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(checkpoint.NotSaved, match="iteration_0000002: could not be saved: .*No space left"):
        training.save(tmp_path, combined, 2)
    monkeypatch.undo()
    assert names(tmp_path / "checkpoints") == {"latest", first.name}
    assert checkpoint.latest(tmp_path) == first
    second = training.save(tmp_path, combined, 2)
    assert checkpoint.latest(tmp_path) == second
    shutil.rmtree(second)
    with pytest.raises(ValueError, match=f"latest: names {second.name}"):
        checkpoint.latest(tmp_path)


def test_the_newest_two_checkpoints_stay(tmp_path, combined, settings, monkeypatch):
    training = Training(combined, "pretrain", "float32", settings)
    folder = tmp_path / "checkpoints"
    for iteration in (1, 2):
        training.save(tmp_path, combined, iteration)
    assert names(folder) == {"latest", "iteration_0000001", "iteration_0000002"}

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)  # while the oldest goes
    with pytest.raises(KeyboardInterrupt):
        training.save(tmp_path, combined, 3)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path) == folder / "iteration_0000003"
    assert not (folder / "iteration_0000001/manifest.json").exists()
    training.save(tmp_path, combined, 4)  # clears what the interruption left
    assert names(folder) == {"latest", "iteration_0000003", "iteration_0000004"}
