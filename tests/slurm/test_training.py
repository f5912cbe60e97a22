"""Training as SLURM jobs over two nodes with two ranks each, and the same result as on one machine with four."""

from __future__ import annotations

import pytest
from cluster import Cluster
from training import Run

from vlm import config as settings
from vlm import resources

pytestmark = pytest.mark.slurm


def test_asked_to_save_then_cancelled(run: Run, cluster: Cluster) -> None:
    """SIGUSR1 is what SLURM sends before the time limit. Each costs a retry that goes on, to the same weights."""
    snakemake = run.start("pretrain")
    saved = 0
    for way in (["scancel", "--signal=USR1"], ["scancel"]):
        saved = run.await_checkpoint(above=saved)
        job = run.training_job()["JobId"]
        cluster.run(*way, job)
        run.await_next_job(job)
        saved = max(saved, run.iteration())
    assert snakemake.wait(300) == 0, run.log()
    run.assert_undisturbed()
    for name in ("SIGUSR1", "SIGTERM"):
        assert f"stopped by {name} after iteration" in run.log()
    assert [job["JobState"] for job in run.jobs()] == ["FAILED", "CANCELLED", "COMPLETED"]
    assert_as_estimated(run)


def assert_as_estimated(run: Run) -> None:
    """SLURM gave each job the nodes, GPUs, memory and time that `vlm.resources` says."""
    config = settings.load(run.results / "config.yaml")
    need = resources.of_training(config, "pretrain", resources.bases(config), resources.gpu("h100"))
    for job in run.jobs():
        assert job["NumNodes"] == str(need.nodes) == "2"
        assert job["TimeLimit"] == f"00:{need.runtime_minutes:02d}:00"
        assert job["TresPerNode"] == f"gres:gpu:{need.gpus_per_node}" == "gres:gpu:2"
        assert job["MinMemoryNode"] == f"{need.mem_mb}M"
        assert 0 <= int(job["NumCPUs"]) - 2 * need.cpus_per_task < 4
