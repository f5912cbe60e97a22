"""The pieces that fill megatron-core's slots: norms, rotary self-attention, activations and residual adds.

They keep megatron-core's parameter names, so its checkpoints and sharding apply unchanged.
Shapes: S sequence, B batch, T packed tokens (B = 1), D hidden, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import attention as core
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import functional

from vlm.model.cache import Tokens
from vlm.model.sizes import RopeScaling
from vlm_kernels import reference


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm as `config.normalization` says.

    megatron-core's WrappedTorchNorm refuses sequence parallelism (transformer/torch_norm.py:32); here the parameters
    carry the mark by which finalize_model_grads sums their partial gradients.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.shape = (hidden_size,)
        device = "cpu" if config.use_cpu_initialization else "cuda"
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.bias: torch.nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=device))
        for parameter in self.parameters():
            vars(parameter)["sequence_parallel"] = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return functional.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        return functional.rms_norm(x, self.shape, self.weight, self.eps)


class CoreAttention(torch.nn.Module):
    """megatron-core's core-attention slot around a function with the signature of vlm_kernels.attention."""

    attention: Callable[..., Tensor] = staticmethod(reference.attention)

    def __init__(self, config: TransformerConfig, attn_mask_type: AttnMaskType, **_: Any) -> None:
        super().__init__()
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = config.softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        key_ranges: Tensor | None = None,
    ) -> Tensor:
        """Attend, with the query's heads by group: [S, B, G, H / G, K], or packed [T, G, H / G, K].

        So they lie in the fused projection, where a kernel can read them in place. Returns [S, B, H * K] or [T, H * K].

        `key_ranges`, int32 [B, 2], serves decoding: queries of sample b see that range of its keys, whatever the mask
        type.
        """
        out = type(self).attention(
            query,
            key,
            value,
            causal=key_ranges is None and self.attn_mask_type == AttnMaskType.causal,
            cu_seqlens=packed_seq_params.cu_seqlens_q if packed_seq_params else None,
            max_seqlen=packed_seq_params.max_seqlen_q if packed_seq_params else None,
            softmax_scale=self.softmax_scale,
            key_ranges=key_ranges,
        )
        return out.flatten(-2)


