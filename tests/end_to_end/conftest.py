"""Fixtures of the end-to-end tests, and the modules beside them within reach, also in pytest's importlib mode."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import train_runs
import train_workspace


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> train_runs.Runs:
    return train_runs.Runs(train_workspace.make(tmp_path_factory.mktemp("train")))
