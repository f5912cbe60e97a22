"""What `vlm plan` expects of sharded layouts and of checkpoints, against what real ranks keep and write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import ranks
import toy_run
from plan_fixtures import PARTS, estimated_bytes, kept_bytes

from vlm import config as configuration
from vlm import resources
from vlm.resources import Bases, parameters, storage


def measure(layout: dict[str, Any], out: Path) -> None:
    """Runs on every rank: the bytes that autograd keeps, for each choice of what learns."""
    import torch
    from model_fixtures import settings

    from vlm import parallel

    parallel.initialize(settings(**layout).parallel, 3)
    kept = {name: kept_bytes(trainable, **layout) for name, trainable in PARTS.items()}
    (out / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "layout",
    [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"tensor": 2, "sequence": True, "recompute": True}],
    ids=lambda layout: "+".join(layout),
)
def test_activations_of_a_shard_are_what_autograd_keeps(layout, tmp_path):
    ranks.launch(2, measure, layout, tmp_path)
    for rank in range(2):
        kept = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, trainable in PARTS.items():
            assert estimated_bytes(trainable, **layout) == pytest.approx(kept[name], rel=0.04), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return toy_run.make(tmp_path_factory.mktemp("plan"))


def bases_of(folder: Path, config: configuration.Config) -> Bases:
    return resources.bases(config, language=folder / "hub/language", vision=folder / "hub/vision")


def stored_bytes(checkpoint: Path) -> int:
    """Of all tensors, without what surrounds each of them in a file."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata.values()
    tensors = [entry for entry in entries if isinstance(entry, TensorStorageMetadata)]
    return sum(math.prod(tensor.size) * tensor.properties.dtype.itemsize for tensor in tensors)


def test_the_combined_checkpoint_has_the_expected_bytes(folder):
    config = configuration.load(folder / "config.yaml")
    assert storage.combined(bases_of(folder, config), config) == stored_bytes(folder / "combined")


SHARED = {"ranks_per_node": 2, "distributed_optimizer": True}


@pytest.mark.parametrize(
    ("stage", "layout"),
    [
        ("pretrain", {}),
        ("sft", {"dtype": "bfloat16"}),
        ("sft", SHARED),
        ("all", SHARED | {"dtype": "bfloat16"}),
    ],
    ids=["float32", "bfloat16", "float32+distributed_optimizer", "bfloat16+distributed_optimizer"],
)
def test_a_stage_writes_what_was_expected(folder, tmp_path, stage, layout):
    out = toy_run.run(folder, tmp_path / "out", stage, **layout)
    config = configuration.load(out / "config.yaml")
    bases = bases_of(folder, config)
    report = json.loads((out / "finished.json").read_text())
    counts = parameters.of_parts(bases, config)
    trained = sum(counts[part].total for part in config.stages[stage].trainable)
    whole = sum(count.total for count in counts.values())
    assert (report["trained_parameters"], report["frozen_parameters"]) == (trained, whole - trained)
    steps = 4 * 100  # Adam counts its steps in a tensor of a single number per parameter
    expected = storage.of_stage(config, stage, bases).each
    assert expected <= stored_bytes(out / report["checkpoint"]) <= expected + steps
