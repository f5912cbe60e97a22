"""A run of the real workflow on the virtual cluster in which everything before training is there already."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train_workspace
from cluster import Cluster
from train_runs import assert_same
from workplace import ROOT, SECONDS, Workplace, wait_until

ITERATIONS = 40
STAGE = {
    "start_from": "combined",
    "trainable": ["projector", "language"],
    "data": {"pretrain": 1.0, "sft": 3.0},
    "sequence_length": 256,
    "global_batch": 4,
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


@dataclass(frozen=True)
class Made:
    """What training starts from, and what it leads to on this machine alone."""

    workspace: train_workspace.Workspace
    undisturbed: Path
    iterations: int


def make(folder: Path) -> Made:
    return train(train_workspace.make(folder / "workspace"), folder / "local", ITERATIONS)


def train(workspace: train_workspace.Workspace, folder: Path, iterations: int) -> Made:
    """On this machine, with as many ranks as the jobs will have."""
    run = Run(Made(workspace, folder, iterations), folder, None, nodes=1, ranks=4)
    done = run.snakemake("pretrain", profile=f"{ROOT}/profiles/local")
    assert done.returncode == 0, done.stdout
    return Made(workspace, run.out, iterations)


class Run(Workplace):
    """A folder with the real workflow, its results up to training, and a profile for the cluster.

    Args:
        cluster: None for the profile `local` alone.
        changes: of the profile for SLURM.
    """

    def __init__(
        self, made: Made, folder: Path, cluster: Cluster | None, nodes: int = 2, ranks: int = 2, **changes: Any
    ) -> None:
        super().__init__(folder, cluster)
        self.made = made
        self.out = self.results / "train/pretrain"
        (self.results / "convert").mkdir(parents=True)
        (self.results / "convert/combined").symlink_to(made.workspace.combined)
        (self.results / "convert/verified.json").write_text("{}")
        self.place_data()
        tree = SMALL | {"parallel": {"nodes": nodes, "ranks_per_node": ranks}}
        self.write_overlay(tree | {"stages": {"pretrain": STAGE | {"iterations": made.iterations}}})
        self.write_profile(**changes)

    def place_data(self) -> None:
        (self.results / "data").mkdir(exist_ok=True)
        for name, data in {"pretrain": "captions", "sft": "dialogues"}.items():
            place = self.results / "data" / name
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            place.unlink(missing_ok=True)
            place.symlink_to(self.made.workspace.data / data)

    def write_profile(self, **changes: Any) -> None:
        """With less patience."""
        super().write_profile(**{"slurm-init-seconds-before-status-checks": 2, "latency-wait": 10} | changes)

    def iteration(self) -> int:
        """That of the newest checkpoint, 0 before the first."""
        latest = self.out / "checkpoints/latest"
        return int(latest.read_text().strip().rpartition("_")[2]) if latest.exists() else 0

    def await_checkpoint(self, above: int = 0) -> int:
        wait_until(lambda: self.iteration() > above, self.log)
        found = self.iteration()
        assert found < self.made.iterations, "it was faster than the test"
        return found

    def training_job(self) -> dict[str, str]:
        return self.jobs()[-1]

    def await_next_job(self, before: str) -> None:
        wait_until(
            lambda: self.training_job()["JobId"] != before and self.training_job()["JobState"] == "RUNNING", self.log
        )

    def training_command(self) -> list[str]:
        """As a job calls it, for a step that is started by hand. The resolved settings are there after a first run."""
        options = {"config": "config.yaml", "start-from": "convert/combined", "data": "data", "out": "train/pretrain"}
        vlm = [sys.executable, "-m", "vlm.cli", "train", "--stage=pretrain"]
        return vlm + [f"--{name}={self.results / place}" for name, place in options.items()]

    def call(self, *command: str) -> str:
        """What a command says."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=SECONDS
        )
        return done.stdout + done.stderr

    def assert_undisturbed(self) -> None:
        assert_same(self.out, self.made.undisturbed, self.made.iterations)
