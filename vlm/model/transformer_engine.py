"""The model's slots filled from Transformer Engine, to measure against and for those who trust it more.

Parameters keep the plain names and nothing else enters a checkpoint, so every backend reads the same ones. Transformer
Engine needs CUDA and its own PyTorch extension (`pip install 'vlm[gpu]'`), so only `vlm.model.specs` imports this file.
"""

from __future__ import annotations

from typing import Any

import torch
import transformer_engine.pytorch as te
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional
from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

from vlm.model.layers import CoreAttention
from vlm.model.specs import TorchSpecs


class _RMSNorm(te.RMSNorm):
    get_extra_state = torch.nn.Module.get_extra_state  # the state of FP8 recipes, which this recipe has none of
    set_extra_state = torch.nn.Module.set_extra_state


class _LayerNorm(te.LayerNorm):
    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state


class Norm:
    """Builds RMSNorm or LayerNorm as `config.normalization` says. A class, since megatron-core calls no function."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> torch.nn.Module:
        kind = _LayerNorm if config.normalization == "LayerNorm" else _RMSNorm
        module = kind(hidden_size, eps=eps, dtype=config.params_dtype, device="cuda")
        for parameter in module.parameters():
            vars(parameter)["sequence_parallel"] = config.sequence_parallel
        return module


class Attention(CoreAttention):
    """DotProductAttention (cuDNN or FlashAttention, as Transformer Engine chooses) in the core-attention slot."""

    def __init__(self, config: TransformerConfig, attn_mask_type: AttnMaskType, layer_number: int, **_: Any) -> None:
        super().__init__(config, attn_mask_type)
        attention = te.DotProductAttention(
            config.num_attention_heads // config.tensor_model_parallel_size,
            config.kv_channels,
            num_gqa_groups=(config.num_query_groups or config.num_attention_heads) // config.tensor_model_parallel_size,
            attention_dropout=0.0,
            softmax_scale=config.softmax_scale,
            layer_number=layer_number,
        )
        self.__dict__["_attention"] = attention  # not a submodule: it has no weights, only FP8 state

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        key_ranges: Tensor | None = None,
    ) -> Tensor:
        """As CoreAttention; decoding goes through PyTorch."""
        if key_ranges is not None:
            return super().forward(query, key, value, key_ranges=key_ranges)
        query = query.flatten(-3, -2)
        causal = self.attn_mask_type == AttnMaskType.causal
        if packed_seq_params is None:
            kind = "causal" if causal else "no_mask"
            return self._attention(query, key, value, qkv_format="sbhd", attn_mask_type=kind)
        return self._attention(
            query,
            key,
            value,
            qkv_format="thd",
            attn_mask_type="padding_causal" if causal else "padding",
            cu_seqlens_q=packed_seq_params.cu_seqlens_q,
            cu_seqlens_kv=packed_seq_params.cu_seqlens_kv,
            max_seqlen_q=packed_seq_params.max_seqlen_q,
            max_seqlen_kv=packed_seq_params.max_seqlen_kv,
        )


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, group: Any = None, ignore_index: int = -100
) -> Tensor:
    """As vlm_kernels.linear_cross_entropy, from whole logits."""
    if group is not None and group.size() > 1:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    logits = functional.linear(hidden, weight).unsqueeze(0)
    losses = parallel_cross_entropy(logits, target.unsqueeze(0), 0.0, False, group, ignore_index)
    return losses.squeeze(0).float()


class TransformerEngineSpecs(TorchSpecs):
    """Attention, norms and loss from Transformer Engine; linear layers stay megatron-core's, which call cuBLAS."""

    norm = Norm
    core_attention = Attention
    linear_cross_entropy = staticmethod(linear_cross_entropy)
