"""The ranks of one machine: how they are told who they are, asked to end, and what their end becomes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm.config import Parallel
from vlm.train import launch

SIZES = {"tensor": 1, "pipeline": 1, "sequence": False, "distributed_optimizer": False, "recompute": False}


def parallel(nodes: int = 1, ranks_per_node: int = 2) -> Parallel:
    return Parallel(nodes=nodes, ranks_per_node=ranks_per_node, **SIZES)


def by_rank(*bodies: str) -> list[str]:
    """A command that does something else on every rank."""
    return [sys.executable, "-c", f"import os, sys, time\nexec({list(bodies)!r}[int(os.environ['RANK'])])"]


@pytest.mark.parametrize(
    ("bodies", "code"),
    [
        pytest.param(("pass", "pass"), 0, id="all-well"),
        pytest.param(("sys.exit(75)", "sys.exit(75)"), 75, id="all-stopped"),
        pytest.param(("time.sleep(60)", "sys.exit(2)"), 2, id="one-refuses"),
        pytest.param(("os.kill(os.getpid(), 9)", "time.sleep(60)"), 1, id="one-is-killed"),
        pytest.param(("sys.exit(143)", "sys.exit(143)"), 143, id="asked-twice"),
    ],
)
def test_the_end_of_the_ranks_is_the_end_of_the_launcher(monkeypatch, capfd, bodies, code):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.2)
    started = time.monotonic()
    assert launch.run(by_rank(*bodies), parallel()) == code
    assert time.monotonic() - started < 30, "the others were waited for"
    said = capfd.readouterr().err
    assert ("rank 0 was killed by SIGKILL" in said) == ("os.kill" in bodies[0])


def test_every_rank_knows_its_place(capfd):
    show = "print(*[os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')])"
    assert launch.run(by_rank(show, show), parallel()) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["0 0 2 127.0.0.1", "1 1 2 127.0.0.1"]


def test_on_several_machines_each_starts_its_own(capfd, monkeypatch):
    for name, value in {"MASTER_ADDR": "head", "MASTER_PORT": "29500", "SLURM_NODEID": "1"}.items():
        monkeypatch.setenv(name, value)
    show = "print(*[os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')])"
    assert launch.run(by_rank(*4 * [show]), parallel(nodes=2)) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["2 0 4 head", "3 1 4 head"]


def test_a_machine_that_does_not_know_its_number_is_refused(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="parallel.nodes: is 2, but MASTER_ADDR, MASTER_PORT, NODE_RANK is not set"):
        launch.run(by_rank("pass"), parallel(nodes=2))


@pytest.mark.parametrize(
    ("step", "words"),
    [
        pytest.param({"SLURM_STEP_NUM_NODES": "1"}, "promises 2 machines, SLURM started this on 1", id="fewer-nodes"),
        pytest.param(
            {"SLURM_STEP_GPUS": "3"}, "SLURM gave this machine 1: submit with `--gres=gpu:2`", id="fewer-gpus"
        ),
    ],
)
def test_an_allocation_that_is_too_small_is_refused(monkeypatch, step, words):
    for name, value in {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_GPUS": "0,1", **step}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        launch.run(by_rank("pass"), parallel(nodes=2))


def test_started_ranks_start_no_others(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launch.needed(parallel()) and not launch.needed(parallel(ranks_per_node=1))
    monkeypatch.setenv("RANK", "0")
    assert not launch.needed(parallel())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_requests_are_passed_on(tmp_path: Path, number: signal.Signals) -> None:
    """To ranks in sessions of their own, which no terminal would reach, and which may still be importing."""
    rank = (
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).touch()\n"
        "time.sleep(1)\n"
        "from vlm.train.stop import Stop\n"
        "with Stop() as stop:\n"
        "    while not stop.code: time.sleep(0.05)\n"
        "sys.exit(75)"
    )
    start = (
        "import sys\nfrom vlm.config import Parallel\nfrom vlm.train import launch\n"
        f"sys.exit(launch.run([sys.executable, '-c', {rank!r}], Parallel(nodes=1, ranks_per_node=2, **{SIZES!r})))"
    )
    process = subprocess.Popen([sys.executable, "-c", start], env=os.environ)
    while len(list(tmp_path.iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) == 75
