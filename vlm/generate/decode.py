"""Greedy decoding of prompts of different lengths together, with a key/value cache and, on a GPU, a captured step.

Shapes: B samples, T tokens of their prompts packed one after the other, G generated tokens, N pictures, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlm import parallel
from vlm.batch import PackedBatch, Sample, pack

if TYPE_CHECKING:
    from vlm.model import Llava

SLOTS_AT_ONCE = 128
"""A cache's size is a multiple of it, so that batches of like lengths share a captured step. The size follows from the
batch alone: with another, sums are split elsewhere, and an interrupted run would not go on to the bit."""
STEPS_UNSEEN = 8
"""Steps from one look whether all answers ended to the next, on a GPU, where a look waits for all that was launched."""
WARM_UP = 2
"""Steps before the capture, in which kernels are compiled and libraries take their memory."""


@dataclass(frozen=True)
class Prompt:
    tokens: list[int]
    """Ends where the answer begins; every picture is already expanded to its image tokens."""
    images: Sequence[np.ndarray]
    """uint8 [3, H, W] each, in the order of their places in `tokens`."""
    name: str = "prompt"
    """What to call it in a message."""


class Decoder:
    """The likeliest next token, again and again, of B prompts at once; equal to decoding them one by one.

    Args:
        model: in eval mode.
        image_token_id: token whose positions take the pictures' features.
        end: token that ends an answer; it is not part of the result.
        graph: capture a step in a CUDA graph, which replays with one call the 15 kernels of each layer that Python
            launches one by one otherwise. None: on a GPU, unless tensor parallel (megatron-core's embedding then looks
            at the tokens, which waits for the device).
    """

    def __init__(self, model: Llava, *, image_token_id: int, end: int, graph: bool | None = None) -> None:
        self.model = model
        self._image_token_id = image_token_id
        self._end = end
        if graph is None:
            graph = torch.cuda.is_available() and model.config.tensor_model_parallel_size == 1
        self._captures = graph
        self._steps: _Steps | None = None

    def __call__(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        """B lists of at most `max_new_tokens` tokens.

        Raises:
            ValueError: a prompt and its answer are longer than the model's positions.
        """
        steps = self.begin(prompts, max_new_tokens)
        chosen_GB = steps.tokens_B.new_full((max_new_tokens, len(prompts)), self._end)
        chosen_GB[0] = steps.tokens_B
        unseen = STEPS_UNSEEN if chosen_GB.is_cuda else 1
        for step in range(1, max_new_tokens):
            if step % unseen == 0 and bool((chosen_GB[:step] == self._end).any(dim=0).all()):
                break
            steps.advance()
            chosen_GB[step] = steps.tokens_B
        return [_until(answer, self._end) for answer in chosen_GB.t().tolist()]

    def begin(self, prompts: Sequence[Prompt], max_new_tokens: int) -> _Steps:
        """Read the prompts, after which `tokens_B` of the result holds the first token of each answer.

        Raises:
            ValueError: as calling it.
        """
        lengths = [len(prompt.tokens) for prompt in prompts]
        longest = max(lengths)
        limit = self.model.language_model.sizes.max_positions
        if longest + max_new_tokens > limit:
            raise ValueError(
                f"{prompts[lengths.index(longest)].name}: {longest} tokens and {max_new_tokens} new ones are more than "
                f"the model's {limit} positions; lower max_new_tokens or use fewer pictures"
            )
        num_slots = -(-(longest + max_new_tokens) // SLOTS_AT_ONCE) * SLOTS_AT_ONCE
        if self._steps is None or self._steps.shape != (len(prompts), num_slots):
            self._steps = None  # its memory is needed for the next
            self._steps = _Steps(self.model, len(prompts), num_slots, self._captures)
        self._steps.fill(self._packed(prompts).to(parallel.device()), lengths)
        return self._steps

    def _packed(self, prompts: Sequence[Prompt]) -> PackedBatch:
        samples = []
        for prompt in prompts:
            tokens_L = np.array(prompt.tokens, np.int64)
            places = np.flatnonzero(tokens_L == self._image_token_id)
            samples.append(Sample(tokens_L, np.zeros(len(tokens_L), bool), places))
        pictures = [picture for prompt in prompts for picture in prompt.images]
        names = [prompt.name for prompt in prompts]
        return pack(samples, pictures, names, sum(map(len, samples)), self.model.vision_model.img_h)


class _Steps:
    """What decoding a batch of one shape keeps on the device: the cache, the newest tokens, and the captured step.

    Args:
        num_samples: B.
        num_slots: most tokens of a sample, prompt and answer.
        capture: capture a step, which only a GPU can.
    """

    def __init__(self, model: Llava, num_samples: int, num_slots: int, capture: bool) -> None:
        self.shape = (num_samples, num_slots)
        self._model = model
        self._cache = model.language_model.cache(num_samples, num_slots)
        self.tokens_B = torch.zeros(num_samples, dtype=torch.int64, device=parallel.device())
        self._graph: torch.cuda.CUDAGraph | None = self._captured() if capture else None

    def fill(self, prompts: PackedBatch, lengths: Sequence[int]) -> None:
        """Forget the last batch and take this one, B samples of `lengths` tokens each."""
        self._choose(self._model.prefill(prompts, self._cache.prompts(lengths)))

    def advance(self) -> None:
        """Replace `tokens_B` by the tokens after them."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _step(self) -> None:
        self._choose(self._model.step(self.tokens_B, self._cache))

    def _choose(self, logits_BV: Tensor) -> None:
        self.tokens_B.copy_(logits_BV.argmax(dim=-1))

    def _captured(self) -> torch.cuda.CUDAGraph:
        """A graph of one step, made on an empty cache: replayed, it goes on from what is in the same memory then."""
        self._cache.prompts([0] * self.shape[0])
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads prepare the next batch
            self._step()
        return graph


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
