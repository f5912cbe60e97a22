"""The recipe's hot paths as functions from tensors to tensors. Knows torch and triton only, never megatron or `vlm`."""

# The modules `attention`, `quick_gelu` and `swiglu` must be imported before their functions take their names here.
from vlm_kernels.attention import attention
from vlm_kernels.cross_entropy import linear_cross_entropy, vocab_parallel_cross_entropy
from vlm_kernels.norm import add_rms_norm
from vlm_kernels.projector import project_image_tokens
from vlm_kernels.quick_gelu import quick_gelu
from vlm_kernels.reference import known_on_host
from vlm_kernels.rotary import rotate_heads
from vlm_kernels.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "attention",
    "known_on_host",
    "linear_cross_entropy",
    "project_image_tokens",
    "quick_gelu",
    "rotate_heads",
    "swiglu",
    "vocab_parallel_cross_entropy",
]
