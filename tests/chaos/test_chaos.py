"""Ten kills in each stage, on one rank and on two, and nothing of it can be seen in the end: `make chaos`.

VLM_CHAOS_SEED repeats the moments of an earlier run, which prints its seed.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import train_chaos
import train_runs
import train_workspace

KILLS = 10
SEED = int(os.environ.get("VLM_CHAOS_SEED", random.SystemRandom().randrange(10**6)))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> train_runs.Runs:
    return train_runs.Runs(train_workspace.make(tmp_path_factory.mktemp("train")))


@pytest.mark.chaos
@pytest.mark.parametrize("world", [1, 2], ids=["one-rank", "two-ranks"])
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_ten_kills_leave_no_trace(runs: train_runs.Runs, tmp_path: Path, stage: str, world: int) -> None:
    config = train_workspace.changed(runs.config, tmp_path / "config.yaml", parallel__ranks_per_node=world)
    chaos = train_chaos.Chaos(runs, tmp_path, stage, world, config, SEED)
    try:
        chaos.run(KILLS)
    finally:
        print(f"\n{chaos.report()}")
    assert chaos.moments.total() == KILLS and min(chaos.kinds[kind] for kind in train_chaos.SHAPES) >= KILLS // 3
