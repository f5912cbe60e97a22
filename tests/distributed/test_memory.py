"""What a rank holds for training, in bytes: nothing for frozen parts, and its share under the distributed optimizer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import toy_run

PADDING = 4 * 128 * 2
"""Bytes that mcore may add per parameter and buffer, so that ranks get equal shares."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_run.make(tmp_path_factory.mktemp("memory"))


def measure(folder: Path, config_path: Path, stage: str, out: Path) -> None:
    """Runs on every rank: one step, then the bytes by what they are for."""
    from vlm import checkpoint, config, model, parallel
    from vlm.model.builder import read_configs
    from vlm.train import optimizer
    from vlm.train.step import Step

    settings = config.load(config_path)
    parallel.initialize(settings.parallel, settings.seed)
    built = model.build(*read_configs(folder / "combined/huggingface"), settings, initialise=False)
    checkpoint.load_model(built, folder / "combined")
    built.freeze(settings.stages[stage].trainable)
    built.train()
    before = {name: value.clone() for name, value in built.state_dict().items() if "_extra_state" not in name}
    wrapped = optimizer.wrap(built, distributed_optimizer=settings.parallel.distributed_optimizer)
    adam, schedule = optimizer.build(wrapped, settings, settings.stages[stage])
    data = toy_run.Numbered(0, rank=torch.distributed.get_rank(), world=torch.distributed.get_world_size())
    layout: dict[str, Any] = {"sequence_length": toy_run.SEQUENCE_LENGTH, "num_micro_batches": 2}
    step = Step(wrapped, adam, data, device=torch.device("cpu"), sets=toy_run.SETS, **layout)
    schedule.step(1)
    step()
    states = adam.chained_optimizers[0].optimizer.state.values()
    trained = {name: p for name, p in built.named_parameters() if p.requires_grad}
    mains = [main for p in trained.values() if (main := getattr(p, "main_param", None)) is not None]
    found = {
        "gradients": sum(buffer.grad_data.nbytes for buffer in wrapped.buffers),
        "states": sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq")),
        "masters": sum(main.nbytes for main in mains),
        "trained": [p.numel() for p in trained.values()],
        "frozen": [name for name, p in built.named_parameters() if not p.requires_grad],
        "touched": [
            name
            for name, p in built.named_parameters()
            if not p.requires_grad
            and (p.grad is not None or hasattr(p, "main_grad") or not torch.equal(p, before[name]))
        ],
        "moved": [name for name, p in trained.items() if not torch.equal(p, before[name])],
    }
    torch.save(found, out / f"{torch.distributed.get_rank()}.pt")


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "layout",
    [{}, {"ranks_per_node": 2}, {"ranks_per_node": 2, "distributed_optimizer": True}],
    ids=["alone", "data", "data+distributed_optimizer"],
)
def test_frozen_parts_hold_nothing_and_shares_are_shares(folder, tmp_path, layout, dtype, stage):
    world, sharded = layout.get("ranks_per_node", 1), layout.get("distributed_optimizer", False)
    config = toy_run.settings(tmp_path / "config.yaml", dtype=dtype, **layout)
    ranks.launch(world, measure, folder, config, stage, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    trained = found[0]["trained"]
    total, padding = sum(trained), PADDING * (len(trained) + 1)
    assert any(name.startswith("vision_model") for name in found[0]["frozen"])
    assert any(name.startswith("language_model") for name in found[0]["frozen"]) == (stage == "pretrain")
    for one in found:
        assert one["touched"] == [] and len(one["moved"]) > len(trained) / 2
        assert 4 * total <= one["gradients"] <= 4 * total + (padding if sharded else 0)
    masters = 4 * total if dtype == "bfloat16" else 0
    whole = {"states": 8 * total, "masters": masters}
    for name, wanted in whole.items():
        held = [one[name] for one in found]
        if sharded:  # each element is on one rank, about as many on each
            assert sum(held) == wanted
            assert max(held) <= math.ceil(wanted / world) + 2 * padding
        else:
            assert held == [wanted] * world
