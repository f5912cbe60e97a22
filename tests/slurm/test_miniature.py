"""The whole miniature recipe as SLURM jobs, beside the same recipe on this machine. `make slurm`; half an hour."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import timeline
from cluster import Cluster
from train_runs import assert_same
from workplace import ROOT, Workplace

from vlm import config as settings

pytestmark = pytest.mark.slurm_long


def run_all(place: Workplace, profile: str, parallel: dict[str, Any]) -> float:
    """Make everything; seconds that it took."""
    place.write_overlay({"parallel": parallel})
    began = time.monotonic()
    snakemake = place.start("all", "--benchmark-extended", profile=profile)
    try:
        assert snakemake.wait(3600) == 0, place.log()
    finally:
        place.end()
    return time.monotonic() - began


def content(place: Workplace, pattern: str) -> dict[str, bytes]:
    paths = [path for path in place.results.glob(pattern) if path.is_file()]
    return {str(path.relative_to(place.results)): path.read_bytes() for path in paths}


def test_whole_miniature(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training on two nodes with two ranks each: weights, answers and scores as with four ranks on one machine."""
    here, there = Workplace(tmp_path / "local", None), Workplace(tmp_path / "slurm", cluster)
    there.write_profile()
    there_seconds = run_all(there, "cluster", {"nodes": 2, "ranks_per_node": 2})
    here_seconds = run_all(here, f"{ROOT}/profiles/local", {"nodes": 1, "ranks_per_node": 4})

    for name, stage in settings.load(there.results / "config.yaml").stages.items():
        assert_same(there.results / "train" / name, here.results / "train" / name, stage.iterations)
        comment = f"rule_train_wildcards_{name}"
        there.assert_as_planned(name, [job for job in there.jobs() if job["Comment"] == comment])
    for pattern, least in (("generate/**/*.jsonl", 10), ("scores/**/*.json", 12), ("scores/table.csv", 1)):
        expected = content(here, pattern)
        assert len(expected) >= least and content(there, pattern) == expected, pattern
    jobs = timeline.of_jobs(there)
    assert {job["JobState"] for job in there.jobs()} == {"COMPLETED"} and len(jobs) == len(there.jobs())
    with capsys.disabled():
        print(f"\n{(there.results / 'scores/table.csv').read_text()}")
        print(f"SLURM {there_seconds:.0f} s, this machine alone {here_seconds:.0f} s\n{timeline.table(jobs)}")
