"""A run of the real workflow on the virtual cluster in which everything before training is there already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import train_workspace
import yaml
from cluster import PARTITION, Cluster
from train_runs import assert_same

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 40
STAGE = {
    "start_from": "combined",
    "trainable": ["projector", "language"],
    "data": {"pretrain": 1.0, "sft": 3.0},
    "sequence_length": 256,
    "global_batch": 4,
    "iterations": ITERATIONS,
    "save_interval": 4,
    "keep_best": False,
    "log_interval": 2,
    "validation_interval": 0,
    "optimizer": train_workspace.OPTIMIZER,
}
SMALL = {
    "models": {"projector": {"hidden_size": 32}},
    "data": {"workers": 0, "shuffle_buffer": 16, "packing_buffer": 32, "max_rejected_share": 0.05},
    "stages": {"pretrain": STAGE},
}
SECONDS = 180.0
"""For anything to happen, on a machine that is busy with other tests."""


@dataclass(frozen=True)
class Made:
    """What training starts from, and what it leads to on this machine alone."""

    workspace: train_workspace.Workspace
    undisturbed: Path


def make(folder: Path) -> Made:
    workspace = train_workspace.make(folder / "workspace")
    run = Run(Made(workspace, folder), folder / "local", None, nodes=1, ranks=4)
    done = run.snakemake("pretrain", profile=f"{ROOT}/profiles/local")
    assert done.returncode == 0, done.stdout
    return Made(workspace, run.out)


class Run:
    """A folder with the real workflow, its results up to training, and a profile for the cluster.

    Args:
        cluster: None for the profile `local` alone.
        changes: of the profile for SLURM.
    """

    def __init__(
        self, made: Made, folder: Path, cluster: Cluster | None, nodes: int = 2, ranks: int = 2, **changes: Any
    ) -> None:
        folder.mkdir()
        self.made, self.folder, self.cluster = made, folder, cluster
        for name in ("workflow", "config", "resources"):
            (folder / name).symlink_to(ROOT / name)
        variables = cluster.environment if cluster else os.environ
        self.environment = {
            name: value for name, value in variables.items() if not name.startswith(("SNAKEMAKE", "PYTEST"))
        } | {"OMP_NUM_THREADS": "1"}
        results = folder / "results/tiny"
        for part in ("combined", "verified.json"):
            _place(made.workspace.combined, results / "convert" / part)
        for name, data in {"pretrain": "captions", "sft": "dialogues"}.items():
            _place(made.workspace.data / data, results / "data" / name)
        self.out = results / "train/pretrain"
        self.write_overlay(nodes, ranks)
        self.write_profile(**changes)

    def write_overlay(self, nodes: int, ranks: int, **stage: Any) -> None:
        tree = SMALL | {"parallel": {"nodes": nodes, "ranks_per_node": ranks}}
        tree["stages"] = {"pretrain": STAGE | stage}
        (self.folder / "small.yaml").write_text(yaml.safe_dump(tree))

    def write_profile(self, partition: str = PARTITION, train: dict[str, Any] | None = None, **changes: Any) -> None:
        """The product's profile with what a user fills in, and less patience."""
        profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
        profile["default-resources"] |= {"slurm_partition": partition} if partition else {}
        profile["set-resources"] = {"train": train or {}}
        profile |= {"slurm-init-seconds-before-status-checks": 2, "latency-wait": 10} | changes
        place = self.folder / "cluster/config.yaml"
        place.parent.mkdir(exist_ok=True)
        place.write_text(yaml.safe_dump(profile))

    def command(self, *arguments: str, profile: str = "cluster") -> list[str]:
        overlays = ["--configfile", "config/tiny.yaml", "small.yaml"]
        return [sys.executable, "-m", "snakemake", "--profile", profile, *arguments, *overlays]

    def snakemake(self, *arguments: str, profile: str = "cluster", **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments, profile=profile),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=options.get("timeout", 2 * SECONDS),
        )

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "snakemake.log", "a") as log:
            return subprocess.Popen(
                self.command(*arguments), cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )

    def log(self) -> str:
        """All that was said: by snakemake, by the jobs."""
        files = [self.folder / "snakemake.log", *self.folder.glob(".snakemake/slurm_logs/**/*.log")]
        return "\n".join(f"--- {path}\n{path.read_text()}" for path in files if path.exists())

    def iteration(self) -> int:
        """That of the newest checkpoint, 0 before the first."""
        latest = self.out / "checkpoints/latest"
        return int(latest.read_text().strip().rpartition("_")[2]) if latest.exists() else 0

    def await_checkpoint(self, above: int = 0) -> int:
        wait_until(lambda: self.iteration() > above, self.log)
        found = self.iteration()
        assert found < ITERATIONS, "it was faster than the test"
        return found

    def training_job(self) -> dict[str, str]:
        """The one that was submitted last from this folder."""
        assert self.cluster is not None
        return [job for job in self.cluster.jobs() if job["WorkDir"] == str(self.folder)][-1]

    def assert_undisturbed(self) -> None:
        assert_same(self.out, self.made.undisturbed, ITERATIONS)

    def end(self) -> None:
        if self.cluster:
            for job in self.cluster.jobs():
                if job["WorkDir"] == str(self.folder):
                    self.cluster.run("scancel", job["JobId"])
        for process in psutil.Process().children(recursive=True):
            if process.name().startswith("snakemake") or str(self.folder) in " ".join(process.cmdline()):
                process.kill()


def wait_until(happened: Callable[[], bool], explain: Callable[[], str] = str, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"it did not happen\n{explain()}"
        time.sleep(0.1)


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix:
        target.write_text(json.dumps({}))
    else:
        target.symlink_to(source)
