"""Training in a container as SLURM jobs, with a stand-in for Apptainer that notes its arguments. `make slurm`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import apptainer
import pytest
from training import Run

pytestmark = pytest.mark.slurm_long


def test_every_node_starts_its_launcher_in_the_image(run: Run) -> None:
    host = run.folder / "host"
    apptainer.install(host, inside=Path(sys.executable).parent)
    run.environment["PATH"] = f"{host}{os.pathsep}{run.environment['PATH']}"
    done = run.snakemake("pretrain", "--sdm", "apptainer", "--apptainer-args=--nv --bind /opt")
    assert done.returncode == 0, done.stdout + run.log()
    run.assert_undisturbed()
    own = "vlm train --config results/tiny/config.yaml --stage pretrain --start-from results/tiny/convert/combined "
    own += "--data results/tiny/data --out results/tiny/train/pretrain"
    here = str(run.folder)
    arguments = ["exec", "--bind", here, "--pwd", here, "--nv", "--bind", "/opt", "vlm.sif", *own.split()]
    assert sorted(apptainer.calls(host), key=str) == [
        {"arguments": arguments, "folder": here, "node": node} for node in ("0", "1")
    ]
