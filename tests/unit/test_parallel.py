"""Start and end of a process's groups, and the CPU substitutions that come with them."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy
import pytest
import torch
from torch import distributed

from vlm import parallel
from vlm.config import Parallel


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield
    parallel.destroy()


def layout(ranks: int, tensor: int = 1) -> Parallel:
    return parallel.single().model_copy(update={"ranks_per_node": ranks, "tensor": tensor})


def draws():
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def test_one_process_needs_no_launcher_and_may_start_again():
    for _ in range(2):
        parallel.initialize(None, seed=7)
        assert distributed.get_world_size() == 1
        first = draws()
        parallel.initialize(parallel.single(), seed=7)  # the same layout only seeds again
        assert draws() == first
        parallel.seed_everything(8)
        assert not set(draws()) & set(first)  # each generator moved
        parallel.destroy()
        parallel.destroy()


def test_promised_processes_must_have_been_started():
    with pytest.raises(ValueError, match=r"promises 8 processes, 1 started: .*torchrun --nnodes 1 --nproc-per-node 8"):
        parallel.initialize(layout(8), seed=1)
    assert not distributed.is_initialized()


def test_half_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match="RANK is set without WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        parallel.initialize(None, seed=1)


def test_another_layout_needs_destroy_first(monkeypatch):
    parallel.initialize(None, seed=1)
    with pytest.raises(RuntimeError, match=r"call vlm.parallel.destroy\(\) first"):
        parallel.initialize(layout(2, tensor=2), seed=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is substituted beside CUDA")
def test_substitutions_reach_megatron_alone():
    parallel.initialize(None, seed=1)
    from megatron.core.optimizer import clip_grads
    from megatron.core.pipeline_parallel import schedules

    for module in (clip_grads, schedules):
        assert module.torch.zeros(1, device="cuda").device.type == "cpu"
        assert module.torch.cuda.current_device() == torch.device("cpu")
        assert isinstance(torch.ones(1), module.torch.Tensor)
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(1).cuda()
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert torch.ones(1).type(torch.int32).dtype == torch.int32


def test_configuration_of_sizes_imports_no_torch():
    code = "import sys, vlm.model.sizes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_command_leaves_its_groups_when_it_ends():
    """NCCL warns of a command that does not."""
    code = (
        "import atexit; from torch import distributed; from vlm import parallel\n"
        "atexit.register(lambda: print('joined' if distributed.is_initialized() else 'left'))\n"  # runs last
        "parallel.initialize(None, 0); print('joined' if distributed.is_initialized() else 'left')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["joined", "left"]
