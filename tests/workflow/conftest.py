"""Fixtures of the workflow's tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from workspace import Snakemake, environment, lay_out


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return lay_out(tmp_path)


@pytest.fixture
def snakemake(workspace: Path) -> Snakemake:
    """Run `snakemake --profile profiles/local` with more arguments in the workspace."""

    def run(*arguments: str, profile: str = "profiles/local", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [workspace / ".venv/bin/snakemake", "--profile", profile, *arguments],
            cwd=workspace,
            env=environment(workspace) | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )

    return run
