"""A checkpoint described: the same weights read the same in every format and layout, and one changed bit is found."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from folder_fixtures import make_combined

from vlm import checkpoint, cli
from vlm.checkpoint import Parent, Tensors
from vlm.describe.contents import in_order
from vlm.describe.diff import compare
from vlm.describe.show import show
from vlm.export import legacy, llava

KEY = "language_model.decoder.layers.1.mlp.linear_fc2.weight"
FC1 = "vision_projection.encoder.linear_fc1.weight"


@pytest.fixture(scope="module")
def combined(tmp_path_factory):
    return make_combined(tmp_path_factory.mktemp("run") / "models")


def write(out, origin, change=lambda key, tensor: tensor, *, only=None, reverse=False, **manifest):
    """A checkpoint of some parts of another, whose tensors went through `change`."""
    tensors, found = Tensors(origin), checkpoint.read_manifest(checkpoint.resolve(origin))
    chosen = [key for key in tensors.specs if only is None or key.startswith(only)]
    made = {key: change(key, tensors.read(key)) for key in (reversed(chosen) if reverse else chosen)}
    made = {key: tensor for key, tensor in made.items() if tensor is not None}
    with checkpoint.writing(out) as folder:
        specs = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in made.items()}
        checkpoint.write_tensors(folder, specs, made.__getitem__)
        shutil.copytree(origin / "huggingface", folder / "huggingface")
        dataclasses.replace(found, **manifest).write(folder)
    return out


@pytest.fixture(scope="module")
def stage(tmp_path_factory, combined):
    """The projector one step on, beside the models it was trained from."""
    out = combined.parents[1] / "train/pretrain/checkpoints/iteration_0000007"
    found = checkpoint.read_manifest(combined)
    stage = {"kind": "stage", "parts": ("vision_projection",), "sources": {}, "stage": "pretrain", "iteration": 7}
    parent = Parent(os.path.relpath(combined, out), found.identity)
    write(out, combined, lambda key, x: x + 0.5, only="vision_projection", training="t", parent=parent, **stage)
    (out.parent / "latest").write_text(out.name + "\n")
    return out.parents[1]


def described(directory, capsys, **options):
    capsys.readouterr()
    show(directory, as_json=True, **options)
    return json.loads(capsys.readouterr().out)


def hashes(directory, capsys, layers=False):
    return {
        line["name"]: line["sha256"] for line in described(directory, capsys, layers=layers, hashes=True)["weights"]
    }


def test_the_manifests_alone_need_no_torch(stage):
    code = f"""
import sys
from vlm import cli
assert cli.main(["checkpoint", "show", {str(stage)!r}, "--only-manifest"]) == 0
sys.exit("torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "stage pretrain, iteration 7" in run.stdout and "trained from" in run.stdout
    assert cli.main(["checkpoint", "show", str(stage), "--only-manifest", "--hash"]) == 2


def test_a_stage_is_described_with_its_parents(stage, combined, capsys):
    found = described(stage, capsys, layers=True)
    manifest = checkpoint.read_manifest(checkpoint.resolve(stage))
    assert (found["kind"], found["stage"], found["iteration"]) == ("stage", "pretrain", 7)
    assert found["identity"] == manifest.identity
    assert [parent["identity"] for parent in found["parents"]] == [checkpoint.read_manifest(combined).identity]
    tensors = Tensors(combined)
    lines = {line["name"]: line for line in found["weights"]}
    layer = [key for key in tensors.specs if key.startswith("language_model.decoder.layers.2.")]
    sizes = [tensors.read(key) for key in layer]
    assert lines["language_model.decoder.layers.2"] == {
        "name": "language_model.decoder.layers.2",
        "tensors": len(layer),
        "parameters": sum(x.numel() for x in sizes),
        "bytes": sum(x.nbytes for x in sizes),
        "dtypes": ["float32"],
    }
    assert sum(line["tensors"] for line in found["weights"]) == len(tensors.specs)
    show(stage)
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in table] == ["weights", *sorted(checkpoint.PARTS.values()), "all"]
    assert len({line.index("float32") for line in table[1:]}) == 1, "columns are aligned"


def test_hashes_do_not_know_the_format_or_the_layout(tmp_path, combined, capsys):
    expected = hashes(combined, capsys)
    assert len(set(expected.values())) == 3
    for size in (1, 2):
        legacy.export(combined, tmp_path / "legacy", size)
        assert hashes(tmp_path / "legacy", capsys) == expected
    llava.export(combined, tmp_path / "llava")
    assert hashes(tmp_path / "llava", capsys) == expected
    write(tmp_path / "again", combined, reverse=True)
    assert hashes(tmp_path / "again", capsys) == expected
    for part in ("language", "vision"):
        name = checkpoint.PARTS[part]
        assert hashes(combined.parent / "hub" / part, capsys) == {name: expected[name]}


