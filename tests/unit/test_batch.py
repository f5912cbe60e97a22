from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm.batch import PackedBatch, Sample, pack

IMAGE = 10


def _sample(tokens: list[int], answers: list[int]) -> Sample:
    tokens_L = np.array(tokens)
    trained_L = np.zeros(len(tokens), bool)
    trained_L[answers] = True
    return Sample(tokens_L, trained_L, np.flatnonzero(tokens_L == IMAGE))


FIRST = _sample([1, 3, IMAGE, IMAGE, 20, 4, 30, 2], [6, 7])
SECOND = _sample([1, 3, 21, 4, 31, 32, 2, 3, 22, 4, 33, 2], [4, 5, 6, 10, 11])
PICTURE = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)


def _packed(length: int) -> PackedBatch:
    return pack([FIRST, SECOND], [PICTURE], ["a/1", "b/2"], length, 2)


def test_labels_are_the_next_tokens_of_the_same_sample() -> None:
    batch = _packed(24)
    assert batch.tokens_S.tolist() == [*FIRST.tokens_L, *SECOND.tokens_L, 0, 0, 0, 0]
    assert batch.trained_positions.tolist() == [5, 6, 11, 12, 13, 17, 18]
    assert batch.labels_R.tolist() == [30, 2, 31, 32, 2, 33, 2]
    assert torch.equal(batch.tokens_S[batch.trained_positions + 1], batch.labels_R)


def test_a_trained_first_token_is_not_the_label_of_the_sample_before() -> None:
    trained = _sample([5, 6], [0, 1])
    batch = pack([trained, trained], [], ["a/1", "a/2"], 4, 2)
    assert batch.trained_positions.tolist() == [0, 2] and batch.labels_R.tolist() == [6, 6]


def test_padding_is_a_segment_of_its_own() -> None:
    batch = _packed(24)
    assert batch.cu_seqlens.tolist() == [0, 8, 20, 24]
    assert batch.positions_S.tolist() == [*range(8), *range(12), *range(4)]
    assert (batch.max_seqlen, batch.num_tokens) == (12, 20)
    full = _packed(20)
    assert full.cu_seqlens.tolist() == [0, 8, 20]
    assert full.num_tokens == 20
    assert _packed(60).max_seqlen == 40


def test_pictures_keep_their_slots_in_order() -> None:
    batch = pack([SECOND, FIRST, FIRST], [PICTURE, PICTURE + 1], ["b/2", "a/1", "a/1"], 30, 2)
    assert batch.image_positions.tolist() == [14, 15, 22, 23]
    assert (batch.tokens_S[batch.image_positions] == IMAGE).all()
    assert batch.images.tolist() == [PICTURE.tolist(), (PICTURE + 1).tolist()]


def test_no_picture_gives_an_empty_batch_of_pictures() -> None:
    batch = pack([SECOND], [], ["b/2"], 12, 2)
    assert batch.images.shape == (0, 3, 2, 2) and batch.images.dtype == torch.uint8
    assert batch.image_positions.shape == (0,) and batch.image_positions.dtype == torch.int64


def test_samples_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="a/1, b/2: 20 tokens do not fit into a sequence of 19"):
        _packed(19)


def test_moving_keeps_every_field() -> None:
    batch = _packed(24)
    moved = batch.to("cpu")
    assert moved.sample_keys == batch.sample_keys and moved.max_seqlen == batch.max_seqlen
    assert batch.to("meta").images.device.type == "meta"
