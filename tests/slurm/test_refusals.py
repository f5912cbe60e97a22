"""What cannot work is said in one message, before a job is submitted or by the first one, and soon."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from training import Run

from vlm import config as settings

pytestmark = pytest.mark.slurm


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        pytest.param({"partition": ""}, ["no default partition", "there are main"], id="no-partition"),
        pytest.param({"partition": "gpus"}, ["'gpus' is no partition", "there are main"], id="no-such-partition"),
        pytest.param({"slurm-status-command": "sacct"}, ["sacct does not work here, use squeue"], id="no-accounting"),
    ],
)
def test_refused_by_name(run: Run, cluster: Cluster, profile: dict[str, Any], words: list[str]) -> None:
    run.write_profile(**profile)
    before, began = len(cluster.jobs()), time.monotonic()
    refused = run.snakemake("pretrain")
    assert refused.returncode != 0 and time.monotonic() - began < 60
    for word in words:
        assert word in refused.stdout
    assert "Traceback" not in refused.stdout
    assert len(cluster.jobs()) == before


def test_ended_jobs_are_forgotten_too_soon(run: Run, cluster: Cluster) -> None:
    """A job that ended and was forgotten between two looks would be waited for for ever."""
    settings_file = cluster.folder / "slurm.conf"
    written = settings_file.read_text()
    settings_file.write_text(re.sub("MinJobAge=.*", "MinJobAge=120", written))
    try:
        cluster.run("scontrol", "reconfigure")
        refused = run.snakemake("pretrain")
    finally:
        settings_file.write_text(written)
        cluster.run("scontrol", "reconfigure")
    assert refused.returncode != 0 and "squeue knows ended jobs for 120 seconds here" in refused.stdout
    assert not run.jobs()


def test_more_than_a_node_has(run: Run) -> None:
    run.write_profile(train={"gres": "gpu:9"}, retries=0)
    refused = run.snakemake("pretrain")
    assert refused.returncode != 0 and "Requested node configuration is not available" in refused.stdout


def test_no_slurm_here(run: Run, tmp_path: Path) -> None:
    """On a machine without its commands, which is what forgetting the login node looks like."""
    commands = tmp_path / "commands"
    commands.mkdir()
    slurm = {"sinfo", "squeue", "sbatch", "scontrol", "srun", "sacct", "scancel", "sacctmgr", "sshare"}
    for one in Path("/usr/bin").iterdir():
        if one.name not in slurm:
            (commands / one.name).symlink_to(one)
    run.environment["PATH"] = str(commands)
    refused = run.snakemake("pretrain")
    assert refused.returncode != 0 and "SLURM is not installed here: there is no sinfo" in refused.stdout


def test_fewer_nodes_and_gpus_than_promised(run: Run, cluster: Cluster) -> None:
    """A step that gets less is refused by the launcher: never a smaller training."""
    config = settings.load(run.made.undisturbed.parents[1] / "config.yaml")
    parallel = config.parallel.model_copy(update={"nodes": 2, "ranks_per_node": 2})
    (run.results / "config.yaml").write_text(settings.dump(config.model_copy(update={"parallel": parallel})))
    for nodes, gpus, words in (
        (1, 2, "parallel.nodes: promises 2 machines, SLURM started this on 1"),
        (2, 1, "parallel.ranks_per_node: promises 2 processes with a GPU each, SLURM gave this machine 1"),
    ):
        step = ["srun", "-p", "main", f"--nodes={nodes}", "--ntasks-per-node=1", f"--gres=gpu:{gpus}"]
        assert words in run.call(*step, *run.training_command())
    assert not (run.out / "checkpoints").exists()
