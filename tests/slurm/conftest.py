"""A cluster for the tests of this folder, and a run whose next step is training."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

for beside in ("slurm", "end_to_end", "workflow", "unit"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / beside))

import cluster as virtual  # noqa: E402
import training  # noqa: E402


@pytest.fixture(scope="session")
def cluster() -> Iterator[virtual.Cluster]:
    if reason := virtual.missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        with virtual.Cluster(folder / "cluster", nodes=2, gpus=2) as started:
            yield started
    finally:
        if "KEEP_SLURM" not in os.environ:
            shutil.rmtree(folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> training.Made:
    return training.make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run(made: training.Made, cluster: virtual.Cluster, tmp_path: Path) -> Iterator[training.Run]:
    """A folder of its own, whose jobs end with the test."""
    one = training.Run(made, tmp_path / "run", cluster)
    yield one
    one.end()
