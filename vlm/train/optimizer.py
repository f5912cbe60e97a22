"""megatron-core's optimizer and learning-rate schedule for one stage, over its trainable parameters only."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from vlm import parallel
from vlm.config import Config, Stage
from vlm.train import torch_adamw


def wrap(model: Any, *, distributed_optimizer: bool = False) -> DistributedDataParallel:
    """Give every trainable parameter its place in a contiguous fp32 gradient buffer; frozen ones get none.

    Gradients are sums over trained tokens until `finalize_model_grads` divides them by the global number of tokens,
    so that the loss is the token mean whatever the micro-batches and data-parallel ranks (mcore's
    `calculate_per_token_loss`).

    Args:
        model: after `freeze`.
        distributed_optimizer: shard masters and optimizer state over the data-parallel ranks.
    """
    model.config.calculate_per_token_loss = True
    # Reduction is not overlapped with backward: mcore then expects a gradient of every parameter in every
    # micro-batch, and one of text alone gives the projector none.
    layout = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=distributed_optimizer
    )
    return DistributedDataParallel(config=model.config, ddp_config=layout, module=model)


def build(
    model: DistributedDataParallel, config: Config, stage: Stage
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW with decoupled weight decay (none on biases and norms), fp32 masters under bfloat16, cosine schedule.

    The schedule counts iterations: `schedule.step(1)` before iteration i gives it the learning rate f(i), with
    f linear from 0 to `lr` over the warm-up and then a cosine to `min_lr` at the last iteration, the value that
    Megatron-LM logs for that iteration.
    """
    torch_adamw.install()
    wanted = stage.optimizer
    bfloat16 = config.dtype == "bfloat16"
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=wanted.lr,
            min_lr=wanted.min_lr,
            weight_decay=wanted.weight_decay,
            adam_beta1=wanted.beta1,
            adam_beta2=wanted.beta2,
            adam_eps=wanted.eps,
            clip_grad=wanted.clip_grad,
            bf16=bfloat16,
            params_dtype=torch.bfloat16 if bfloat16 else torch.float32,
            use_distributed_optimizer=model.ddp_config.use_distributed_optimizer,
        ),
        [model],
    )
    for group in optimizer.param_groups:
        if "foreach" in group:  # torch's AdamW, where neither Transformer Engine nor Apex is installed
            group["fused"] = True
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=wanted.lr,
        min_lr=wanted.min_lr,
        lr_warmup_steps=min(round(wanted.warmup_share * stage.iterations), stage.iterations - 1),
        lr_decay_steps=stage.iterations,
        lr_decay_style="cosine",
        start_wd=wanted.weight_decay,
        end_wd=wanted.weight_decay,
        wd_incr_steps=stage.iterations,
        wd_incr_style="constant",
    )
    model.config.grad_scale_func = optimizer.scale_loss
    model.config.finalize_model_grads_func = finalize_model_grads
    return optimizer, schedule


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The learning rate of the current iteration; all groups follow one schedule."""
    return float(optimizer.param_groups[0]["lr"]) if optimizer.param_groups else 0.0


def num_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable and frozen parameters of the whole model, each counted once. Called by all ranks."""
    counts = [0, 0]
    for parameter in model.parameters():
        if param_is_not_tensor_parallel_duplicate(parameter) and param_is_not_shared(parameter):
            counts[not parameter.requires_grad] += parameter.numel()
    sums = torch.tensor(counts, device=parallel.device())
    torch.distributed.all_reduce(sums, group=parallel_state.get_model_parallel_group())
    trainable, frozen = sums.tolist()
    return trainable, frozen
