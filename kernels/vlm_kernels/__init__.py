"""The recipe's hot paths as functions from tensors to tensors. Knows torch and triton only, never megatron or `vlm`."""

from vlm_kernels.reference import (
    attention,
    linear_cross_entropy,
    project_image_tokens,
    vocab_parallel_cross_entropy,
)

__all__ = ["attention", "linear_cross_entropy", "project_image_tokens", "vocab_parallel_cross_entropy"]
