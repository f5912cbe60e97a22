"""What is refused before anything heavy is imported, and how: the key, both values, what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vlm import config as configuration
from vlm.checkpoint import Manifest
from vlm.train import identity
from vlm.train.plan import prepare

ROOT = Path(__file__).parents[2]
LANGUAGE = {"architectures": ["MistralForCausalLM"], "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8} | {
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "sliding_window": None,
}
VISION = {
    "architectures": ["CLIPVisionModel"],
    "hidden_size": 24,
    "num_attention_heads": 2,
    "intermediate_size": 32,
} | {
    "num_hidden_layers": 2,
    "image_size": 64,
    "patch_size": 8,
}


def settings(**changes):
    tree = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    tree["parallel"] |= {"ranks_per_node": 1, "tensor": 1}
    for path, value in changes.items():
        node = tree
        *keys, last = path.split("__")
        for key in keys:
            node = node[key]
        node[last] = value
    return configuration.validate(tree)


def write_checkpoint(folder: Path, **manifest) -> Path:
    config = settings()
    for part, content in (("language", LANGUAGE), ("vision", VISION)):
        (folder / "huggingface" / part).mkdir(parents=True)
        (folder / "huggingface" / part / "config.json").write_text(json.dumps(content))
    fields = {"kind": "combined", "parts": ("vision_model", "vision_projection", "language_model")} | manifest
    Manifest(
        models=config.models.model_dump(mode="json"), settings={"image_resize": config.data.image_resize}, **fields
    ).write(folder)
    return folder


@pytest.fixture
def place(tmp_path) -> Path:
    write_checkpoint(tmp_path / "combined")
    for name in ("pretrain", "sft"):
        (tmp_path / "data" / name / ".nv-meta").mkdir(parents=True)
        (tmp_path / "data" / name / "shard-000000.tar").write_bytes(bytes(1024))
    return tmp_path


def plan(place: Path, stage: str = "pretrain", start_from: str = "combined", **changes):
    return prepare(settings(**changes), stage, place / start_from, place / "data", place / "out")


def test_plan_of_a_good_stage(place):
    made = plan(place, parallel__ranks_per_node=4, parallel__tensor=2, stages__pretrain__global_batch=40)
    assert made.parent == place / "combined" and made.data == {"pretrain": place / "data/pretrain"}
    assert made.num_micro_batches == 20, "40 packed sequences over two data-parallel ranks"
    assert made.finished() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": "pretrian"}, r"--stage: 'pretrian' is not a stage, .*did you mean 'pretrain'"),
        ({"start_from": "nowhere"}, r"nowhere: does not exist"),
        ({"stage": "sft"}, r"stages\.sft\.start_from: is 'pretrain', but --start-from .*combined holds 'combined'"),
        ({"models__projector__hidden_size": 8}, r"models\.projector\.hidden_size: is 8, but .*combined .* 4096"),
        ({"models__projector__bias": False}, r"models\.projector\.bias: is False, but .* with True"),
        ({"models__vision__feature_layer": -2}, r"models\.vision\.feature_layer: is -2, but .* with -1"),
        ({"models__language__image_token": "<s>"}, r"models\.language\.image_token: is '<s>', but .*control_8"),
        ({"data__image_resize": "crop"}, r"data\.image_resize: is 'crop', but .* with 'square'"),
        ({"stages__pretrain__sequence_length": 68}, r"stages\.pretrain\.sequence_length: 68 .* 64 tokens .* 69 are"),
        (
            {"parallel__ranks_per_node": 8, "parallel__tensor": 8},
            r"num_attention_heads 4 is not a multiple of parallel\.tensor 8",
        ),
        (
            {"parallel__ranks_per_node": 4, "parallel__pipeline": 4},
            r"num_hidden_layers 2 is not a multiple of parallel\.pipeline 4",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_refusals(place, arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(place, **arguments)


def test_missing_data_is_named(place):
    (place / "data/pretrain").rename(place / "data/elsewhere")
    with pytest.raises(FileNotFoundError, match=r"data/pretrain does not exist: run `vlm data shard`"):
        plan(place)


def stopped_parent(place: Path, iteration: int) -> Path:
    name = f"iteration_{iteration:07d}"
    folder = write_checkpoint(
        place / "pretrain" / "checkpoints" / name,
        kind="stage",
        stage="pretrain",
        iteration=iteration,
        parts=("vision_projection",),
    )
    (folder.parent / "latest").write_text(name + "\n")
    return folder


def test_unfinished_parent_is_refused_unless_named_outright(place):
    folder = stopped_parent(place, 150)
    with pytest.raises(ValueError, match=r"stages\.pretrain\.iterations: is 20000, but .*pretrain stopped at 150"):
        plan(place, stage="sft", start_from="pretrain")
    assert plan(place, stage="sft", start_from=str(folder.relative_to(place))).parent == folder
    done = plan(place, stage="sft", start_from="pretrain", stages__pretrain__iterations=150)
    assert done.parent == folder


def test_finished_needs_report_identity_and_last_checkpoint(place):
    made = plan(place, stages__pretrain__iterations=7)
    name = "iteration_0000007"
    checkpoints = place / "out" / "checkpoints"
    folder = write_checkpoint(checkpoints / name, kind="stage", stage="pretrain", iteration=7)
    (checkpoints / "latest").write_text(name)
    identity.write(checkpoints, made.identity)
    assert made.finished() is None, "there is no report"
    (place / "out" / "finished.json").write_text(json.dumps({"checkpoint": f"checkpoints/{name}"}))
    assert made.finished() == folder
    assert plan(place, stages__pretrain__iterations=7, stages__pretrain__save_interval=2000).finished() == folder
    assert plan(place, stages__pretrain__iterations=7, seed=9).finished() is None
    assert plan(place, stages__pretrain__iterations=8).finished() is None


PATIENT = {"stages__pretrain__validation_interval": 1000}


@pytest.mark.parametrize(
    ("early_stop", "stopped_early", "accepted"),
    [
        pytest.param(3, 3, True, id="as-it-says"),
        pytest.param(2, 3, True, id="less-patience-than-then"),
        pytest.param(4, 3, False, id="more-patience-than-then"),
        pytest.param(None, 3, False, id="no-early-stop-now"),
        pytest.param(3, None, False, id="it-did-not-stop-early"),
    ],
)
def test_a_stage_that_stopped_early_is_finished_for_as_little_patience(place, early_stop, stopped_early, accepted):
    changes = PATIENT | {"stages__pretrain__early_stop": early_stop}
    folder = stopped_parent(place, 150)
    made = prepare(settings(**changes), "pretrain", place / "combined", place / "data", place / "pretrain")
    identity.write(folder.parent, made.identity)
    report = {"checkpoint": f"checkpoints/{folder.name}", "iterations": 150, "stopped_early": stopped_early}
    (place / "pretrain" / "finished.json").write_text(json.dumps(report))
    assert made.finished() == (folder if accepted else None)
    for start_from in ("pretrain", "pretrain/checkpoints"):
        if accepted:
            assert plan(place, stage="sft", start_from=start_from, **changes).parent == folder
        else:
            with pytest.raises(ValueError, match=r"is 20000, but .* stopped at 150"):
                plan(place, stage="sft", start_from=start_from, **changes)


def test_a_report_of_another_iteration_finishes_nothing(place):
    changes = PATIENT | {"stages__pretrain__early_stop": 1}
    stopped_parent(place, 150)
    report = {"checkpoint": "checkpoints/iteration_0000150", "iterations": 100, "stopped_early": 1}
    (place / "pretrain" / "finished.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="stopped at 150"):
        plan(place, stage="sft", start_from="pretrain", **changes)


def test_planning_needs_no_torch():
    code = "import sys, vlm.train.run; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
