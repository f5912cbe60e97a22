"""Training as SLURM jobs over two nodes with two ranks each, and the same result as on one machine with four."""

from __future__ import annotations

import re

import pytest
from cluster import Cluster
from training import Run

pytestmark = pytest.mark.slurm


def test_asked_to_save_then_cancelled(run: Run, cluster: Cluster) -> None:
    """SIGUSR1 is what SLURM sends before the time limit. Each costs a retry that goes on, to the same weights."""
    snakemake = run.start("pretrain")
    saved = 0
    for way in (["scancel", "--signal=USR1"], ["scancel"]):
        saved = run.await_checkpoint(above=saved)
        job = run.training_job()["JobId"]
        # Given, not only asked for: on both nodes both GPUs.
        given = cluster.run("scontrol", "show", "job", "--details", "--oneliner", job)
        assert re.findall(r"Nodes=(\S+) CPU_IDs=\S+ Mem=\d+ GRES=(\S+)", given) == [("n[1-2]", "gpu:2(IDX:0-1)")]
        cluster.run(*way, job)
        run.await_next_job(job)
        saved = max(saved, run.iteration())
    assert snakemake.wait(300) == 0, run.log()
    run.assert_undisturbed()
    for name in ("SIGUSR1", "SIGTERM"):
        assert f"stopped by {name} after iteration" in run.log()
    assert [job["JobState"] for job in run.jobs()] == ["FAILED", "CANCELLED", "COMPLETED"]
    run.assert_as_planned("pretrain", run.jobs())
