"""Estimated memory: against measurements on a GPU, against what autograd keeps, and against sums done by hand."""

from __future__ import annotations

import json

import pytest
from model_fixtures import initialize
from plan_fixtures import PARTS, ROOT, alone, estimated_bytes, kept_bytes, recipe_bases, settings

from vlm import parallel
from vlm.resources import memory

MEASURED = json.loads((ROOT / "tests/benches/results/training_step_nvidia-h200.json").read_text())
GIB = 2**30
SFT = 7_248_023_552 + 20_979_712
"""Parameters of language model and projector."""


@pytest.mark.parametrize("row", MEASURED, ids=[f"{row['stage']}-{row['backend']}" for row in MEASURED])
def test_the_estimate_is_what_a_gpu_measured(row):
    config = alone(kernels__backend=row["backend"], **{f"stages__{row['stage']}__global_batch": 2})
    found = memory.peak(config, row["stage"], recipe_bases(row["layers"]))
    assert found.total / GIB == pytest.approx(row["peak_gib"], rel=0.01)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("trainable", PARTS.values(), ids=PARTS)
def test_activations_are_what_autograd_keeps(trainable, recompute):
    initialize()
    try:
        kept = kept_bytes(trainable, recompute=recompute)
    finally:
        parallel.destroy()
    assert estimated_bytes(trainable, recompute=recompute) == pytest.approx(kept, rel=0.03)


def test_bytes_per_parameter_by_hand():
    """SFT in bfloat16 on one GPU: 2 of weight, 4 of gradient, 4 of master, 8 of moments; frozen vision 2."""
    found = memory.peak(alone(), "sft", recipe_bases())
    assert found.weights == 2 * (SFT + 303_505_408)
    assert (found.gradients, found.masters, found.moments) == (4 * SFT, 4 * SFT, 8 * SFT)
    single = memory.peak(alone(dtype="float32"), "sft", recipe_bases())
    assert (single.weights, single.gradients, single.masters, single.moments) == (
        4 * (SFT + 303_505_408),
        4 * SFT,
        0,
        8 * SFT,
    )


@pytest.mark.parametrize("ranks", [2, 8])
def test_the_distributed_optimizer_shares_masters_and_moments_alone(ranks):
    layout = {"parallel__ranks_per_node": ranks, "parallel__tensor": 1}
    whole, shared = (
        memory.peak(settings(**layout, parallel__distributed_optimizer=one), "sft", recipe_bases())
        for one in (False, True)
    )
    assert (whole.masters, whole.moments) == (4 * SFT, 8 * SFT)
    assert (shared.masters, shared.moments) == (4 * SFT // ranks, 8 * SFT // ranks)
    assert (shared.weights, shared.gradients, shared.activations) == (
        whole.weights,
        whole.gradients,
        whole.activations,
    )


def test_a_frozen_part_has_weights_alone():
    found = memory.peak(alone(), "pretrain", recipe_bases())
    assert found.gradients == 4 * 20_979_712
    assert found.weights == 2 * (SFT + 303_505_408)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("distributed_optimizer", [False, True], ids=["whole", "shared"])
@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_more_ranks_never_need_more_memory(axis, distributed_optimizer, recompute, stage):
    layout = {"tensor": 1, "pipeline": 1, "distributed_optimizer": distributed_optimizer, "recompute": recompute}
    needed = [
        memory.peak(
            settings(**{f"parallel__{key}": value for key, value in (layout | {axis: ranks}).items()}),
            stage,
            recipe_bases(),
        ).total
        for ranks in (1, 2, 4, 8)
    ]
    assert needed == sorted(needed, reverse=True)
    if (axis, recompute) == ("tensor", False):
        assert needed[0] / needed[-1] > 2


@pytest.mark.parametrize(
    "change",
    [{"parallel__recompute": True}, {"parallel__sequence": True}, {"stages__sft__sequence_length": 4096}],
    ids=["recompute", "sequence", "shorter"],
)
def test_what_saves_activations_does(change):
    plain, changed = (memory.peak(settings(**one), "sft", recipe_bases()) for one in ({}, change))
    assert changed.activations < 0.75 * plain.activations
    assert changed.weights == plain.weights


def test_the_first_pipeline_stage_keeps_a_micro_batch_per_stage():
    layout = {"parallel__tensor": 1, "parallel__pipeline": 4, "parallel__ranks_per_node": 4}
    first, second, _, last = memory.of_training(settings(**layout), "sft", recipe_bases())
    assert 3 * first.activations == 4 * second.activations
    assert 4 * last.activations < first.activations, "the last layer keeps less, and there is one micro-batch"
    one_sequence = settings(**layout, stages__sft__global_batch=1)
    assert memory.of_training(one_sequence, "sft", recipe_bases())[0].activations == first.activations // 4


def test_logits_that_are_avoided():
    """kernels/README.md: plain PyTorch takes 3.00 GiB for 8192 rows of 32768 words, forward and backward."""
    assert memory.logits_avoided(alone(), "sft", recipe_bases()) == 3 * GIB
