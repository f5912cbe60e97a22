"""One packed sequence, the unit that travels from the loader through the model to the loss.

Shapes: S tokens of the sequence, L tokens of one sample, n samples, N pictures, P image tokens per picture,
R trained positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Sample:
    """One tokenised conversation, each picture already expanded to its P image tokens."""

    tokens_L: np.ndarray
    """int64 [L]"""
    trained_L: np.ndarray
    """bool [L], True where the token is part of an answer."""
    image_positions: np.ndarray
    """int64 [N * P], positions of the image tokens in `tokens_L`."""

    def __len__(self) -> int:
        return len(self.tokens_L)


@dataclass(frozen=True)
class PackedBatch:
    """Samples laid one after the other in a sequence of fixed length: one micro-batch.

    Attention may not cross the borders in `cu_seqlens`. Padding at the end is a segment of its own, so that no sample
    attends to it and none of its rows attends to nothing.
    """

    tokens_S: torch.Tensor
    """int64 [S]. Image positions hold the image token's id, padding holds 0."""
    positions_S: torch.Tensor
    """int64 [S], restarting at 0 with every sample and with the padding."""
    cu_seqlens: torch.Tensor
    """int32 [n + 1], or [n + 2] with padding: borders of the segments, from 0 to S."""
    max_seqlen: int
    """Tokens of the longest segment."""
    images: torch.Tensor
    """uint8 [N, 3, H, W], RGB before normalisation; N may be 0."""
    image_positions: torch.Tensor
    """int64 [N * P], slots in S of the image tokens, in picture order."""
    trained_positions: torch.Tensor
    """int64 [R], slots whose next token is trained: of the same sample, and part of an answer."""
    labels_R: torch.Tensor
    """int64 [R], those next tokens, gathered where they can be checked without asking a GPU."""
    sample_keys: tuple[str, ...]
    """`<data set>/<sample>` of each sample, in order."""

    @property
    def num_tokens(self) -> int:
        """Tokens without the padding. Reads `cu_seqlens`, so ask before moving the batch to a GPU."""
        return int(self.cu_seqlens[len(self.sample_keys)])

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are tensors, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        moved = {name: value.to(device, non_blocking=non_blocking) for name, value in self.tensors.items()}
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, which a GPU copies from without waiting."""
        return dataclasses.replace(self, **{name: value.pin_memory() for name, value in self.tensors.items()})


def pack(
    samples: Sequence[Sample], images: Sequence[np.ndarray], keys: Sequence[str], sequence_length: int, image_size: int
) -> PackedBatch:
    """Lay samples one after the other in `sequence_length` tokens.

    Args:
        samples: n tokenised samples, at most `sequence_length` tokens together.
        images: N pictures, uint8 [3, image_size, image_size], in the order of the samples.
        keys: n names, for messages.
        sequence_length: S.
        image_size: height and width, needed where no sample has a picture.

    Raises:
        ValueError: the samples do not fit.
    """
    used = sum(map(len, samples))
    if used > sequence_length:
        raise ValueError(f"{', '.join(keys)}: {used} tokens do not fit into a sequence of {sequence_length}")
    tokens_S = np.zeros(sequence_length, np.int64)
    trained = []
    positions_S = np.empty(sequence_length, np.int64)
    borders = [0]
    image_positions = []
    for sample in samples:
        start, end = borders[-1], borders[-1] + len(sample)
        tokens_S[start:end] = sample.tokens_L
        # The first token of a sample is nobody's label: the slot before it belongs to another sample.
        trained.append(start + np.flatnonzero(sample.trained_L[1:]))
        positions_S[start:end] = np.arange(end - start)
        image_positions.append(sample.image_positions + start)
        borders.append(end)
    if used < sequence_length:
        positions_S[used:] = np.arange(sequence_length - used)
        borders.append(sequence_length)
    positions_R = np.concatenate(trained) if samples else np.zeros(0, np.int64)
    pictures = np.stack(images) if len(images) else np.zeros((0, 3, image_size, image_size), np.uint8)
    return PackedBatch(
        tokens_S=torch.from_numpy(tokens_S),
        positions_S=torch.from_numpy(positions_S),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        max_seqlen=int(np.diff(borders).max()),
        images=torch.from_numpy(pictures),
        image_positions=torch.from_numpy(np.concatenate(image_positions) if samples else np.zeros(0, np.int64)),
        trained_positions=torch.from_numpy(positions_R),
        labels_R=torch.from_numpy(tokens_S[positions_R + 1]),
        sample_keys=tuple(keys),
    )
