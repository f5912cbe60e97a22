from __future__ import annotations

import random

import pytest

from vlm.loader.packing import best_fit


def _fill(packs: list[list[int]], lengths: list[int], capacity: int) -> float:
    return sum(lengths) / (len(packs) * capacity)


@pytest.mark.parametrize("capacity", [7, 100, 1024])
def test_every_sample_is_packed_once_and_fits(capacity: int) -> None:
    draw = random.Random(capacity)
    lengths = [draw.randint(1, capacity) for _ in range(300)]
    packs = best_fit(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(300))
    assert all(0 < sum(lengths[index] for index in pack) <= capacity for pack in packs)


def test_a_sample_goes_where_it_leaves_the_least_room() -> None:
    # 7 and 5 open two sequences; 3 would fit beside either.
    assert best_fit([5, 7, 3], 10) == [[0], [1, 2]]


def test_sequences_come_in_order_of_arrival_not_of_length() -> None:
    assert best_fit([5, 9, 5, 8], 10) == [[0, 2], [1], [3]]


def test_mixed_lengths_fill_the_sequences() -> None:
    draw = random.Random(0)
    lengths = [draw.choice([30, 60, 90, 120, 300]) for _ in range(256)]
    assert _fill(best_fit(lengths, 1024), lengths, 1024) > 0.97


def test_a_full_sequence_and_no_sample() -> None:
    assert best_fit([10, 10], 10) == [[0], [1]]
    assert best_fit([], 10) == []


def test_lengths_that_are_nearly_alike_fill_the_sequences() -> None:
    """Sixteen captions fit, sixteen of the longest do not."""
    draw = random.Random(0)
    lengths = [draw.randint(590, 640) for _ in range(256)]
    assert len(best_fit(lengths, 9984)) == 16


def test_the_longest_first_where_that_needs_fewer_sequences() -> None:
    assert best_fit([3, 3, 3, 7, 7, 7], 10) == [[0, 3], [1, 4], [2, 5]]
