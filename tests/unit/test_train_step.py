"""The step against plain PyTorch: token mean, clipping, AdamW, cosine. D features, R trained positions."""

from __future__ import annotations

import math

import pytest
import torch
from train_toy import DIM, ITERATIONS, TRAINED, batches, settings, toy

from vlm import parallel
from vlm.train import optimizer as optimizers
from vlm.train.step import NonFiniteError, Step


@pytest.fixture(autouse=True)
def groups():
    parallel.initialize(None, seed=1)
    yield
    parallel.destroy()


def build(model, config, loader):
    stage = config.stages["sft"]
    wrapped = optimizers.wrap(model)
    optimizer, schedule = optimizers.build(wrapped, config, stage)
    step = Step(
        wrapped,
        optimizer,
        loader,
        num_micro_batches=len(TRAINED),
        sequence_length=14,
        device=torch.device("cpu"),
        sets=("set",),
    )
    return step, optimizer, schedule


def cosine(iteration: int, lr: float = 0.1, min_lr: float = 0.01, warmup: int = 2) -> float:
    if iteration <= warmup:
        return lr * iteration / warmup
    share = (iteration - warmup) / (ITERATIONS - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * share))


@pytest.mark.parametrize("clip_grad", [100.0, 0.05], ids=["unclipped", "clipped"])
def test_steps_equal_plain_pytorch(clip_grad):
    model, oracle = toy(), toy().double()
    oracle.table_VD = oracle.table_VD.double()
    step, optimizer, schedule = build(model, settings(clip_grad=clip_grad), batches())
    matrix, bias = oracle.trained.weight, oracle.trained.bias
    reference = torch.optim.AdamW(
        [{"params": [matrix], "weight_decay": 0.5}, {"params": [bias], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    expected_batches = batches()
    for iteration in range(1, ITERATIONS + 1):
        schedule.step(1)
        outcome = step()
        losses = torch.cat([oracle(next(expected_batches)) for _ in TRAINED])
        reference.zero_grad()
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_([matrix, bias], clip_grad)
        for group in reference.param_groups:
            group["lr"] = cosine(iteration)
        reference.step()
        assert optimizers.learning_rate(optimizer) == pytest.approx(cosine(iteration), rel=1e-12)
        assert outcome.loss_sum / outcome.trained_tokens == pytest.approx(losses.mean().item(), rel=1e-5)
        assert outcome.gradient_norm == pytest.approx(norm.item(), rel=1e-5)
        assert (outcome.trained_tokens, outcome.tokens, outcome.samples) == (sum(TRAINED), 36, 3)
        torch.testing.assert_close(model.trained.weight.double(), matrix, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(model.trained.bias.double(), bias, rtol=1e-4, atol=1e-6)


def test_frozen_parts_get_neither_gradient_nor_optimizer_memory():
    model = toy()
    before = model.frozen.weight.clone()
    step, optimizer, schedule = build(model, settings(), batches())
    schedule.step(1)
    step()
    assert model.frozen.weight.grad is None and not hasattr(model.frozen.weight, "main_grad")
    assert torch.equal(model.frozen.weight, before)
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert owned == {id(model.trained.weight), id(model.trained.bias)}
    assert optimizers.num_parameters(model) == (DIM * 4 + 4, DIM * DIM + DIM)


def test_bfloat16_keeps_fp32_masters():
    """Updates far below bf16's resolution vanish without masters and add up with them."""
    model = toy(torch.bfloat16)
    start = model.trained.weight.detach().clone()
    step, optimizer, schedule = build(
        model, settings("bfloat16", lr=1e-4, min_lr=1e-4, warmup_share=0.0, weight_decay=0.0), batches()
    )
    for _ in range(ITERATIONS):
        schedule.step(1)
        step()
    masters = {id(p.main_param): p.main_param for p in (model.trained.weight, model.trained.bias)}
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert owned == set(masters)
    master = model.trained.weight.main_param
    assert master.dtype == torch.float32
    moved = (master - start.float()).abs()
    assert 1e-5 < moved.median() < 1e-3
    assert torch.equal(model.trained.weight, master.to(torch.bfloat16))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_broken_numbers_stop_the_run_and_name_the_samples(where):
    model = toy()
    loader, keys = batches(), []

    def watched():
        for batch in loader:
            keys.append(batch.sample_keys[0])
            yield batch

    step, _, schedule = build(model, settings(), watched())
    schedule.step(1)
    step()
    keys.clear()
    original = model.forward

    def broken(batch):
        losses_R = original(batch)
        if len(keys) != 2:  # only the second micro-batch of the step
            return losses_R
        if where == "loss":
            return losses_R * float("nan")
        losses_R.register_hook(lambda gradient: gradient * float("inf"))
        return losses_R

    model.forward = broken
    with pytest.raises(NonFiniteError) as stopped:
        step()
    named = str(stopped.value).split("samples: ")[1].split(", ")
    assert named == (keys[1:2] if where == "loss" else keys)
