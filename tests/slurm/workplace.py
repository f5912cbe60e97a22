"""A folder with the real workflow and the product's profile for a cluster, and the jobs that are submitted from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml
from cluster import PARTITION, Cluster

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 180.0
"""For anything to happen, on a machine that is busy with other tests."""


class Workplace:
    """The miniature recipe, changed by what `overlay` says.

    Args:
        folder: new.
        cluster: None for the profile `local` alone.
    """

    def __init__(self, folder: Path, cluster: Cluster | None) -> None:
        folder.mkdir()
        self.folder, self.cluster = folder, cluster
        for name in ("workflow", "config", "resources"):
            (folder / name).symlink_to(ROOT / name)
        variables = cluster.environment if cluster else os.environ
        self.environment = {
            name: value for name, value in variables.items() if not name.startswith(("SNAKEMAKE", "PYTEST"))
        } | {"OMP_NUM_THREADS": "1"}
        self.results = folder / "results/tiny"

    def write_overlay(self, overlay: dict[str, Any]) -> None:
        (self.folder / "overlay.yaml").write_text(yaml.safe_dump(overlay))

    def write_profile(self, partition: str = PARTITION, train: dict[str, Any] | None = None, **changes: Any) -> None:
        """The product's profile with what a user fills in, and `changes`."""
        profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
        profile["default-resources"] |= {"slurm_partition": partition} if partition else {}
        profile |= {"set-resources": {"train": train}} if train else {}
        profile |= changes
        place = self.folder / "cluster/config.yaml"
        place.parent.mkdir(exist_ok=True)
        place.write_text(yaml.safe_dump(profile))

    def command(self, *arguments: str, profile: str = "cluster") -> list[str]:
        overlays = ["--configfile", "config/tiny.yaml", "overlay.yaml"]
        return [sys.executable, "-m", "snakemake", "--profile", profile, *arguments, *overlays]

    def snakemake(
        self, *arguments: str, profile: str = "cluster", timeout: float = 2 * SECONDS
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments, profile=profile),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def start(self, *arguments: str, profile: str = "cluster") -> subprocess.Popen[bytes]:
        """It hears SIGINT, also where the tests run in the background of a shell, which ignores it."""
        with open(self.folder / "snakemake.log", "a") as log:
            return subprocess.Popen(
                ["env", "--default-signal=INT", *self.command(*arguments, profile=profile)],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
            )

    def log(self) -> str:
        """All that was said: by snakemake, by the jobs."""
        files = [self.folder / "snakemake.log", *self.folder.glob(".snakemake/slurm_logs/**/*.log")]
        return "\n".join(f"--- {path}\n{path.read_text()}" for path in files if path.exists())

    def jobs(self) -> list[dict[str, str]]:
        """Those that were submitted from this folder, oldest first."""
        return [job for job in self.cluster.jobs() if job["WorkDir"] == str(self.folder)] if self.cluster else []

    def assert_as_planned(self, stage: str, jobs: list[dict[str, str]]) -> None:
        """SLURM gave each of these jobs of a training the nodes, GPUs, memory and time that `vlm plan` prints."""
        command = [sys.executable, "-m", "vlm.cli", "plan", "--json", f"--config={self.results / 'config.yaml'}"]
        told = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=60
        )
        need = json.loads(told.stdout)["stages"][stage]["job"]
        assert jobs
        for job in jobs:
            assert job["NumNodes"] == str(need["nodes"]) == "2"
            assert job["TresPerNode"] == f"gres:gpu:{need['gpus_per_node']}" == "gres:gpu:2"
            assert job["MinMemoryNode"] == f"{need['mem_mb']}M"
            assert job["TimeLimit"] == f"00:{need['runtime_minutes']:02d}:00"
            assert 0 <= int(job["NumCPUs"]) - need["nodes"] * need["cpus_per_task"] < 4

    def end(self) -> None:
        for job in self.jobs():
            if self.cluster and job["JobState"] in ("PENDING", "RUNNING"):
                self.cluster.run("scancel", job["JobId"])
        for process in psutil.Process().children(recursive=True):
            if process.name().startswith("snakemake") or str(self.folder) in " ".join(process.cmdline()):
                process.kill()


def wait_until(happened: Callable[[], bool], explain: Callable[[], str] = str, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"it did not happen\n{explain()}"
        time.sleep(0.1)
