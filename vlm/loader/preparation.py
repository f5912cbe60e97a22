"""What becomes of a sample on its way into a packed sequence, for training and validation alike.

Tokenising comes first and pictures are decoded last, so that buffers hold compressed pictures: 40 kB instead of 340.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm import images
from vlm.batch import PackedBatch, Sample, pack
from vlm.prompt import Prompter

TEXT = "json"
"""Part of a sample that holds its conversations; every other part is a picture."""


@dataclass(frozen=True)
class Preparation:
    """How a stage turns samples into tokens and pixels."""

    prompter: Prompter
    image_size: int
    """Edge of the vision model's pictures in pixels."""
    image_resize: images.Resize
    plain: bool
    """Reduce the first human turn to its picture."""
    sequence_length: int

    def tokenise(self, text: bytes, num_images: int, key: str) -> Sample:
        """Tokens of a sample whose pictures need not be read yet.

        Args:
            text: the sample's JSON.
            num_images: pictures of the sample.
            key: the sample's name, for messages.

        Raises:
            ValueError: the sample cannot be trained on, or is longer than a sequence.
        """
        if not text:
            raise ValueError(f"{key}: has no {TEXT} in its shard")
        try:
            conversations = json.loads(text)["conversations"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{key}: its json holds no conversations ({error})") from None
        sample = self.prompter.training(conversations, num_images, self.plain, key=key)
        if len(sample) > self.sequence_length:
            raise ValueError(f"{key}: {len(sample)} tokens do not fit into sequence_length = {self.sequence_length}")
        return sample

    def decode(self, pictures: Sequence[bytes], key: str) -> tuple[np.ndarray, ...]:
        """Pixels of a sample's pictures, uint8 [3, H, W] each.

        Raises:
            ValueError: a picture does not decode.
        """
        return tuple(
            images.resize(images.load(picture, name=key), self.image_size, self.image_resize) for picture in pictures
        )

    def pack(self, samples: Sequence[tuple[str, Sample, Sequence[np.ndarray]]]) -> PackedBatch:
        """One sequence of samples, each with its key and its pixels."""
        return pack(
            [sample for _, sample, _ in samples],
            [picture for _, _, pixels in samples for picture in pixels],
            [key for key, _, _ in samples],
            self.sequence_length,
            self.image_size,
        )
