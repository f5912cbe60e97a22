"""Floating-point operations of a training step, so that a run can say what share of its device it uses.

Counted are the matrix products that the model asks for ("model FLOPs" of PaLM, arXiv:2204.02311, appendix B): one of
[m, k] x [k, n] takes 2mkn, and backward as much again for the gradient of the input and for that of the weight, each
where it is needed. Not counted: recomputation, padding, norms, activations, the embedding and the optimizer. Attention
counts the pairs of query and key that see each other, as in Megatron-LM (`num_floating_point_operations`, which halves
a causal square); PaLM counts the whole square. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from vlm.model.sizes import LanguageSizes, VisionSizes

_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bfloat16 operations per second on tensor cores, by words of the device's name, longer names first. From
NVIDIA's data sheets and white papers, halved where they state twice as much for sparse matrices. H100 and H200 alone
are the SXM modules."""


@dataclass(frozen=True)
class StepFlops:
    """What a training step costs, forward and backward, by what is in it. Made by `count`."""

    per_token: int
    """Linear layers of the language model, but those of the last layer that follow its attention."""
    per_pair: int
    """Attention of the language model, per pair of a query and a key that it sees."""
    per_image: int
    """Vision model and projector."""
    per_trained_token: int
    """What only trained tokens need: the last layer after its attention, and the head."""

    def __call__(self, *, tokens: int, pairs: int, images: int, trained_tokens: int) -> int:
        """The sum over a step. `pairs` is the sum of L (L + 1) / 2 over samples of L tokens."""
        return (
            self.per_token * tokens
            + self.per_pair * pairs
            + self.per_image * images
            + self.per_trained_token * trained_tokens
        )


def count(
    language: LanguageSizes,
    vision: VisionSizes,
    *,
    projector_size: int,
    feature_layer: int,
    trainable: Collection[str],
) -> StepFlops:
    """Count the operations of a step.

    Args:
        projector_size: width between the projector's two layers.
        feature_layer: hidden state of the vision model that is projected; blocks after it are not run.
        trainable: parts that learn (of vision, projector, language). A frozen part has no weight gradients, and input
            gradients only where something before it learns.
    """
    learns = {part: part in trainable for part in ("vision", "projector", "language")}
    up_to_projector = learns["vision"] or learns["projector"]

    def times(part: str, gradient: bool) -> int:
        """Forward, weight gradient where `part` learns, input gradient where `gradient`."""
        return 1 + learns[part] + gradient

    # Something learns, and the language model comes last: gradients flow through all of it, down to its embedding.
    through = times("language", True)
    head_channels = language.num_heads * language.head_dim
    before = language.hidden_size * (head_channels + 2 * language.num_kv_heads * language.head_dim)
    after = language.hidden_size * (head_channels + 3 * language.ffn_hidden_size)
    patches = vision.num_image_tokens
    encoder = _blocks(vision, feature_layer) * times("vision", learns["vision"])
    encoder += 2 * patches * 3 * vision.patch_size**2 * vision.hidden_size * times("vision", False)
    projector = 2 * patches * vision.hidden_size * projector_size * times("projector", learns["vision"])
    projector += 2 * patches * projector_size * language.hidden_size * times("projector", up_to_projector)
    return StepFlops(
        per_token=2 * (language.num_layers * before + (language.num_layers - 1) * after) * through,
        per_pair=2 * 2 * language.num_layers * head_channels * 3,  # attention's products: two inputs with gradients
        per_image=encoder + projector,
        per_trained_token=2 * (after + language.hidden_size * language.vocab_size) * through,
    )


def _blocks(sizes: VisionSizes, feature_layer: int) -> int:
    """Forward of the blocks for one picture; the class token is a token too, and all tokens see each other."""
    tokens, width = 1 + sizes.num_image_tokens, sizes.hidden_size
    linear = 2 * tokens * (4 * width**2 + 2 * width * sizes.ffn_hidden_size)
    return sizes.num_built_layers(feature_layer) * (linear + 2 * 2 * tokens**2 * width)


def peak(device_name: str, dtype: str) -> float | None:
    """Operations per second that a device can do at most, None where nobody says (a CPU, an unknown GPU, float32).

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        dtype: of the run.
    """
    if dtype != "bfloat16":
        return None
    return next((value for name, value in _PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)
