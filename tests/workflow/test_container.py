"""`--sdm apptainer`, with a stand-in for Apptainer that notes its arguments: what runs in the image, and how."""

from __future__ import annotations

import os
from pathlib import Path

import apptainer
import pytest
from workspace import Snakemake, environment


@pytest.fixture
def path(workspace: Path) -> str:
    """PATH with the stand-in first. The commands are in the image alone: the machine's own `vlm` fails."""
    inside = workspace / "image/bin"
    inside.mkdir(parents=True)
    (workspace / ".venv/bin/vlm").rename(inside / "vlm")
    (workspace / ".venv/bin/vlm").write_text("#!/bin/sh\necho 'not the vlm of the image' >&2\nexit 9\n")
    (workspace / ".venv/bin/vlm").chmod(0o755)
    apptainer.install(workspace / "host", inside)
    return f"{workspace}/host{os.pathsep}{environment(workspace)['PATH']}"


def test_steps_run_in_the_image(workspace: Path, snakemake: Snakemake, path: str) -> None:
    options = ("pretrain", "--sdm", "apptainer", "--apptainer-args=--nv")
    dry = snakemake(*options, "-n", PATH=path)
    assert dry.returncode == 0 and not (workspace / "host/calls").exists(), dry.stdout
    done = snakemake(*options, PATH=path)
    assert done.returncode == 0, done.stdout

    called = apptainer.calls(workspace / "host")
    assert {call["folder"] for call in called} == {str(workspace)}
    *plain, training = [call["arguments"] for call in called]
    own = "vlm train --config results/tiny/config.yaml --stage pretrain --start-from results/tiny/convert/combined "
    own += "--data results/tiny/data --out results/tiny/train/pretrain --wait"
    here = str(workspace)
    assert training == ["exec", "--bind", here, "--pwd", here, "--nv", "vlm.sif", *own.split()]
    for arguments in plain:
        assert arguments[:4] == ["exec", "--home", here, "--nv"] and arguments[-4:-1] == ["vlm.sif", "bash", "-c"]
    shells = [arguments[-1] for arguments in plain]
    convert = "vlm convert language results/tiny/sources/language results/tiny/convert/language > "
    assert len([shell for shell in shells if convert in shell]) == 1
    steps = (workspace / "calls.txt").read_text().splitlines()
    assert len(steps) == len(called), "each step is one command in the image"


def test_an_image_that_is_not_there(workspace: Path, snakemake: Snakemake, path: str) -> None:
    (workspace / "vlm.sif").unlink()
    refused = snakemake("pretrain", "--sdm", "apptainer", PATH=path)
    assert refused.returncode != 0 and "vlm.sif: there is no such image in this folder" in refused.stdout
    assert not (workspace / "host/calls").exists() and "Traceback" not in refused.stdout
