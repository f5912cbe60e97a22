"""The validation loss is the same at every layout, and every rank knows it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks

sys.path.insert(0, str(Path(__file__).parent))

from toy_run import Numbered, batch, make, settings
from train_workspace import changed

NUM_SEQUENCES = 7
"""No multiple of ranks or micro-batches."""


class Split:
    """The sequences of one data-parallel rank; the ranks have different numbers of them."""

    def __init__(self, rank: int, world: int) -> None:
        self.numbers = range(100 + rank, 100 + NUM_SEQUENCES, world)

    def __iter__(self) -> Iterator[Any]:
        return map(batch, self.numbers)

    def close(self) -> None:
        pass


def measure(config: Path, combined: Path, data: Path, out: Path) -> None:
    """Runs on every rank: measure twice with a step in between, and write what came out."""
    from torch import distributed

    from vlm import config as configuration
    from vlm import loader, parallel
    from vlm.train import plan, trainer
    from vlm.train.stop import Stop

    def build(*_: Any, rank: int, world: int, split: str = "train", **__: Any) -> Any:
        return Split(rank, world) if split == "val" else Numbered(0, rank, world)

    loader.build = build
    prepared = plan.prepare(configuration.load(config), "sft", combined, data, out)
    parallel.initialize(prepared.config.parallel, prepared.config.seed)
    with trainer.Trainer(prepared, Stop()) as run:
        before = run.validation()
        run.schedule.step(1)
        run.step()
        found = [before, run.validation()]
    (out / f"{distributed.get_rank()}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("validation"))


def measured(folder: Path, out: Path, **layout: Any) -> list[list[dict[str, float]]]:
    """Of every rank, the losses before and after a step."""
    out.mkdir()
    config = settings(out / "plain.yaml", **layout)
    config = changed(config, out / "config.yaml", stages__sft__validation_interval=5)
    world = layout.get("ranks_per_node", 1)
    ranks.launch(world, measure, config, folder / "combined", folder / "data", out)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def alone(folder) -> list[dict[str, float]]:
    (found,) = measured(folder, folder / "alone")
    assert found[0]["validation_loss"] > found[1]["validation_loss"], "a step changed nothing"
    assert set(found[0]) == {"validation_loss", "validation_loss/captions", "validation_loss/dialogues"}
    return found


@pytest.mark.parametrize(
    "layout",
    [{}, {"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"distributed_optimizer": True}],
    ids=["data", "tensor", "sequence", "pipeline", "distributed-optimizer"],
)
def test_two_ranks_measure_what_one_does(folder, tmp_path, alone, layout):
    first, second = measured(folder, tmp_path / "two", ranks_per_node=2, **layout)
    assert first == second
    for ours, theirs in zip(first, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
