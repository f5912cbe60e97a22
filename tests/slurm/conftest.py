"""A cluster for the tests of this folder, and a run whose next step is training."""

from __future__ import annotations

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
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> training.Made:
    return training.make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def slow(made: training.Made, tmp_path_factory: pytest.TempPathFactory) -> training.Made:
    """Longer, so that what SLURM notices within half a minute still finds it at work."""
    return training.train(made.workspace, tmp_path_factory.mktemp("slow") / "local", iterations=240)


@pytest.fixture
def run(made: training.Made, cluster: virtual.Cluster, tmp_path: Path) -> Iterator[training.Run]:
    """A folder of its own, whose jobs end with the test."""
    one = training.Run(made, tmp_path / "run", cluster)
    yield one
    one.end()
