"""Whatever takes a training job away, a plain rerun ends as if nothing had happened. Minutes each: `make slurm`."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest
from cluster import URGENT, Cluster
from training import Made, Run
from workplace import wait_until

pytestmark = pytest.mark.slurm_long


@pytest.fixture
def run(slow: Made, cluster: Cluster, tmp_path):
    one = Run(slow, tmp_path / "run", cluster)
    yield one
    one.end()


def finish(run: Run, snakemake: subprocess.Popen[bytes]) -> None:
    assert snakemake.wait(600) == 0, run.log()
    run.assert_undisturbed()


def rerun(run: Run) -> None:
    again = run.snakemake("pretrain", timeout=600)
    assert again.returncode == 0, again.stdout + run.log()
    run.assert_undisturbed()


def test_time_limit(run: Run, cluster: Cluster) -> None:
    """The limit is shortened while the job runs, to a minute in which the warning comes at once."""
    snakemake = run.start("pretrain")
    run.await_checkpoint()
    cluster.run("scontrol", "update", f"JobId={run.training_job()['JobId']}", "TimeLimit=2")
    finish(run, snakemake)
    assert "stopped by SIGUSR1 after iteration" in run.log() and len(run.jobs()) == 2


def test_requeued(run: Run, cluster: Cluster) -> None:
    """As by preemption: the same job waits and runs again; no retry is used."""
    run.write_profile(**{"slurm-requeue": True, "retries": 0})
    snakemake = run.start("pretrain")
    run.await_checkpoint()
    cluster.run("scontrol", "requeue", run.training_job()["JobId"])
    finish(run, snakemake)
    assert len(run.jobs()) == 1 and run.jobs()[0]["Restarts"] == "1"


def test_preempted(run: Run, cluster: Cluster) -> None:
    """A job of a partition of higher priority takes both nodes: asked to save, put back into the queue, gone on."""
    run.write_profile(retries=0)
    snakemake = run.start("pretrain")
    run.await_checkpoint()
    job = run.training_job()["JobId"]
    urgent = cluster.run(
        "sbatch", "--parsable", "-p", URGENT, "--nodes=2", "--exclusive", "-o/dev/null", "--wrap=sleep 5"
    )
    wait_until(lambda: cluster.state(urgent.strip()) == "COMPLETED", run.log)
    assert run.iteration() < run.made.iterations and cluster.state(job) == "PENDING"
    finish(run, snakemake)
    assert "stopped by SIGTERM after iteration" in run.log()
    assert [(one["JobId"], one["Restarts"]) for one in run.jobs()] == [(job, "1")]


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_node_lost(run: Run, cluster: Cluster, node: str) -> None:
    """Its processes are gone at once; SLURM notices later and requeues the job."""
    snakemake = run.start("pretrain")
    run.await_checkpoint()
    cluster.kill_node(node)
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    cluster.start_node(node)
    cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    finish(run, snakemake)


def test_snakemake_is_interrupted(run: Run) -> None:
    """Ctrl-C takes the jobs along; the same command goes on."""
    snakemake = run.start("pretrain")
    run.await_checkpoint()
    snakemake.send_signal(signal.SIGINT)
    assert snakemake.wait(120) != 0
    wait_until(lambda: run.training_job()["JobState"] == "CANCELLED", run.log)
    rerun(run)


def test_snakemake_is_killed(run: Run, cluster: Cluster) -> None:
    """Its job goes on. A second run is refused, and a job that is submitted all the same finds the folder taken."""
    snakemake = run.start("pretrain")
    run.await_checkpoint()
    snakemake.kill()
    snakemake.wait()
    locked = run.snakemake("pretrain")
    assert locked.returncode != 0 and "--unlock" in locked.stdout
    assert run.snakemake("--unlock").returncode == 0
    job = run.training_job()
    assert job["JobState"] == "RUNNING"
    refused = run.snakemake("pretrain")
    assert refused.returncode != 0 and f"still there: {job['JobId']}." in refused.stdout
    step = ["srun", "-p", "main", "--nodes=2", "--ntasks-per-node=1", "--wait=5", "--mem=500", *run.training_command()]
    rendezvous = ["env", "MASTER_ADDR=127.0.0.1", "MASTER_PORT=20001"]
    assert "belongs to another training" in run.call(*rendezvous, *step)
    # Until its last processes are gone, the job counts as still there.
    wait_until(lambda: run.jobs()[0]["JobState"] not in ("RUNNING", "COMPLETING"), run.log)
    rerun(run)


def test_what_a_retry_cannot_mend_is_not_tried_again(run: Run) -> None:
    """Data that are refused: the retry ends at once, and the next snakemake tries in earnest."""
    run.write_profile(retries=1)
    place = run.results / "data/sft"
    place.unlink()
    (place / ".nv-meta").mkdir(parents=True)
    (place / ".nv-meta/dataset.yaml").write_text("{}")
    refused = run.snakemake("pretrain")
    assert refused.returncode != 0
    assert run.log().count("Not tried again: it would end as the attempt before did") == 1, run.log()
    run.place_data()
    rerun(run)


def test_a_controller_that_is_down(run: Run, cluster: Cluster) -> None:
    """Refused within a minute, most of which the commands of SLURM spend trying."""
    cluster.stop_controller()
    try:
        began = time.monotonic()
        refused = run.snakemake("pretrain")
        assert refused.returncode != 0 and time.monotonic() - began < 60
        assert "SLURM does not answer: `sinfo" in refused.stdout and "Traceback" not in refused.stdout
    finally:
        cluster.start_controller()
