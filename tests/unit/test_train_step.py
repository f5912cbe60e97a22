"""The step against plain PyTorch: token mean, clipping, AdamW, cosine. D features, R trained positions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from vlm import config as configuration
from vlm import parallel
from vlm.batch import PackedBatch, Sample, pack
from vlm.train import optimizer as optimizers
from vlm.train.step import NonFiniteError, Step

ROOT = Path(__file__).parents[2]
DIM = 6
ITERATIONS = 5
TRAINED = (1, 7, 3)  # positions of the micro-batches: a mean of means would differ


@pytest.fixture(autouse=True)
def groups():
    parallel.initialize(None, seed=1)
    yield
    parallel.destroy()


def settings(dtype: str = "float32", **optimizer):
    tree = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    tree["dtype"] = dtype
    stage = tree["stages"]["sft"]
    stage["iterations"] = ITERATIONS
    stage["optimizer"] |= {"lr": 0.1, "min_lr": 0.01, "warmup_share": 0.4, "weight_decay": 0.5} | optimizer
    return configuration.validate(tree)


def toy(dtype=torch.float32):
    from megatron.core.enums import ModelType
    from megatron.core.transformer import MegatronModule, TransformerConfig

    class Toy(MegatronModule):
        """A frozen and a trainable layer; tokens choose the rows of a fixed table of inputs."""

        def __init__(self):
            super().__init__(
                TransformerConfig(
                    num_layers=1,
                    hidden_size=DIM,
                    num_attention_heads=1,
                    use_cpu_initialization=True,
                    bf16=dtype == torch.bfloat16,
                    params_dtype=dtype,
                )
            )
            self.model_type = ModelType.encoder_or_decoder
            generator = torch.Generator().manual_seed(3)
            self.table_VD = torch.randn(16, DIM, generator=generator).to(dtype)
            self.frozen = torch.nn.Linear(DIM, DIM, dtype=dtype).requires_grad_(False)
            self.trained = torch.nn.Linear(DIM, 4, dtype=dtype)

        def set_input_tensor(self, tensor):
            pass

        def forward(self, batch: PackedBatch) -> torch.Tensor:
            rows_RD = self.table_VD[batch.tokens_S[batch.trained_positions]]
            out = self.trained(torch.tanh(self.frozen(rows_RD))).float()
            labels_R = batch.labels_S[batch.trained_positions] % 4
            return torch.nn.functional.cross_entropy(out, labels_R, reduction="none")

    torch.manual_seed(2)
    return Toy()


def batches(seed: int = 0):
    generator = np.random.default_rng(seed)
    while True:
        for trained in TRAINED:
            tokens = generator.integers(1, 16, 12)
            mask = np.zeros(12, bool)
            mask[1 : 1 + trained] = True
            sample = Sample(tokens, mask, np.zeros(0, np.int64))
            yield pack([sample], [], [f"set/{generator.integers(1000)}"], 14, 8)


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
