"""The validation split of a stage: each sample once, in the same sequences however many ranks share them.

Every rank tokenises all texts and packs them alike, which takes a second for some thousand samples and needs no word
between the ranks; then it reads the pictures of its own sequences alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

from tqdm import tqdm

from vlm.batch import PackedBatch, Sample
from vlm.loader.blend import Entry
from vlm.loader.packing import best_fit
from vlm.loader.preparation import TEXT, Preparation
from vlm.loader.rejection import Rejection

_Sequence = list[tuple[Entry, Sample]]
_Packed = tuple[PackedBatch, dict[str, str]]


class Validation:
    """Packed sequences of this rank, the same ones in the same order each time it is iterated over.

    All ranks have as many: where the sequences do not divide by the ranks, the last ones get a sequence of nothing but
    padding, which trains nothing. A sample that cannot be used leaves its place empty.

    Args:
        preparation: how the stage turns samples into tokens and pixels.
        entries: validation samples of each data set.
        rejection: counts the samples that cannot be used.
        rank, world: this data-parallel rank and their number.
        threads: that decode pictures.
    """

    def __init__(
        self,
        preparation: Preparation,
        entries: Mapping[str, Sequence[Entry]],
        rejection: Rejection,
        rank: int,
        world: int,
        threads: int,
    ) -> None:
        self._preparation, self._entries, self._rejection = preparation, entries, rejection
        self._rank, self._world, self._threads = rank, world, threads

    @property
    def rejected(self) -> dict[str, str]:
        """Samples that could not be used so far, as `<data set>/<key>` -> reason."""
        return self._rejection.reasons

    def __len__(self) -> int:
        """Sequences of this rank, and of every other.

        Raises:
            ValueError: more than `data.max_rejected_share` of a data set's samples could not be used.
        """
        return len(self._plan)

    def __iter__(self) -> Iterator[PackedBatch]:
        """Raises ValueError as `len` does."""
        ahead: deque[Future[_Packed]] = deque()
        with ThreadPoolExecutor(self._threads) as pool:  # Pillow decodes without the interpreter's lock
            try:
                for sequence in self._plan:
                    ahead.append(pool.submit(self._batch, sequence))
                    if len(ahead) > self._threads:
                        yield self._checked(ahead.popleft())
                while ahead:
                    yield self._checked(ahead.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Nothing is open between two iterations."""

    @cached_property
    def _plan(self) -> list[_Sequence]:
        samples: _Sequence = []
        rejected: dict[str, str] = {}
        ordered = list(_mixed(self._entries))
        progress = tqdm(ordered, "read validation texts", unit="sample", delay=2.0, disable=self._rank > 0)
        for entry in progress:
            try:
                sample = self._preparation.tokenise(
                    entry.read(TEXT), len(entry.parts) - (TEXT in entry.parts), entry.key
                )
            except ValueError as error:
                rejected[entry.key] = str(error)
            else:
                samples.append((entry, sample))
        self._rejection.add(rejected)
        packs = best_fit([len(sample) for _, sample in samples], self._preparation.sequence_length)
        packs += [[]] * (-len(packs) % self._world)
        return [[samples[index] for index in pack] for pack in packs[self._rank :: self._world]]

    def _batch(self, sequence: _Sequence) -> _Packed:
        usable, rejected = [], {}
        for entry, sample in sequence:
            try:
                pictures = [entry.read(part) for part in entry.parts if part != TEXT]
                usable.append((entry.key, sample, self._preparation.decode(pictures, entry.key)))
            except ValueError as error:
                rejected[entry.key] = str(error)
        return self._preparation.pack(usable), rejected

    def _checked(self, future: Future[_Packed]) -> PackedBatch:
        batch, rejected = future.result()
        self._rejection.add(rejected)
        return batch


def _mixed(entries: Mapping[str, Sequence[Entry]]) -> Iterator[Entry]:
    """All samples, those of each data set spread evenly, so that the first sequences speak for all of them."""
    placed = [
        ((index + 0.5) / len(several), number, entry)
        for number, several in enumerate(entries.values())
        for index, entry in enumerate(several)
    ]
    return (entry for _, _, entry in sorted(placed, key=lambda item: item[:2]))
