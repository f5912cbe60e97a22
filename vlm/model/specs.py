"""Spec providers: which modules fill megatron-core's slots, by `kernels.backend`.

A provider is a small class; `torch` is complete, the names of the others are kept free and refused by name. All read
the same checkpoints, because the modules keep megatron-core's parameter names.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

import vlm_kernels
from vlm.model import cpu
from vlm.model.layers import CoreAttention, Layer, Norm, SelfAttention, SwiGLU, residual_add


class TorchSpecs:
    """Plain PyTorch: the functions of vlm_kernels.reference in megatron-core's slots."""

    column_linear: type = cpu.linear(ColumnParallelLinear)
    row_linear: type = cpu.linear(RowParallelLinear)
    norm: type = Norm
    core_attention: type = CoreAttention
    linear_cross_entropy: Callable[..., Tensor] = staticmethod(vlm_kernels.linear_cross_entropy)
    project_image_tokens: Callable[..., Tensor] = staticmethod(vlm_kernels.project_image_tokens)

    def mlp(self, gated: bool = False) -> MLPSubmodules:
        """Two linear layers; `gated` puts SwiGLU between them, else the configuration's activation."""
        return MLPSubmodules(
            linear_fc1=self.column_linear, linear_fc2=self.row_linear, activation_func=SwiGLU if gated else None
        )

    def block(self, num_layers: int, *, causal: bool, gated: bool) -> TransformerBlockSubmodules:
        """Specs of this pipeline stage's `num_layers` layers and of the norm after the last."""
        attention = ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
            submodules=SelfAttentionSubmodules(
                linear_qkv=self.column_linear, core_attention=self.core_attention, linear_proj=self.row_linear
            ),
        )
        layer = ModuleSpec(
            module=Layer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=self.norm,
                self_attention=attention,
                self_attn_bda=residual_add,
                pre_mlp_layernorm=self.norm,
                mlp=ModuleSpec(module=MLP, submodules=self.mlp(gated)),
                mlp_bda=residual_add,
            ),
        )
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=self.norm)


PROVIDERS: dict[str, type[TorchSpecs]] = {"torch": TorchSpecs}
PLANNED = ("triton", "transformer_engine")


def provider(backend: str) -> TorchSpecs:
    """The provider named by `kernels.backend`.

    Raises:
        ValueError: the backend does not exist, or not yet.
    """
    if backend in PROVIDERS:
        return PROVIDERS[backend]()
    state = "is not built yet" if backend in PLANNED else "does not exist"
    raise ValueError(f"kernels.backend: {backend!r} {state}; set it to one of {', '.join(PROVIDERS)}")
