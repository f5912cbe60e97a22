"""A run that is asked to end saves the step it is in, says so, and goes on as if it had never been asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import train_process
import train_workspace
from train_process import Event
from train_runs import assert_same, log
from train_workspace import ITERATIONS

STEP = "vlm.train.step:Step.__call__"
STOPPED = 75


def saved(out: Path) -> str:
    return (out / "checkpoints/latest").read_text().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_asked_in_a_step_it_saves_that_step(runs, tmp_path, number):
    out = tmp_path / "asked"
    assert runs.train("sft", out, Event(STEP, 5, train_process.ask, (number,))) == STOPPED
    lines = [line[line.index("vlm: ") :] for line in log(out).splitlines() if "vlm: " in line]
    assert lines[0] == f"vlm: {number.name}: saving after this iteration; once more to leave at once"
    said = f"vlm: sft: stopped by {number.name} after iteration 5 of {ITERATIONS}, all of it is in {out}/checkpoints/"
    assert lines[1:] == [f"{said}iteration_0000005; the same command goes on from there"]
    assert saved(out) == "iteration_0000005" and "Traceback" not in log(out)
    assert runs.train("sft", out) == 0
    assert_same(out, runs.undisturbed("sft"))


@pytest.mark.parametrize(
    ("target", "call", "iteration"),
    [
        pytest.param("vlm.checkpoint:load_model", 1, None, id="before-the-first-step"),
        pytest.param("vlm.checkpoint.model:write_state", 1, 3, id="in-a-save"),
        pytest.param(STEP, ITERATIONS, ITERATIONS, id="in-the-last-step"),
    ],
)
def test_asked_elsewhere_it_saves_nothing_twice(runs, tmp_path, target, call, iteration):
    out = tmp_path / "asked"
    code = runs.train("sft", out, Event(target, call, train_process.ask, (signal.SIGTERM,)))
    assert code == (0 if iteration == ITERATIONS else STOPPED), log(out)
    folders = [path.name for path in sorted((out / "checkpoints").glob("*iteration*"))]
    assert folders[-1:] == ([] if iteration is None else [f"iteration_{iteration:07d}"])
    assert runs.train("sft", out) == 0
    assert_same(out, runs.undisturbed("sft"))


def test_one_request_that_arrives_twice_is_one(runs, tmp_path):
    """A launcher passes on what SLURM has already told every process."""
    out = tmp_path / "twice"
    assert runs.train("sft", out, Event(STEP, 5, train_process.ask, (signal.SIGTERM, 3, 0.1))) == STOPPED
    assert saved(out) == "iteration_0000005"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_loader_processes_do_not_end_before_the_step(runs, tmp_path, number):
    out, config = tmp_path / "asked", tmp_path / "config.yaml"
    train_workspace.changed(runs.config, config, data__workers=1)
    assert runs.train("pretrain", out, Event(STEP, 5, train_process.ask_all, (number,)), config=config) == STOPPED
    assert saved(out) == "iteration_0000005" and "Traceback" not in log(out)
    assert runs.train("pretrain", out, config=config) == 0, log(out)


@pytest.mark.parametrize("target", [STEP, "vlm.checkpoint.model:write_state"], ids=["in-a-step", "in-a-save"])
def test_asked_again_it_leaves_at_once(runs, tmp_path, target):
    """Though the main thread cannot notice: it is as deaf as one that waits for a rank that will not come."""
    out = tmp_path / "again"
    event = Event(target, 2, train_process.ask_while_busy, (signal.SIGINT,))
    process = runs.start("sft", out, event, values={"vlm.train.stop:ONE_REQUEST_SECONDS": 0.1})
    assert train_process.finish(process, seconds=15) == 128 + signal.SIGINT
    assert not (out / "checkpoints/latest").exists() or saved(out) == "iteration_0000003"
    assert runs.train("sft", out) == 0
    assert_same(out, runs.undisturbed("sft"))


def test_a_time_budget_ends_it_while_there_is_time_to_save(runs, tmp_path):
    out = tmp_path / "budget"
    slow = [Event(STEP, call, time.sleep, (1.5,)) for call in range(1, ITERATIONS + 1)]
    started = time.monotonic()
    assert runs.train("sft", out, *slow, stop_after="12s") == STOPPED
    assert time.monotonic() - started < 12
    assert "sft: stopped by --stop-after after iteration" in log(out)
    assert 1 <= int(saved(out).split("_")[1]) < ITERATIONS
    assert runs.train("sft", out) == 0
    assert_same(out, runs.undisturbed("sft"))


def test_a_budget_that_is_no_time_is_refused(runs, tmp_path):
    assert runs.train("sft", tmp_path / "none", stop_after="soon") == 2
    assert "--stop-after: 'soon' is no time" in log(tmp_path / "none")


@pytest.fixture(scope="module")
def two_ranks(runs, tmp_path_factory) -> tuple[Path, Path]:
    """Settings for two data-parallel ranks, and what an undisturbed training leaves."""
    folder = tmp_path_factory.mktemp("ranks")
    config = train_workspace.changed(runs.config, folder / "config.yaml", parallel__ranks_per_node=2)
    ranks = runs.start_ranks("pretrain", folder / "undisturbed", config=config)
    assert [train_process.finish(rank) for rank in ranks] == [0, 0], log(folder / "undisturbed")
    return config, folder / "undisturbed"


def test_what_one_rank_is_asked_all_do_at_the_same_iteration(runs, two_ranks, tmp_path):
    config, undisturbed = two_ranks
    out = tmp_path / "asked"
    asked = {1: [Event(STEP, 5, train_process.ask, (signal.SIGTERM,))]}
    ranks = runs.start_ranks("pretrain", out, asked, config=config)
    assert [train_process.finish(rank) for rank in ranks] == [STOPPED, STOPPED], log(out)
    assert saved(out) == "iteration_0000005"
    ranks = runs.start_ranks("pretrain", out, config=config)
    assert [train_process.finish(rank) for rank in ranks] == [0, 0], log(out)
    assert_same(out, undisturbed)


def test_the_launcher_passes_the_request_on_and_the_code_back(runs, two_ranks, tmp_path):
    config, undisturbed = two_ranks
    out = tmp_path / "launched"
    options = {"config": config, "stage": "pretrain", "out": out, "start-from": runs.workspace.combined}
    arguments = [f"--{name}={value}" for name, value in {**options, "data": runs.workspace.data}.items()]
    command = [sys.executable, "-m", "vlm.cli", "train", *arguments]
    plain = {name: value for name, value in os.environ.items() if name != "RANK"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=plain)
    assert process.stderr is not None
    while not (out / "checkpoints/identity.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == STOPPED, said
    assert said.count("stopped by SIGTERM after iteration") == 1 and "Traceback" not in said
    ranks = runs.start_ranks("pretrain", out, config=config)
    assert [train_process.finish(rank) for rank in ranks] == [0, 0], log(out)
    assert_same(out, undisturbed)
