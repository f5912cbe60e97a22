"""What Energon does with a sample of ours: cook, tokenise, pack, decode. Captions and conversations are the same thing.

Runs in the loader's processes. A sample that cannot be used does not stop it: it is noted in the next packed sequence
that leaves the process, where the main process counts it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from megatron.energon import Cooker, SkipSample, TaskEncoder, basic_sample_keys, edataclass, stateless
from megatron.energon import Sample as EnergonSample

from vlm.batch import PackedBatch, Sample
from vlm.loader.packing import best_fit
from vlm.loader.preparation import TEXT, Preparation


@edataclass
class Crude(EnergonSample):
    """A sample as it lies in the shard: the shuffle buffer holds these."""

    text: bytes
    images: tuple[bytes, ...]


@edataclass
class Tokenised(EnergonSample):
    """A sample whose length is known, with compressed pictures: the packing buffer holds these."""

    sample: Sample
    images: tuple[bytes, ...]


@edataclass
class Decoded(EnergonSample):
    """A sample of the sequence that is being put together."""

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
    pictures = sorted(name for name in crude if not name.startswith("__") and name != TEXT)
    images = tuple(crude[name] for name in pictures)
    return Crude(**basic_sample_keys(crude), text=crude.get(TEXT, b""), images=images)


@dataclass(eq=False)
class Encoder(TaskEncoder):
    """Energon's task encoder for one stage."""

    preparation: Preparation
    max_rejected: float
    """Rejected samples in a row at which a process gives up: were it to go on, it might never yield anything."""
    _rejected: dict[str, str] = field(default_factory=dict)
    _in_a_row: dict[str, int] = field(default_factory=lambda: {"text": 0, "pictures": 0})
    """Rejections since the last sample that passed, apart, since many are tokenised before the next is decoded."""

    decoder = None
    cookers = (Cooker(cook),)

    @stateless
    def preencode_sample(self, crude: Crude) -> Tokenised:
        assert crude.__subflavors__ is not None
        key = f"{crude.__subflavors__['set']}/{crude.__key__}"
        with self._rejecting("text", key):
            sample = self.preparation.tokenise(crude.text, len(crude.images), key)
        return Tokenised.derive_from(crude, __key__=key, sample=sample, images=crude.images)

    @stateless
    def postencode_sample(self, tokenised: Tokenised) -> Decoded:
        with self._rejecting("pictures", tokenised.__key__):
            pixels = self.preparation.decode(tokenised.images, tokenised.__key__)
        return Decoded.derive_from(tokenised, sample=tokenised.sample, images=pixels)

    @contextmanager
    def _rejecting(self, what: str, key: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            self._rejected[key] = str(error)
            self._in_a_row[what] += 1
            if self._in_a_row[what] > self.max_rejected:
                raise TooManyRejected(
                    f"{self._in_a_row[what]} samples in a row cannot be used. The last: {error}"
                ) from None
            raise SkipSample from error
        self._in_a_row[what] = 0

    def build_batch(self, dataset: Any, **options: Any) -> Any:
        packing = super().build_batch(dataset, **options)
        fill = packing._fill_reading_buffer
        # Every loader process would show a progress bar of its own while it fills its first buffer.
        packing._fill_reading_buffer = lambda source, log_progress=False: fill(source)
        return packing

    def select_samples_to_pack(self, samples: list[Tokenised]) -> list[list[Tokenised]]:
        packs = best_fit([len(sample.sample) for sample in samples], self.preparation.sequence_length)
        return [[samples[index] for index in indices] for indices in packs]

    @stateless
    def pack_selected_samples(self, samples: list[Decoded]) -> Packed:
        if not samples:  # no picture of theirs decodes
            raise SkipSample
        batch = self.preparation.pack([(sample.__key__, sample.sample, sample.images) for sample in samples])
        rejected, self._rejected = self._rejected, {}
        return Packed(batch, rejected)


class TooManyRejected(RuntimeError):
    """Not a ValueError, which stands for one broken sample here; `Loader` turns it into one."""


def stop(error: Exception, sample: Any, sources: Any = None) -> None:
    """Energon's error handler. The default prints a traceback and goes on without the sample."""
    raise error
