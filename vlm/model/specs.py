"""Spec providers: which modules fill megatron-core's slots, by `kernels.backend`.

A provider is a small class. All read the same checkpoints, because the modules keep megatron-core's parameter names.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
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
from vlm.model.layers import CoreAttention, Layer, Norm, SelfAttention, SwiGLU, bias_in_product
from vlm_kernels import reference


class TorchSpecs:
    """Plain PyTorch: the functions of vlm_kernels.reference in megatron-core's slots."""

    column_linear: type = cpu.linear(ColumnParallelLinear)
    row_linear: type = cpu.linear(RowParallelLinear)
    norm: Callable[..., torch.nn.Module] = Norm
    self_attention: type = SelfAttention
    core_attention: type = CoreAttention
    layer: type = Layer
    swiglu: type = SwiGLU
    quick_gelu: Callable[[Tensor], Tensor] = staticmethod(reference.quick_gelu)
    linear_cross_entropy: Callable[..., Tensor] = staticmethod(reference.linear_cross_entropy)
    project_image_tokens: Callable[..., Tensor] = staticmethod(reference.project_image_tokens)

    def mlp(self, gated: bool = False) -> MLPSubmodules:
        """Two linear layers; `gated` puts SwiGLU between them, else the configuration's activation."""
        return MLPSubmodules(
            linear_fc1=self.column_linear, linear_fc2=self.row_linear, activation_func=self.swiglu if gated else None
        )

    def block(self, num_layers: int, *, causal: bool, gated: bool) -> TransformerBlockSubmodules:
        """Specs of this pipeline stage's `num_layers` layers and of the norm after the last."""
        attention = ModuleSpec(
            module=self.self_attention,
            params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
            submodules=SelfAttentionSubmodules(
                linear_qkv=self.column_linear, core_attention=self.core_attention, linear_proj=self.row_linear
            ),
        )
        layer = ModuleSpec(
            module=self.layer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=self.norm,
                self_attention=attention,
                pre_mlp_layernorm=self.norm,
                mlp=ModuleSpec(module=MLP, submodules=self.mlp(gated)),
            ),
        )
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=self.norm)


class TritonAttention(CoreAttention):
    attention = staticmethod(vlm_kernels.attention)


class TritonSelfAttention(SelfAttention):
    rotate_heads = staticmethod(vlm_kernels.rotate_heads)


class TritonSwiGLU(SwiGLU):
    swiglu = staticmethod(vlm_kernels.swiglu)


class TritonLayer(Layer):
    def add_and_norm(
        self, stream: Tensor, update: tuple[Tensor, Tensor | None] | None, norm: torch.nn.Module
    ) -> tuple[Tensor, Tensor]:
        """As Layer's, in one kernel where there are no biases."""
        x, bias = update or (None, None)
        assert isinstance(norm, Norm)
        if bias is not None or norm.bias is not None:
            return super().add_and_norm(stream, update, norm)
        return vlm_kernels.add_rms_norm(stream, x, norm.weight, norm.eps)


class TritonSpecs(TorchSpecs):
    """Our kernels. On the CPU they are their plain twins, so this backend then equals `torch`."""

    column_linear = bias_in_product(TorchSpecs.column_linear)
    row_linear = bias_in_product(TorchSpecs.row_linear)
    self_attention = TritonSelfAttention
    layer = TritonLayer
    swiglu = TritonSwiGLU
    quick_gelu = staticmethod(vlm_kernels.quick_gelu)
    core_attention = TritonAttention
    linear_cross_entropy = staticmethod(vlm_kernels.linear_cross_entropy)
    project_image_tokens = staticmethod(vlm_kernels.project_image_tokens)


def provider(backend: str) -> TorchSpecs:
    """The provider named by `kernels.backend`.

    Raises:
        ValueError: the backend does not exist.
        RuntimeError: Transformer Engine is not installed, or there is no GPU for it.
    """
    if backend == "torch":
        return TorchSpecs()
    if backend == "triton":
        return TritonSpecs()
    if backend != "transformer_engine":
        raise ValueError(f"kernels.backend: {backend!r} does not exist; set it to torch, triton or transformer_engine")
    if not torch.cuda.is_available():
        raise RuntimeError("kernels.backend: transformer_engine needs a GPU, and PyTorch sees none; set it to torch")
    try:
        from vlm.model.transformer_engine import TransformerEngineSpecs
    except ImportError as error:
        raise RuntimeError(
            f"kernels.backend: transformer_engine cannot be imported ({error}); pip install 'vlm[gpu]', or set it to "
            "triton or torch"
        ) from error
    return TransformerEngineSpecs()
