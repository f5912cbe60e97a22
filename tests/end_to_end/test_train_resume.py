"""Whatever kills a run, it ends as if it had been left alone: weights, optimizer, generators, loader and losses."""

from __future__ import annotations

import json
import re
import shutil
import time

import pytest
import torch
import train_workspace
from train_process import Event
from train_runs import NAMED_AT_NEXT_STEP, assert_same, content, log
from train_workspace import ITERATIONS

from vlm.train.metrics import read_lines

STAGES = ("pretrain", "sft")


def test_training_moves_what_it_should_and_reports_it(runs):
    out = runs.undisturbed("sft")
    report = json.loads((out / "finished.json").read_text())
    assert report["iterations"] == ITERATIONS and report["checkpoint"] == f"checkpoints/iteration_{ITERATIONS:07d}"
    assert [line["iteration"] for line in read_lines(out / "metrics.jsonl")] == [2, 4, 6, 8, 10]
    assert report["last_loss"] < report["first_loss"] - 0.5
    filled = report["tokens"] / (ITERATIONS * 2 * 256)  # of the workspace's global_batch x sequence_length
    assert report["packing_efficiency"] == pytest.approx(filled, abs=1e-4) and 0.5 < filled < 1
    names = content(out / report["checkpoint"]).keys()
    assert any("language_model" in name for name in names) and not any("vision_model" in name for name in names)
    pretrained = content(runs.undisturbed("pretrain") / report["checkpoint"]).keys()
    assert not any("language_model" in name or "vision_model" in name for name in pretrained)
    frozen = json.loads((runs.undisturbed("pretrain") / "finished.json").read_text())
    assert frozen["frozen_parameters"] > frozen["trained_parameters"]
    total = frozen["trained_parameters"] + frozen["frozen_parameters"]
    assert report["trained_parameters"] + report["frozen_parameters"] == total


@pytest.mark.parametrize("stage", STAGES)
def test_same_seed_same_run(runs, tmp_path, stage):
    assert runs.train(stage, tmp_path / "again") == 0
    assert_same(tmp_path / "again", runs.undisturbed(stage))


@pytest.mark.parametrize(
    ("function", "call"),
    [
        pytest.param("vlm.checkpoint:load_model", 1, id="before-anything"),
        pytest.param("vlm.train.step:Step.__call__", 3, id="before-the-first-checkpoint"),
        pytest.param("vlm.train.step:Step.__call__", 9, id="in-the-middle-of-a-log-interval"),
        pytest.param("vlm.checkpoint.model:write_state", 2, id="in-a-save"),
        pytest.param("vlm.files:put_in_place", 2, id="saved-but-not-named"),
        pytest.param("vlm.checkpoint.places:point_to", 2, id="named-but-not-latest"),
        pytest.param("vlm.checkpoint.places:point_to", 4, id="last-checkpoint-not-latest"),
        pytest.param("vlm.files:write_json", 6, id="finished-but-not-said"),
    ],
)
def test_killed_at(runs, tmp_path, function, call):
    out = tmp_path / "killed"
    assert runs.train("sft", out, (function, call)) == -9
    assert not (out / "finished.json").exists()
    assert runs.train("sft", out) == 0, log(out)
    assert_same(out, runs.undisturbed("sft"))


def test_killed_in_bfloat16(runs, tmp_path):
    """The fp32 masters come back, not the rounded weights."""
    config = train_workspace.changed(runs.config, tmp_path / "c.yaml", dtype="bfloat16")
    parent = runs.workspace.combined
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert runs.train("pretrain", alone, config=config, start_from=parent) == 0
    assert runs.train("pretrain", killed, ("vlm.train.step:Step.__call__", 5), config=config, start_from=parent) == -9
    assert runs.train("pretrain", killed, config=config, start_from=parent) == 0
    assert_same(killed, alone)
    tensors = content(alone / f"checkpoints/iteration_{ITERATIONS:07d}")
    dtypes = {name.split(".vision_projection")[0]: item.dtype for name, item in tensors.items() if "fc1.weight" in name}
    assert dtypes["optimizer.state.fp32_param"] == torch.float32
    assert dtypes["vision_projection.encoder.linear_fc1.weight"] == torch.bfloat16


def test_killed_with_a_loader_process(runs, tmp_path):
    config = train_workspace.changed(runs.config, tmp_path / "c.yaml", data__workers=1)
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert runs.train("pretrain", alone, config=config) == 0
    assert runs.train("pretrain", killed, ("vlm.train.step:Step.__call__", 9), config=config) == -9
    assert runs.train("pretrain", killed, config=config) == 0
    assert_same(killed, alone)


def test_training_goes_on_while_a_checkpoint_is_written(runs, tmp_path):
    """And what is not on disk yet is not there for anyone, also when the run is killed."""
    out = tmp_path / "killed"
    slow = Event("vlm.checkpoint.pending:write", 1, time.sleep, (300.0,))
    assert runs.train("sft", out, slow, ("vlm.train.step:Step.__call__", 6)) == -9
    assert not (out / "checkpoints/latest").exists() and not list((out / "checkpoints").glob("iteration_*"))
    assert runs.train("sft", out) == 0, log(out)
    assert_same(out, runs.undisturbed("sft"))


