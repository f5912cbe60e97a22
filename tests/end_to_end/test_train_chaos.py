"""A few kills at random; `make chaos` does it at length."""

from __future__ import annotations

import pytest
import train_chaos
import train_workspace


@pytest.mark.parametrize(("stage", "world"), [("sft", 1), ("pretrain", 2)], ids=["one-rank", "two-ranks"])
def test_killed_at_random(runs, tmp_path, stage, world):
    config = train_workspace.changed(runs.config, tmp_path / "config.yaml", parallel__ranks_per_node=world)
    chaos = train_chaos.Chaos(runs, tmp_path, stage, world, config, seed=0)
    chaos.run(kills=2)
    assert chaos.moments.total() == 2
