"""Process groups and seeds of a run, so that one process, one node or many start with the same call.

Under `torchrun` (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) the groups come from there. Without
it this is the only process, joined through an in-memory store: no port is opened and nothing can collide.
"""

from __future__ import annotations

import atexit
import os
import random
from typing import Any

import numpy
import torch
from torch import distributed

from vlm.config import Parallel

PIPELINE_SEED_STRIDE = 100
"""Stages of a pipeline hold different layers and draw different weights; ranks that share a layer draw alike."""

_current: Parallel | None = None


def single() -> Parallel:
    """The layout of a command that runs in one process whatever the training job has."""
    return Parallel(
        nodes=1, ranks_per_node=1, tensor=1, pipeline=1, sequence=False, distributed_optimizer=False, recompute=False
    )


def device() -> torch.device:
    """Where this process computes: its GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def initialize(parallel: Parallel | None, seed: int) -> None:
    """Join the processes, build megatron-core's groups and seed every generator.

    Args:
        parallel: layout promised by the settings; None for `single()`.
        seed: of the weights' initialisation and of everything drawn later.

    Raises:
        ValueError: the number of processes started is not the promised one.
        RuntimeError: already initialised with another layout, or the launcher's variables are incomplete.
    """
    global _current
    from megatron.core import parallel_state

    from vlm.model import cpu

    cpu.install()
    parallel = parallel or single()
    if _current is not None and _current != parallel:
        raise RuntimeError(f"already initialised with {_current!r}; call vlm.parallel.destroy() first")
    _check_world(parallel)
    if parallel.tensor > 1:
        # Otherwise communication queues behind the computation it should overlap (tensor_parallel/layers.py:738).
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not distributed.is_initialized():
        _join()
    if _current is None:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor, pipeline_model_parallel_size=parallel.pipeline
        )
    _current = parallel
    seed_everything(seed)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, PyTorch and megatron-core's generators."""
    from megatron.core import parallel_state, tensor_parallel

    seed += PIPELINE_SEED_STRIDE * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    # The tracker separates the dropout of tensor-parallel ranks. Nothing drops out here, and its plain form needs a
    # GPU (tensor_parallel/random.py:235), so the CPU takes the form that leaves PyTorch's generator alone.
    on_gpu = torch.cuda.is_available()
    tensor_parallel.model_parallel_cuda_manual_seed(seed, inference_rng_tracker=not on_gpu, force_reset_rng=True)


def destroy() -> None:
    """Leave the process groups; safe to call twice."""
    global _current
    from megatron.core import parallel_state

    if distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()
    _current = None


def _check_world(parallel: Parallel) -> None:
    started = distributed.get_world_size() if distributed.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if started != parallel.world_size:
        raise ValueError(
            f"parallel.nodes x parallel.ranks_per_node promises {parallel.world_size} processes, {started} started: "
            f"launch with `torchrun --nnodes {parallel.nodes} --nproc-per-node {parallel.ranks_per_node}`, or change "
            "the keys"
        )


def _join() -> None:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    options: dict[str, Any] = {}
    if "RANK" not in os.environ:
        options = {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
        atexit.register(destroy)  # or NCCL warns; of several ranks, one that ends may be the only one
    elif missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise RuntimeError(f"RANK is set without {', '.join(missing)}; start the processes with torchrun")
    distributed.init_process_group(backend, **options)