def test_remains_of_a_killed_save_are_cleared(runs, tmp_path):
    """Though it would now be another iteration that is saved."""
    out = tmp_path / "killed"
    assert runs.train("sft", out, ("vlm.checkpoint.pending:Pending.finish", 2)) == -9
    assert list((out / "checkpoints").glob(".iteration_0000006*"))
    config = train_workspace.changed(runs.config, tmp_path / "c.yaml", stages__sft__save_interval=5)
    assert runs.train("sft", out, config=config) == 0, log(out)
    assert not list((out / "checkpoints").glob(".*"))
    assert_same(out, runs.undisturbed("sft"))


def test_torn_metrics_line_is_written_again(runs, tmp_path):
    out = tmp_path / "torn"
    assert runs.train("sft", out, ("vlm.train.step:Step.__call__", 6)) == -9
    with open(out / "metrics.jsonl", "a") as stream:
        stream.write('{"iteration": 6, "lo')
    assert runs.train("sft", out) == 0
    assert_same(out, runs.undisturbed("sft"))


def test_finished_stage_does_nothing_and_says_so(runs):
    out = runs.undisturbed("pretrain")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    started = time.perf_counter()
    assert runs.train("pretrain", out) == 0
    assert time.perf_counter() - started < 2
    assert "already finished" in log(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_lost_report_is_written_without_training(runs):
    out = runs.folder / "copied" / "pretrain"  # as far from the parent checkpoint as the original
    shutil.copytree(runs.undisturbed("pretrain"), out)
    (out / "finished.json").unlink()
    assert runs.train("pretrain", out, ("vlm.train.step:Step.__call__", 1)) == 0
    assert_same(out, runs.undisturbed("pretrain"))


def test_other_settings_move_the_old_run_aside(runs, tmp_path):
    out = tmp_path / "run"
    assert runs.train("pretrain", out, ("vlm.train.step:Step.__call__", 6), values=NAMED_AT_NEXT_STEP) == -9
    kept = (out / "metrics.jsonl").read_text()
    changed = train_workspace.changed(runs.config, tmp_path / "c.yaml", stages__pretrain__optimizer__lr=5.0e-3)
    elsewhere = train_workspace.changed(changed, tmp_path / "d.yaml", parallel__ranks_per_node=2)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert runs.train("pretrain", out, config=elsewhere, rank=alone) == 2, "two processes are promised, one is started"
    assert (out / "metrics.jsonl").read_text() == kept, "moved for a run that was refused"
    assert runs.train("pretrain", out, config=changed) == 0
    (previous,) = out.glob("previous-*")
    assert (previous / "metrics.jsonl").read_text() == kept
    assert (previous / "checkpoints/iteration_0000003/manifest.json").exists()
    assert "stages.pretrain.optimizer.lr: 0.01 -> 0.005" in log(out)
    assert read_lines(out / "metrics.jsonl")[-1]["iteration"] == ITERATIONS


def test_not_a_number_stops_the_run_and_touches_nothing(runs, tmp_path):
    """A learning rate that overflows: the first step leaves huge finite weights, the second has no loss."""
    out = tmp_path / "broken"
    settings = {"lr": 1e36, "min_lr": 0.0, "warmup_share": 0.0}
    optimizer = train_workspace.OPTIMIZER | settings
    config = train_workspace.changed(
        runs.config, tmp_path / "c.yaml", stages__pretrain__optimizer=optimizer, stages__pretrain__save_interval=1
    )
    assert runs.train("pretrain", out, config=config) == 1
    message = log(out)
    assert (
        "pretrain: iteration 2 is not finite: loss nan" in message or "iteration 2 is not finite: loss inf" in message
    )
    assert re.search(r"samples: (captions|dialogues)/\S+", message)
    assert f"The last good checkpoint is {out}/checkpoints/iteration_0000001; nothing was written over it" in message
    assert (out / "checkpoints/latest").read_text().strip() == "iteration_0000001"
    assert [path.name for path in (out / "checkpoints").glob("*iteration*")] == ["iteration_0000001"]
    assert not (out / "finished.json").exists() and "Traceback" not in message


def test_changed_loader_processes_are_refused_on_resume(runs, tmp_path):
    out = tmp_path / "run"
    assert runs.train("pretrain", out, ("vlm.train.step:Step.__call__", 6), values=NAMED_AT_NEXT_STEP) == -9
    changed = train_workspace.changed(runs.config, tmp_path / "c.yaml", data__workers=1)
    assert runs.train("pretrain", out, config=changed) == 2
    assert re.search(r"data\.workers: is 1, but .*iteration_0000003 was written with 0", log(out))
    assert runs.train("pretrain", out) == 0
    assert_same(out, runs.undisturbed("pretrain"))
