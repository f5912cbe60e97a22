"""The validation loss is measured beside the training and never in it; what it decides survives a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import train_process
import train_workspace
from train_runs import assert_same, content, equal, log
from train_workspace import ITERATIONS

from vlm import checkpoint
from vlm.train.metrics import TIMES, read_lines

WATCHED = {"validation_interval": 2, "validation_batches": 2, "save_interval": 4, "keep": 1}


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> train_workspace.Workspace:
    return train_workspace.make(tmp_path_factory.mktemp("validation"))


@pytest.fixture(scope="session")
def train(workspace):
    def run(name: str, die: tuple[str, int] | None = None, **stage: Any) -> Path:
        """Train `pretrain` with other settings, to its end or until it dies; returns its folder."""
        config = workspace.config(workspace.folder / "config.yaml")
        changes = {f"stages__pretrain__{key}": value for key, value in stage.items()}
        out = workspace.folder / "runs" / name
        out.parent.mkdir(exist_ok=True)
        config = train_workspace.changed(config, out.with_suffix(".yaml"), **changes)
        arguments = {"config": config, "stage": "pretrain", "start_from": workspace.combined, "data": workspace.data}
        events = [train_process.Event(*die, train_process.kill)] if die else []
        process = train_process.start(out.with_suffix(".log"), *events, out=out, **arguments)
        assert train_process.finish(process) == (0 if die is None else -9), log(out)
        return out

    return run


def lines(out: Path, *, validation: bool) -> list[dict[str, float]]:
    found = [line for line in read_lines(out / "metrics.jsonl") if ("validation_loss" in line) == validation]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def finished(out: Path) -> dict[str, Any]:
    return json.loads((out / "finished.json").read_text())


def kept(out: Path) -> list[int]:
    return sorted(int(path.name.split("_")[1]) for path in (out / "checkpoints").glob("iteration_*"))


def test_training_is_the_same_to_the_bit_with_validation_and_without(train):
    with_it, without = train("with", **WATCHED), train("without", save_interval=4)
    assert lines(with_it, validation=False) == lines(without, validation=False)
    assert lines(without, validation=True) == []
    last = f"checkpoints/iteration_{ITERATIONS:07d}"
    ours, theirs = content(with_it / last), content(without / last)
    for own in (ours, theirs):
        del own["rank_00000.pt"]["extra"]["validation"]
    assert [name for name in theirs if not equal(ours[name], theirs[name])] == []

    measured = lines(with_it, validation=True)
    assert [line["iteration"] for line in measured] == [2, 4, 6, 8, 10]
    losses = [line["validation_loss"] for line in measured]
    assert losses[-1] < losses[0] and len(set(losses)) == len(losses)
    for line in measured:
        one, other = line["validation_loss/captions"], line["validation_loss/dialogues"]
        assert min(one, other) <= line["validation_loss"] <= max(one, other) and one != other
    assert finished(with_it)["last_validation_loss"] == losses[-1]
    assert finished(with_it)["lowest_validation_loss"] == min(losses)
    assert finished(with_it)["stopped_early"] is None


# A rate that soon destroys what the first iterations learnt: the lowest loss is an early one.
SPOILT = {
    "trainable": ["projector", "language"],
    "optimizer": train_workspace.OPTIMIZER | {"lr": 0.3, "min_lr": 0.3, "warmup_share": 0.9},
    "save_interval": 2,
    "keep_best": True,
}


def test_the_best_checkpoint_stays_and_is_named(train):
    out = train("best", **WATCHED | SPOILT)
    measured = {line["iteration"]: line["validation_loss"] for line in lines(out, validation=True)}
    best = min(measured, key=lambda iteration: measured[iteration])
    assert best < ITERATIONS, f"the rate does not spoil anything: {measured}"
    assert kept(out) == [best, ITERATIONS]
    assert checkpoint.resolve(out / "checkpoints/best").name == f"iteration_{best:07d}"
    assert finished(out)["best_iteration"] == best and finished(out)["lowest_validation_loss"] == measured[best]
    assert checkpoint.latest(out).name == f"iteration_{ITERATIONS:07d}", "the next stage starts from the last one"


@pytest.mark.parametrize(
    ("function", "call"),
    [
        pytest.param("vlm.train.validation:Validation.__call__", 4, id="in-a-validation"),
        pytest.param("vlm.train.step:Step.__call__", 8, id="between-validations"),
        pytest.param("vlm.checkpoint.places:name_best", 2, id="best-not-yet-named"),
        pytest.param("vlm.checkpoint.places:prune", 3, id="best-named-others-not-gone"),
    ],
)
def test_killed_and_resumed_it_knows_the_best_and_how_long_ago_that_was(train, request, function, call):
    settings = WATCHED | SPOILT | {"early_stop": 2}
    name = request.node.callspec.id
    alone, killed = train("alone", **settings), train(name, (function, call), **settings)
    assert not (killed / "finished.json").exists()
    assert train(name, **settings) == killed
    assert finished(alone)["stopped_early"] == 2
    assert_same(killed, alone, finished(alone)["iterations"])
    assert kept(killed) == kept(alone)
    assert (killed / "checkpoints/best").read_text() == (alone / "checkpoints/best").read_text()


def test_the_last_checkpoint_is_named_the_best_after_a_kill(train):
    """No other save comes that could name it."""
    settings = WATCHED | {"keep_best": True}
    out = train("last-is-best", ("vlm.checkpoint.places:name_best", 3), **settings)
    assert checkpoint.resolve(out / "checkpoints/best").name == "iteration_0000008"
    assert train("last-is-best", **settings) == out
    assert checkpoint.resolve(out / "checkpoints/best") == checkpoint.latest(out)
    assert finished(out)["best_iteration"] == ITERATIONS


def test_a_stage_that_stopped_early_is_finished_and_another_starts_from_it(train, workspace, tmp_path):
    """`train` again on a finished run says so and leaves it alone."""
    settings = WATCHED | SPOILT | {"early_stop": 1, "keep_best": False, "save_interval": 100}
    out = train("early", **settings)
    report, measured = finished(out), lines(out, validation=True)
    assert report["stopped_early"] == 1 and report["iterations"] == measured[-1]["iteration"] < ITERATIONS
    assert measured[-1]["validation_loss"] > measured[-2]["validation_loss"]
    assert kept(out) == [report["iterations"]], "it was not saved where it stopped"
    assert lines(out, validation=False)[-1]["iteration"] == report["iterations"]

    before = (out / "metrics.jsonl").stat().st_mtime_ns
    assert train("early", **settings) == out and "already finished" in log(out)
    assert (out / "metrics.jsonl").stat().st_mtime_ns == before

    config = train_workspace.changed(
        out.with_suffix(".yaml"), tmp_path / "sft.yaml", stages__sft__iterations=1, stages__sft__save_interval=1
    )
    arguments = {"config": config, "stage": "sft", "start_from": out, "data": workspace.data}
    process = train_process.start(tmp_path / "sft.log", out=tmp_path / "sft", **arguments)
    assert train_process.finish(process) == 0, (tmp_path / "sft.log").read_text()

    patient = train("early", **settings | {"early_stop": None})
    assert patient == out and finished(out)["iterations"] == ITERATIONS, "with patience it goes on where it stopped"
    assert "resuming after iteration" in log(out) and not list(out.glob("previous-*"))