class SelfAttention(core.SelfAttention):
    """megatron-core's self-attention with rotary positions given per token.

    megatron-core derives positions from `cu_seqlens` with two host synchronisations per layer, recomputes cosines in
    every layer, and caches keys before rotating them, so that each decoded token rotates the whole cache again
    (rope_utils.py:190-240, attention.py:575). Here `rotary_pos_emb` holds cosines and sines of every token, computed
    once per batch (`rotary_table`), and keys are cached as rotated.
    """

    rotate_heads: Callable[..., tuple[Tensor, Tensor, Tensor]] = staticmethod(reference.rotate_heads)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        inference_context: Tokens | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        rows: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As megatron-core's; of these `rows` [R] alone, if given: [R, 1, D]."""
        assert attention_mask is None, "masks are given by borders and ranges"
        query, key, value = self._heads(hidden_states, rotary_pos_emb)
        key_ranges = None
        if inference_context is not None:
            key, value = inference_context.keep(self.layer_number - 1, key, value)
            key_ranges = inference_context.key_ranges
        if packed_seq_params is not None:
            query, key, value = (x.squeeze(1) for x in (query, key, value))
        out = self.core_attention(query, key, value, packed_seq_params=packed_seq_params, key_ranges=key_ranges)
        if packed_seq_params is not None:
            out = out.unsqueeze(1)
        return self.linear_proj(out if rows is None else out.index_select(0, rows))

    def _heads(self, hidden_states: Tensor, rotary_pos_emb: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[S, B, D] to query [S, B, G, H / G, K], key and value [S, B, G, K] of this rank: views of one tensor."""
        mixed, _ = self.linear_qkv(hidden_states)  # [S, B, G * (H/G + 2) * K]: per group its queries, key, value
        groups = self.num_query_groups_per_partition
        per_group = self.num_attention_heads_per_partition // groups
        mixed = mixed.view(*mixed.shape[:2], groups, per_group + 2, self.hidden_size_per_attention_head)
        if rotary_pos_emb is None:
            return mixed[..., :per_group, :], mixed[..., per_group, :], mixed[..., per_group + 1, :]
        return type(self).rotate_heads(mixed, rotary_pos_emb)


@dataclass
class PackedSequence(PackedSeqParams):
    """megatron-core's description of samples laid one after the other, and what is wanted of them."""

    rows: Tensor | None = None
    """int64 [R]: the tokens whose activations are needed after the last layer; None for all."""


class Layer(TransformerLayer):
    """megatron-core's layer with a forward of its own, without dropout. Nor does it turn gradients on around residual
    adds (transformer_layer.py:431), which starts a graph inside `torch.no_grad()` where a bias is trainable.

    The last layer goes on after its attention with the wanted rows alone: in pretraining, where 6 % of the tokens are
    trained, that spares 2.6 % of the language model's products.
    """

    def forward(
        self, hidden_states: Tensor, *arguments: Any, packed_seq_params: PackedSeqParams | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        """As megatron-core's, without cross-attention."""
        assert self.hidden_dropout == 0.0, "dropout is not part of the recipe"
        rows = packed_seq_params.rows if isinstance(packed_seq_params, PackedSequence) else None
        if self.layer_number < self.config.num_layers:
            rows = None
        stream, normed = self.add_and_norm(hidden_states, None, self.input_layernorm)
        update = self.self_attention(normed, *arguments, packed_seq_params=packed_seq_params, rows=rows, **options)
        if rows is not None:
            stream = stream.index_select(0, rows)
        stream, normed = self.add_and_norm(stream, update, self.pre_mlp_layernorm)
        return add(stream, self.mlp(normed)), None

    def add_and_norm(
        self, stream: Tensor, update: tuple[Tensor, Tensor | None] | None, norm: torch.nn.Module
    ) -> tuple[Tensor, Tensor]:
        """The residual stream with an update and its bias, if there is one, and the norm of that."""
        stream = stream if update is None else add(stream, update)
        return stream, norm(stream)


def add(stream: Tensor, update: tuple[Tensor, Tensor | None]) -> Tensor:
    """What a linear layer gives, its bias apart, on the residual stream."""
    x, bias = update
    return stream + x if bias is None else stream + (x + bias)


def rotary_table(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> Tensor:
    """Cosines and sines [2, S, B, K/2] of int64 positions [B, S], computed in fp32.

    Angle i of position p is p times frequency i, pairing channels i and i + K/2 as `transformers` and megatron-core's
    non-interleaved form do.
    """
    frequencies = rotary_frequencies(head_dim, theta, scaling, positions.device)
    angles = positions.t().unsqueeze(-1).float() * frequencies
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device | None = None
) -> Tensor:
    """Radians per position [K/2] in fp32: theta^(-2i/K) (RoFormer, equation 15).

    Llama 3.1's scaling (`apply_scaling` in the model code of its release) goes by the turns that an angle makes within
    the positions of pretraining: up to low_freq_factor turns its frequency is divided by `factor`, from
    high_freq_factor on it stays, and in between the part that stays grows linearly with the turns.
    """
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    stays = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (stays + (1 - stays) / scaling.factor)


class SwiGLU(MegatronModule):
    """silu(gate) * up of fc1's output [.., 2F]; megatron-core's own form adds a copy (mlp.py:208)."""

    swiglu: Callable[[Tensor], Tensor] = staticmethod(reference.swiglu)

    def forward(self, x: Tensor) -> Tensor:
        return type(self).swiglu(x)


def bias_in_product(layer: type) -> type:
    """`layer`, one of megatron-core's parallel linear layers, whose product adds the bias too where nothing learns.

    megatron-core adds it in an operation of its own, 60 us for 16 pictures on an H200, four times per vision layer: 11
    of 1,025 ms of a pretraining step.
    """
    return type(f"BiasIn{layer.__name__}", (_BiasInProduct, layer), {})


class _BiasInProduct:
    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.weight, self.bias  # type: ignore[attr-defined]
        split = self.tp_group.size() > 1  # type: ignore[attr-defined]
        if bias is None or split or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
            return super().forward(x, *arguments, **options)  # type: ignore[misc]
        return functional.linear(x, weight, bias), None
