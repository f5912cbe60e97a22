"""A run is the same however its ranks share the work: losses and gradient norms of twenty steps, at every layout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import toy_run

LAYOUTS = {
    "data": {"ranks_per_node": 2},
    "data+distributed_optimizer": {"ranks_per_node": 2, "distributed_optimizer": True},
    "tensor": {"ranks_per_node": 2, "tensor": 2},
    "tensor+sequence": {"ranks_per_node": 2, "tensor": 2, "sequence": True},
    "pipeline": {"ranks_per_node": 2, "pipeline": 2},
    "tensor+data": {"ranks_per_node": 4, "tensor": 2},
    "tensor+sequence+pipeline": {"ranks_per_node": 4, "tensor": 2, "pipeline": 2, "sequence": True},
    "recompute": {"recompute": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_run.make(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def alone(folder):
    """The stages on one rank."""
    return {stage: toy_run.curve(toy_run.run(folder, folder / "alone" / stage, stage)) for stage in ("pretrain", "sft")}


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_trains_alike(folder, alone, tmp_path, layout):
    assert_same(toy_run.curve(toy_run.run(folder, tmp_path / "sft", "sft", **layout)), alone["sft"])
