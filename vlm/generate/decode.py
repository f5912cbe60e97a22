"""Greedy decoding of prompts of different lengths together, with a key/value cache.

Shapes: B batch, S prompt tokens with padding on the left, G generated tokens, K = S + G keys, N pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlm import parallel

if TYPE_CHECKING:
    from vlm.model import Llava

PAD = 0
"""Stands where a shorter prompt has no token; hidden from attention, so that any id would do."""


@dataclass(frozen=True)
class Prompt:
    tokens: list[int]
    """Ends where the answer begins; every picture is already expanded to its image tokens."""
    images: Sequence[np.ndarray]
    """uint8 [3, H, W] each, in the order of their places in `tokens`."""
    name: str = "prompt"
    """What to call it in a message."""


def greedy(
    model: Llava, prompts: Sequence[Prompt], *, image_token_id: int, end: int, max_new_tokens: int
) -> list[list[int]]:
    """The likeliest next token, again and again, of B prompts at once; equal to decoding them one by one.

    Args:
        model: in eval mode.
        prompts: B of them, of any lengths.
        image_token_id: token whose positions take the pictures' features.
        end: token that ends an answer; it is not part of the result.
        max_new_tokens: longest answer.

    Returns:
        B lists of at most `max_new_tokens` tokens.

    Raises:
        ValueError: a prompt and its answer are longer than the model's positions.
    """
    from megatron.core.inference.contexts import StaticInferenceContext

    lengths = [len(prompt.tokens) for prompt in prompts]
    longest = max(lengths)
    limit = model.language_model.sizes.max_positions
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"{prompts[lengths.index(longest)].name}: {longest} tokens and {max_new_tokens} new ones are more than the "
            f"model's {limit} positions; lower max_new_tokens or use fewer pictures"
        )
    device = parallel.device()
    tokens_BS = torch.full((len(prompts), longest), PAD, dtype=torch.int64)
    mask_BK = torch.ones(len(prompts), longest + max_new_tokens, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, longest - len(prompt.tokens) :] = torch.tensor(prompt.tokens, dtype=torch.int64)
        mask_BK[row, : longest - len(prompt.tokens)] = False
    positions_BS = (mask_BK[:, :longest].cumsum(dim=1) - 1).clamp_(min=0)
    # Padded rows cannot hold image tokens, so the flat slots come out in the order of the pictures.
    slots = ((tokens_BS == image_token_id) & mask_BK[:, :longest]).flatten().nonzero().squeeze(1)
    pictures = [picture for prompt in prompts for picture in prompt.images]
    padded = min(lengths) < longest  # without padding, attention needs no mask
    tokens_BS, mask_BK, positions_BS = tokens_BS.to(device), mask_BK.to(device), positions_BS.to(device)
    images_N = torch.from_numpy(np.stack(pictures)).to(device) if pictures else None
    cache = StaticInferenceContext(len(prompts), longest + max_new_tokens)

    chosen_GB = []
    finished_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        logits_BV = model.logits(
            tokens_BS,
            positions_BS,
            key_mask_BK=mask_BK[:, : longest + step] if padded else None,
            images=images_N,
            image_positions=slots.to(device),
            inference_context=cache,
        )
        next_B = logits_BV.argmax(dim=-1)
        chosen_GB.append(next_B)
        finished_B |= next_B == end
        if bool(finished_B.all()):
            break
        tokens_BS, positions_BS, images_N = next_B.unsqueeze(1), positions_BS[:, -1:] + 1, None
    return [_until(answer, end) for answer in torch.stack(chosen_GB, dim=1).tolist()]


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
