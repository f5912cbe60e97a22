"""Two data-parallel ranks take the same steps as one: the mean is over the tokens of both."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).parent))  # the processes import this module by name

STEPS = 3
NUM_MICRO_BATCHES = 6


def train(rank: int, world: int, port: int, out: Path, broken: bool) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from train_toy import batches, settings, toy

    from vlm import parallel
    from vlm.train import optimizer as optimizers
    from vlm.train.step import NonFiniteError, Step

    config = settings(clip_grad=0.05)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"ranks_per_node": world})})
    parallel.initialize(config.parallel, seed=rank)
    model = toy()
    if broken and rank == 1:
        model.table_VD[3] = float("nan")
    wrapped = optimizers.wrap(model)
    optimizer, schedule = optimizers.build(wrapped, config, config.stages["sft"])
    step = Step(
        wrapped,
        optimizer,
        islice(batches(), rank, None, world),
        num_micro_batches=NUM_MICRO_BATCHES // world,
        sequence_length=14,
        device=torch.device("cpu"),
        sets=("set",),
    )
    lines, error = [], ""
    try:
        for _ in range(STEPS):
            schedule.step(1)
            outcome = step()
            lines.append([outcome.loss_sum, outcome.trained_tokens, outcome.tokens, outcome.samples])
            lines[-1].append(outcome.gradient_norm)
    except NonFiniteError as stopped:
        error = str(stopped)
    torch.save({"lines": lines, "weight": model.trained.weight.detach(), "error": error}, out / f"{world}-{rank}.pt")


def run(world: int, out: Path, broken: bool = False) -> list[dict]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlm.train.trainer"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=train, args=(rank, world, port, out, broken)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * world
    return [torch.load(out / f"{world}-{rank}.pt") for rank in range(world)]


def test_two_ranks_equal_one(tmp_path):
    (one,) = run(1, tmp_path)
    two = run(2, tmp_path)
    assert two[0]["lines"] == two[1]["lines"] and torch.equal(two[0]["weight"], two[1]["weight"])
    for ours, theirs in zip(two[0]["lines"], one["lines"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(two[0]["weight"], one["weight"], rtol=1e-5, atol=1e-6)


def test_every_rank_stops_and_names_the_samples_of_the_broken_one(tmp_path):
    two = run(2, tmp_path, broken=True)
    assert two[0]["error"] == two[1]["error"] != ""
    assert "loss nan" in two[0]["error"] and "set/" in two[0]["error"]
    assert two[0]["lines"] == two[1]["lines"]
