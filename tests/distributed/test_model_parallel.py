"""Two tensor-parallel ranks, with and without sequence parallelism, give the losses and gradients of one."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

FIXTURES = Path(__file__).parents[1] / "unit"
SHAPES = [(31, 1), (20, 0), (33, 2)]


def losses_and_gradients(tensor: int, sequence: bool):
    """Losses, whole gradients by name, and logits of a model drawn from a fixed seed. Runs on every rank."""
    sys.path.insert(0, str(FIXTURES))
    import model_fixtures as fixtures
    from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads

    from vlm import parallel
    from vlm.model import build

    fixtures.initialize(tensor, sequence=sequence)
    model = build(fixtures.LANGUAGE, fixtures.VISION, fixtures.settings(tensor=tensor, sequence=sequence))
    model.freeze(["projector", "language"])
    batch = fixtures.packed(SHAPES)
    losses = model(batch)
    losses.backward(torch.randn(len(losses), generator=torch.Generator().manual_seed(1)))
    for parameter in model.parameters():
        parameter.main_grad = parameter.grad
    for part in (model.vision_projection, model.language_model):
        _allreduce_non_tensor_model_parallel_grads([Wrapped(part)], model.config, tp_group(tensor))
    gradients = {
        name: whole(parameter, name) for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    logits = torch.zeros(0)
    if not sequence:
        tokens = batch.tokens_S[:20].view(2, 10)
        logits = model.logits(tokens, torch.arange(10).repeat(2, 1))
    parallel.destroy()
    return losses.detach(), gradients, logits


class Wrapped(torch.nn.Module):
    """What finalize_model_grads expects: a module in DDP, with its configuration."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.ddp_config = type("Options", (), {"use_megatron_fsdp": False})()


def tp_group(tensor: int):
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def whole(parameter, name: str):
    """The gradient of the unsplit weight; gate and up of each rank are joined apart."""
    from megatron.core import parallel_state

    ranks = parallel_state.get_tensor_model_parallel_world_size()
    if ranks == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return parameter.main_grad.clone()
    parts = [torch.empty_like(parameter.main_grad) for _ in range(ranks)]
    distributed.all_gather(parts, parameter.main_grad.contiguous(), group=tp_group(ranks))
    if "language_model" in name and "linear_fc1" in name:
        return torch.cat([half for i in (0, 1) for half in (part.chunk(2)[i] for part in parts)])
    return torch.cat(parts, dim=parameter.partition_dim)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT="0")
    for sequence in (False, True):
        store = f"file://{folder}/store-{sequence}"  # no port, so tests beside this one cannot collide
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        torch.save(losses_and_gradients(2, sequence), f"{folder}/{sequence}-{rank}.pt")


@pytest.fixture(scope="module")
def alone():
    return losses_and_gradients(1, False)


@pytest.fixture(scope="module")
def two_ranks():
    """Results of both ranks, by whether the sequence was sharded."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(worker, args=(folder,), nprocs=2)
        return {
            sequence: [torch.load(f"{folder}/{sequence}-{rank}.pt") for rank in (0, 1)] for sequence in (False, True)
        }


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "tensor+sequence"])
def test_two_ranks_equal_one(alone, two_ranks, sequence):
    losses, gradients, logits = alone
    for got, got_gradients, got_logits in two_ranks[sequence]:
        torch.testing.assert_close(got, losses, atol=1e-5, rtol=0)
        assert got_gradients.keys() == gradients.keys()
        for name, wanted in gradients.items():
            scale = wanted.abs().max().item()
            assert scale > 0, name
            found = got_gradients[name]
            torch.testing.assert_close(found, wanted, atol=1e-5 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        if not sequence:
            assert got_logits.shape == (2, 134)
            torch.testing.assert_close(got_logits, logits, atol=1e-5, rtol=0)
