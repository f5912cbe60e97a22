"""Which checkpoints of a stage stay, and what names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm import checkpoint
from vlm.checkpoint import places
from vlm.checkpoint.manifest import Manifest


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    for iteration in (10, 20, 30, 40):
        folder = places.iteration_folder(tmp_path, iteration)
        folder.mkdir(parents=True)
        Manifest(kind="stage", parts=("vision_projection",), stage="sft", iteration=iteration).write(folder)
    places.point_to(folder)
    return tmp_path


def kept(stage: Path) -> list[int]:
    return [int(folder.name.split("_")[1]) for folder in sorted((stage / "checkpoints").glob("iteration_*"))]


@pytest.mark.parametrize(
    ("best", "keep", "left"),
    [
        pytest.param(None, 2, [30, 40], id="newest"),
        pytest.param(10, 2, [10, 30, 40], id="best-is-old"),
        pytest.param(30, 2, [30, 40], id="best-is-among-the-newest"),
        pytest.param(20, 1, [20, 40], id="one-beside-the-best"),
        pytest.param(None, 9, [10, 20, 30, 40], id="fewer-than-allowed"),
    ],
)
def test_the_best_stays_beside_the_newest(stage, best, keep, left):
    places.name_best(stage, best)
    places.prune(stage, keep)
    assert kept(stage) == left
    if best is not None:
        assert checkpoint.resolve(stage / "checkpoints/best") == places.iteration_folder(stage, best)
    assert checkpoint.resolve(stage) == checkpoint.resolve(stage / "checkpoints") == places.iteration_folder(stage, 40)


def test_a_better_one_takes_the_place_of_the_best(stage):
    for best, left in ((10, [10, 40]), (40, [40])):
        places.name_best(stage, best)
        places.prune(stage, 1)
        assert kept(stage) == left
    places.name_best(stage, None)
    assert not (stage / "checkpoints/best").exists()
    places.name_best(stage, None)


def test_what_best_names_may_be_gone(stage):
    places.name_best(stage, 15)
    with pytest.raises(ValueError, match="best: names iteration_0000015, which is not there"):
        checkpoint.resolve(stage / "checkpoints/best")
    places.prune(stage, 1)
    assert kept(stage) == [40]
