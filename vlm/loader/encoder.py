"""What Energon does with a sample of ours: cook, tokenise, decode, pack. Captions and conversations are the same thing.

Runs in the loader's processes. A sample that cannot be used does not stop it: it is noted in the next packed sequence
that leaves the process, where the main process counts it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from megatron.energon import Cooker, SkipSample, TaskEncoder, basic_sample_keys, edataclass, stateless
from megatron.energon import Sample as EnergonSample

from vlm import images
from vlm.batch import PackedBatch, Sample, pack
from vlm.loader.packing import best_fit
from vlm.prompt import Prompter


@edataclass
class Crude(EnergonSample):
    """A sample as it lies in the shard: the shuffle buffer holds compressed pictures."""

    text: bytes
    images: tuple[bytes, ...]


@edataclass
class Encoded(EnergonSample):
    """A tokenised sample with its pixels: the packing buffer holds these."""

    sample: Sample
    images: tuple[np.ndarray, ...]


@dataclass
class Packed:
    """A packed sequence, and the samples rejected on the way to it since the one before: key -> reason."""

    batch: PackedBatch
    rejected: dict[str, str]
    __restore_key__: tuple[Any, ...] = ()

    def pin_memory(self) -> Packed:
        return Packed(self.batch.pin_memory(), self.rejected, self.__restore_key__)


@stateless
def cook(crude: dict[str, Any]) -> Crude:
    pictures = sorted(name for name in crude if not name.startswith("__") and name != "json")
    images = tuple(crude[name] for name in pictures)
    return Crude(**basic_sample_keys(crude), text=crude.get("json", b""), images=images)


@dataclass(eq=False)
class Encoder(TaskEncoder):
    """Energon's task encoder for one stage."""

    prompter: Prompter
    image_size: int
    """Edge of the vision model's pictures in pixels."""
    image_resize: images.Resize
    plain: bool
    """Reduce the first human turn to its picture."""
    sequence_length: int
    max_rejected: float
    """Rejected samples in a row at which a process gives up: were it to go on, it might never yield anything."""
    _rejected: dict[str, str] = field(default_factory=dict)
    _rejected_in_a_row: int = 0

    decoder = None
    cookers = (Cooker(cook),)

    @stateless
    def encode_sample(self, crude: Crude) -> Encoded:
        assert crude.__subflavors__ is not None
        key = f"{crude.__subflavors__['set']}/{crude.__key__}"
        try:
            encoded = self._encode(crude, key)
        except ValueError as error:
            self._reject(key, str(error))
            raise SkipSample from error
        self._rejected_in_a_row = 0
        return encoded

    def _encode(self, crude: Crude, key: str) -> Encoded:
        try:
            conversations = json.loads(crude.text)["conversations"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{key}: its json holds no conversations ({error})") from None
        sample = self.prompter.training(conversations, len(crude.images), self.plain, key=key)
        if len(sample) > self.sequence_length:
            raise ValueError(f"{key}: {len(sample)} tokens do not fit into sequence_length = {self.sequence_length}")
        pixels = tuple(
            images.resize(images.load(image, name=key), self.image_size, self.image_resize) for image in crude.images
        )
        return Encoded.derive_from(crude, __key__=key, sample=sample, images=pixels)

    def _reject(self, key: str, reason: str) -> None:
        self._rejected[key] = reason
        self._rejected_in_a_row += 1
        if self._rejected_in_a_row > self.max_rejected:
            raise TooManyRejected(f"{self._rejected_in_a_row} samples in a row cannot be used. The last: {reason}")

    def build_batch(self, dataset: Any, **options: Any) -> Any:
        packing = super().build_batch(dataset, **options)
        fill = packing._fill_reading_buffer
        # Every loader process would show a progress bar of its own while it fills its first buffer.
        packing._fill_reading_buffer = lambda source, log_progress=False: fill(source)
        return packing

    def select_samples_to_pack(self, samples: list[Encoded]) -> list[list[Encoded]]:
        packs = best_fit([len(sample.sample) for sample in samples], self.sequence_length)
        return [[samples[index] for index in indices] for indices in packs]

    @stateless
    def pack_selected_samples(self, samples: list[Encoded]) -> Packed:
        batch = pack(
            [sample.sample for sample in samples],
            [image for sample in samples for image in sample.images],
            [sample.__key__ for sample in samples],
            self.sequence_length,
            self.image_size,
        )
        rejected, self._rejected = self._rejected, {}
        return Packed(batch, rejected)


class TooManyRejected(RuntimeError):
    """Not a ValueError, which stands for one broken sample here; `Loader` turns it into one."""


def stop(error: Exception, sample: Any, sources: Any = None) -> None:
    """Energon's error handler. The default prints a traceback and goes on without the sample."""
    raise error
