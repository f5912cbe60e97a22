"""Which samples share a sequence."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Greedy best-fit packing, longest sample first: each goes where it leaves the least room.

    At most 11/9 of the optimal number of sequences (Johnson, "Near-optimal bin packing algorithms", 1973).

    Args:
        lengths: tokens of each sample, none above `capacity`.
        capacity: tokens of a sequence.

    Returns:
        Indices into `lengths`, one list per sequence. Samples and sequences are in order of arrival, so that the
        first sequences of a buffer are not those of the longest samples.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, index into packs), ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        slot = bisect_left(room, (length, -1))
        if slot == len(room):
            packs.append([index])
            insort(room, (capacity - length, len(packs) - 1))
        else:
            left, pack = room.pop(slot)
            packs[pack].append(index)
            insort(room, (left - length, pack))
    return sorted(sorted(pack) for pack in packs)