@pytest.mark.parametrize(
    "change",
    [
        lambda x: torch.cat([x[1:], x[:1]]),
        lambda x: x.bfloat16(),
        lambda x: x.reshape(x.shape[::-1]),
        lambda x: torch.nextafter(x, x + 1),
    ],
    ids=["rows-in-another-order", "another-type", "another-shape", "last-bits"],
)
def test_a_hash_knows_what_a_weight_is(tmp_path, combined, capsys, change):
    write(tmp_path / "changed", combined, lambda key, x: change(x) if key == KEY else x)
    before, after = hashes(combined, capsys, layers=True), hashes(tmp_path / "changed", capsys, layers=True)
    assert {name for name in before if before[name] != after[name]} == {"language_model.decoder.layers.1"}


def test_equal_weights_are_equal_in_every_format(tmp_path, combined, capsys):
    legacy.export(combined, tmp_path / "legacy", 2)
    llava.export(combined, tmp_path / "llava")
    for other in (tmp_path / "legacy", tmp_path / "llava", combined):
        assert cli.main(["checkpoint", "diff", str(combined), str(other)]) == 0
        assert "all 68 weights are equal" in capsys.readouterr().out
    assert cli.main(["checkpoint", "diff", str(combined), str(combined.parent / "hub/language")]) == 1
    assert f"vision_model: all 43 only in {combined}" in capsys.readouterr().out


def test_a_difference_is_said_with_its_size(tmp_path, combined, capsys):
    def change(key, x):
        if key == KEY:
            x[0, :2] += torch.tensor([0.25, -0.5])
        return None if key == "language_model.output_layer.weight" else x[:-1] if key == FC1 else x

    found = checkpoint.read_manifest(combined)
    other = write(tmp_path / "other", combined, change, settings=found.settings | {"seed": 77})
    assert cli.main(["checkpoint", "diff", str(combined), str(other)]) == 1
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["settings.seed", "1234", "77"] in lines
    assert f"  language_model.output_layer.weight: only in {combined}" in out
    assert f"  {FC1}: shape [48, 32] and [47, 32]" in out
    norm = float(Tensors(combined).read(KEY).double().norm())
    relative = f"{(0.25**2 + 0.5**2) ** 0.5 / norm:.3g}"
    assert ["decoder.layers.1", "1", "of", "6", "2", "0.5", relative] in lines
    assert ["language_model", "1", "of", "21", "2", "0.5", relative] in lines
    assert "layers.0" not in out and "vision_model" not in out


def test_manifests_that_differ_do_not_count(tmp_path, combined, capsys):
    other = write(tmp_path / "other", combined, sources={"language/config.json": "another"})
    assert cli.main(["checkpoint", "diff", str(combined), str(other)]) == 0
    assert "sources.language/config.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "first, second, values, largest",
    [
        ([1.0, float("nan")], [1.0, float("nan")], None, None),
        ([1.0, float("nan")], [1.5, float("nan")], 1, 0.5),
        ([1.0, 2.0], [3.0, float("nan")], 2, float("nan")),
        ([0.0, 1.0], [-0.0, 1.0], 1, 0.0),
    ],
    ids=["equal-nan", "beside-equal-nan", "nan-against-a-number", "another-zero"],
)
def test_values_are_compared_by_their_bits(monkeypatch, first, second, values, largest):
    from vlm.describe import diff

    monkeypatch.setattr(diff, "_BLOCK", 1)  # so that blocks are added up
    found = compare(torch.tensor(first), torch.tensor(second))
    if values is None:
        assert found is None
    else:
        assert (found.tensors, found.values) == (1, values)
        torch.testing.assert_close(found.largest, largest, equal_nan=True)


def test_types_are_compared_by_their_values():
    assert compare(torch.tensor([0.5, 3.0]), torch.tensor([0.5, 3.0]).bfloat16()) is None
    found = compare(torch.tensor([0.5, 1.0 + 2**-10]), torch.tensor([0.5, 1.0]).bfloat16())
    assert (found.values, found.largest) == (1, 2**-10)


def test_numbers_in_names_are_numbers():
    assert in_order(["layers.10.b", "layers.9.a", "embedding"]) == ["embedding", "layers.9.a", "layers.10.b"]


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        assert cli.main(["checkpoint", "show", str(path)]) == 2
        assert str(path) in capsys.readouterr().err
