"""Attention for Hopper (H100, H200): its copy engine, matrix units and arithmetic units work at the same time.

Written in Gluon, Triton's dialect in which a kernel says which warps do what: one warp copies tiles from memory, two
warp groups multiply and compute the softmax, and in the backward pass one more warp adds the queries' gradient up in
memory. That makes five products per pair of tiles backwards, where `vlm_kernels.attention` has seven, and the sums are
added in one order, so that a gradient still has the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_kernels.hopper.backward import attention_backward
from vlm_kernels.hopper.forward import attention_forward
from vlm_kernels.hopper.tiles import copyable

__all__ = ["attention_backward", "attention_forward", "usable"]


def usable(q: Tensor, k: Tensor, v: Tensor, causal: bool, borders: Tensor | None, ranges: Tensor | None) -> bool:
    """Whether these kernels take a case whose arguments `attention` has checked, q being [.., G, H / G, K]."""
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and q.dtype in (torch.bfloat16, torch.float16)
        and ranges is None
        and len(q) == len(k)
        and (causal or borders is None)
        and all(copyable(x) for x in (q, k, v))
    )
