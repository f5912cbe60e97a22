"""Training as SLURM jobs over two nodes: the same result as on one machine, whatever happens on the way."""

from __future__ import annotations

import signal

import pytest
from training import ITERATIONS, Run, wait_until

from vlm import config as settings
from vlm import resources

pytestmark = pytest.mark.slurm


def test_two_nodes_with_two_ranks_each(run: Run) -> None:
    """The job that SLURM ran is the one that was estimated, and its weights are those of one machine with four ranks."""
    done = run.snakemake("pretrain")
    assert done.returncode == 0, done.stdout + run.log()
    run.assert_undisturbed()
    config = settings.load(run.folder / "results/tiny/config.yaml")
    need = resources.of_training(config, "pretrain", resources.bases(config), resources.gpu("h100"))
    job = run.training_job()
    assert job["JobState"] == "COMPLETED" and job["NumNodes"] == str(need.nodes) == "2"
    assert job["TimeLimit"] == f"00:{need.runtime_minutes:02d}:00"
    assert job["MinMemoryNode"] == f"{need.mem_mb}M"
    asked = dict(one.split("=") for one in job["TRES"].split(","))
    assert asked["gres/gpu"] == str(2 * need.gpus_per_node) == "4"
    assert 0 <= int(asked["cpu"]) - 2 * need.cpus_per_task < 4


def test_cancelled_and_stopped_at_its_time_limit(run: Run) -> None:
    """First scancel, then the warning before the limit; each costs a retry that goes on, and the end is the same."""
    run.write_profile(train={"slurm_extra": "--signal=USR1@45", "runtime": 1})
    snakemake = run.start("pretrain")
    first = run.await_checkpoint()
    cancelled = run.training_job()["JobId"]
    run.cluster.run("scancel", cancelled)
    assert snakemake.wait(300) == 0, run.log()
    run.assert_undisturbed()
    said = run.log()
    assert "was stopped" in said or "SIGUSR1" in said, said
    assert first < ITERATIONS


def test_snakemake_is_interrupted(run: Run) -> None:
    """Ctrl-C takes the jobs along; the same command goes on."""
    snakemake = run.start("pretrain")
    run.await_checkpoint()
    snakemake.send_signal(signal.SIGINT)
    assert snakemake.wait(60) != 0
    wait_until(lambda: run.training_job()["JobState"] == "CANCELLED", run.log)
    again = run.snakemake("pretrain")
    assert again.returncode == 0, again.stdout + run.log()
    run.assert_undisturbed()
