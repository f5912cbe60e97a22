"""The vision model: megatron-core's CLIPViTModel, built up to the layer whose features are projected."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from vlm.model.language import numbered
from vlm.model.sizes import VisionSizes
from vlm.model.specs import TorchSpecs


class VisionModel(CLIPViTModel):
    """Pixels [N, 3, H, W] to features [N, 1 + P, D], class token first, without CLIP's last norm.

    megatron-core returns the last block that was built, so feature layer -2 is a model of one block fewer
    (megatron-core's local ViT spec masks causally, vit_layer_specs.py:72; ours does not).
    """

    def __init__(self, sizes: VisionSizes, config: TransformerConfig, specs: TorchSpecs) -> None:
        super().__init__(
            config,
            specs.block(config.num_layers, causal=False, gated=False),
            ln_pre_impl=specs.norm,
            patch_dim=sizes.patch_size,
            img_h=sizes.image_size,
            img_w=sizes.image_size,
        )
        self.sizes = sizes
        self.conv1.to(config.params_dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> VisionModel:
        """Move the position ids too: megatron-core keeps them out of the buffers."""
        super()._apply(fn, recurse)
        self.position_ids: Tensor = torch.arange(self.seq_length, device=self.conv1.weight.device).unsqueeze(0)
        return self

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Layers by number, so that a model of fewer blocks reads the checkpoint of the whole one."""
        return super().sharded_state_dict(prefix, sharded_offsets, numbered(metadata))

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype
