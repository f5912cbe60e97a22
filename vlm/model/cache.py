"""Keys and values of the tokens so far, in memory of fixed place and size, as a captured CUDA graph needs it.

Token p of sample b has slot b * S + p. A sample's keys lie side by side, so that a decoding step reads memory from one
end to the other. Nothing is padded: each sample starts at its slot 0, and its range of keys says where it ends.

Shapes: L layers, B samples, S slots of each, T tokens of one pass, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm import parallel


@dataclass(frozen=True)
class Tokens:
    """The tokens of one pass through the layers, and what they see. Layers get it as their `inference_context`."""

    memory: Tensor
    """[2, L, B, S, G, K], all keys before all values."""
    slots_T: Tensor
    """int64, where each token's key and value are kept."""
    positions_T: Tensor
    """int64, each token's place in its sample."""
    key_ranges: Tensor | None
    """int32 [B, 2]: a token sees its sample's keys of this range. None: packed prompts, which see only themselves."""

    def keep(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the tokens' keys and values, of T rows [G, K] in the order of `slots_T`.

        Returns:
            What the tokens attend to: [S, B, G, K] of the cache, or for prompts the arguments.
        """
        kept = []
        for memory_BSGK, new in zip(self.memory[:, layer], (key, value), strict=True):
            memory_BSGK.flatten(0, 1).index_copy_(0, self.slots_T, new.flatten(0, 1))
            kept.append(memory_BSGK.transpose(0, 1))
        return (key, value) if self.key_ranges is None else (kept[0], kept[1])


class KeyValueCache:
    """Room for B samples of at most S tokens each; made by `LanguageModel.cache`.

    The state lies on the device and changes there, so that a graph of `next` and a pass can be replayed.
    """

    def __init__(
        self, num_layers: int, num_samples: int, num_slots: int, heads: tuple[int, int], dtype: torch.dtype
    ) -> None:
        # Zeros, because a slot that is not written yet has weight 0, and 0 times what empty memory may hold is NaN.
        self._memory = torch.zeros(2, num_layers, num_samples, num_slots, *heads, dtype=dtype, device=parallel.device())
        self._ranges_B2 = torch.tensor([[0, num_slots]] * num_samples, dtype=torch.int32, device=parallel.device())
        self._first_slots_B = torch.arange(num_samples, device=parallel.device()) * num_slots
        self._free = num_slots

    @property
    def device(self) -> torch.device:
        return self._memory.device

    @property
    def num_samples(self) -> int:
        return len(self._ranges_B2)

    @property
    def num_slots(self) -> int:
        """S, the most tokens of a sample."""
        return self._memory.shape[3]

    def prompts(self, lengths: Sequence[int]) -> Tokens:
        """Forget everything and take whole prompts, packed one after the other.

        Args:
            lengths: tokens of each of the B samples; with 0 it starts empty.

        Raises:
            ValueError: too many samples or tokens.
        """
        if len(lengths) != self.num_samples or max(lengths) > self.num_slots:
            raise ValueError(
                f"lengths: the cache holds {self.num_slots} tokens of each of {self.num_samples} samples, received "
                f"{len(lengths)} samples of up to {max(lengths, default=0)}"
            )
        self._free = self.num_slots - max(lengths)
        positions = [torch.arange(length) for length in lengths]
        slots = [position + b * self.num_slots for b, position in enumerate(positions)]
        self._ends_B.copy_(torch.tensor(lengths, dtype=torch.int32))
        return Tokens(self._memory, torch.cat(slots).to(self.device), torch.cat(positions).to(self.device), None)

    def next(self) -> Tokens:
        """Take one more token of every sample.

        Raises:
            ValueError: the cache is full. A replayed graph does not come by here: who replays counts for itself.
        """
        if not self._free:
            raise ValueError(f"the cache is full: a sample already has {self.num_slots} tokens")
        self._free -= 1
        positions_B = self._ends_B.long()
        self._ends_B.add_(1)
        return Tokens(self._memory, self._first_slots_B + positions_B, positions_B, self._ranges_B2)

    @property
    def _ends_B(self) -> Tensor:
        """Where the samples' keys end, to be changed in place without attention looking at the values again.

        A look waits for the device, so each step would, and no graph could be captured. The first look is enough: from
        there on the ranges start within the slots and grow one by one, and the steps are counted.
        """
        return self._ranges_B2.data[:, 1]
