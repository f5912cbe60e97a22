"""Everything megatron-core 0.16.1 needs to run without CUDA, in one place; with CUDA present nothing here acts.

Most of it needs no patch: weights are initialised on the CPU, norms, attention and rotary positions are ours
(`vlm.model.layers`), and the random tracker takes its inference form (`vlm.parallel`). What is left are names that
megatron-core writes out: the device "cuda", `torch.cuda.current_device()`, and type names such as
'torch.cuda.FloatTensor'. Each module below sees a `torch` that answers for the CPU; no other module's `torch` changes.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import torch

MODULES = {
    "distributed.param_and_grad_buffer": "gradient buffers: 783, 800, 806",
    "optimizer.optimizer": "found_inf, scales and overflow buffers: 473, 481, 485, 907, 1141",
    "optimizer.clip_grads": "norms: 90, 103, 115, 174, 207",
    "optimizer.distrib_optimizer": "gathered state: 791, 1077",
    "pipeline_parallel.schedules": "token counter: 596, 983, 2138",
    "pipeline_parallel.p2p_communication": "received tensors: 190-202, 313, 321; synchronize: 242, 398",
    "tensor_parallel.mappings": "gathered tensors: 91, 141, 148, 181, 442",
    "tensor_parallel.layers": "sequence-parallel buffers: 552, 597, 607",
    "tensor_parallel.utils": "gathered shards: 70, 91",
    "tensor_parallel.random": "recomputation's generator state: 55, 93-103",
    "utils": "global buffers: 631; parameter norm: 1207",
    "parallel_state": "synchronize: 198, 933, 1319",
    "timers": "synchronize: 152, 165; gathered times: 303",
    "transformer.attention": "key/value cache: 430",
    "transformer.utils": "default masks: 35, 40",
    "dist_checkpointing.exchange_utils": "exchanged shards: 98-110, 326-336, 499",
    "dist_checkpointing.strategies.async_utils": "liveness: 165, 604; synchronize: 212",
    "dist_checkpointing.strategies.filesystem_async": "synchronize: 230",
    "dist_checkpointing.strategies.fully_parallel": "synchronize: 272, 281",
    "dist_checkpointing.strategies.state_dict_saver": "save checks: 204, 252",
}
"""Modules of megatron.core whose `torch` is replaced, with the lines that need it."""

FACTORIES = ("arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "tensor", "zeros", "zeros_like")
TYPE_READERS = ("megatron.core.optimizer.",)
"""They compare `tensor.type()` with CUDA's names: clip_grads.py:167, optimizer.py:671, 690,
distrib_optimizer.py:361, 420, 582."""
CUDA_MOVERS = (
    "megatron.core.models.vision.clip_vit_model",  # position ids: 124
    "megatron.core.models.common.language_module.language_module",  # tied embeddings of a pipeline: 244
    "megatron.core.optimizer.",  # loaded state: optimizer.py:375, 380; distrib_optimizer.py:1089
    "megatron.core.dist_checkpointing.",  # exchange_utils.py:336, 499
)
"""They call `tensor.cuda()`."""

_installed = False


def install() -> None:
    """Substitute once; a no-op where CUDA is available or the substitution already happened."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    for name in MODULES:
        module = importlib.import_module(f"megatron.core.{name}")
        if vars(module).get("torch") is torch:
            vars(module)["torch"] = _CpuTorch()
    _let_tensors_answer()


def linear(layer: type) -> type:
    """`layer`, one of megatron-core's parallel linear layers, with its products computed by oneDNN on the CPU.

    PyTorch gives fp32 products to MKL, which uses half the vector width of AMD's processors. On one core of an EPYC
    [1024, 128] x [128, 688] takes 1.8 ms there and 0.75 ms here; results differ in the last bits only.
    """
    if torch.cuda.is_available() or not torch.backends.mkldnn.is_available():
        return layer
    return type(f"OneDnn{layer.__name__}", (_OneDnn, layer), {})


class _OneDnn:
    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        if input.dtype != torch.float32 or self.tp_group.size() > 1:  # type: ignore[attr-defined]
            return super()._forward_impl(input=input, weight=weight, **options)  # type: ignore[misc]
        return _OneDnnProduct.apply(input, weight, options["bias"])


class _OneDnnProduct(torch.autograd.Function):
    """x W^T + b with x [.., D], W [F, D], b [F], and its gradients dx = dy W, dW = dy^T x, db = sum dy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.flatten(0, -2)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        return _product(rows, weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        dy = gradient.flatten(0, -2)
        wanted = ctx.needs_input_grad
        return (
            _product(dy, weight.t()).view(*gradient.shape[:-1], -1) if wanted[0] else None,
            _product(dy.t(), rows.t()) if wanted[1] else None,
            dy.sum(0) if wanted[2] else None,
        )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Forward(types.ModuleType):
    """A module that answers for another one, except for the names set on it."""

    def __init__(self, target: types.ModuleType) -> None:
        super().__init__(target.__name__)
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


class _CpuTorch(_Forward):
    """`torch` whose factories and `torch.cuda` mean the CPU."""

    def __init__(self) -> None:
        super().__init__(torch)
        vars(self).update({name: _on_cpu(getattr(torch, name)) for name in FACTORIES}, cuda=_cpu_cuda())


def _cpu_cuda() -> types.ModuleType:
    cuda = _Forward(torch.cuda)
    generator = _Forward(torch.cuda.random)
    for module in (cuda, generator):
        vars(module).update(
            get_rng_state=lambda device=None: torch.get_rng_state(),
            set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        )
    vars(cuda).update(
        random=generator,
        manual_seed=torch.manual_seed,
        current_device=lambda: torch.device("cpu"),
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
    )
    return cuda


def _on_cpu(factory: Any) -> Any:
    def make(*arguments: Any, **options: Any) -> torch.Tensor:
        if "cuda" in str(options.get("device", "")):
            options["device"] = "cpu"
        return factory(*arguments, **options)

    return make


def _let_tensors_answer() -> None:
    """Give `Tensor.type()` and `Tensor.cuda()` the answers the modules above expect, when they are the callers."""
    read_type, move = torch.Tensor.type, torch.Tensor.cuda

    def type_(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        answer = read_type(tensor, *arguments, **options)
        if not arguments and not options and sys._getframe(1).f_globals.get("__name__", "").startswith(TYPE_READERS):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    def cuda(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if sys._getframe(1).f_globals.get("__name__", "").startswith(CUDA_MOVERS):
            return tensor
        return move(tensor, *arguments, **options)

    torch.Tensor.type = type_
    torch.Tensor.cuda = cuda
