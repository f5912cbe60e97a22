"""The recipe's hot paths as functions from tensors to tensors. Knows torch and triton only, never megatron or `vlm`."""

# The module `attention` must be imported before its function takes its name here.
from vlm_kernels.attention import attention
from vlm_kernels.cross_entropy import linear_cross_entropy, vocab_parallel_cross_entropy
from vlm_kernels.projector import project_image_tokens

__all__ = ["attention", "linear_cross_entropy", "project_image_tokens", "vocab_parallel_cross_entropy"]
