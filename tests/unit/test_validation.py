"""The validation loss of a toy model against a plain mean, and what is made of the losses."""

from __future__ import annotations

import random
from itertools import islice

import numpy
import pytest
import torch
from train_toy import batches, settings, toy

from vlm import parallel
from vlm.batch import PackedBatch, Sample, pack
from vlm.train import optimizer as optimizers
from vlm.train.feed import Feed
from vlm.train.stop import Stop
from vlm.train.validation import Progress, Validation
from vlm_kernels import reference


@pytest.fixture(autouse=True)
def groups():
    parallel.initialize(None, seed=1)
    yield
    parallel.destroy()


class Split:
    """Batches of the data sets `a` and `b` in turn, drawing from all generators as a loader might."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self):
        for index, batch in enumerate(islice(batches(seed=5), self.number)):
            random.random(), numpy.random.rand(), torch.rand(1)
            vars(batch)["sample_keys"] = (f"{'ab'[index % 2]}/{index}",)
            yield batch


def validation(model, number: int = 7, limit: int | None = None, sets: tuple[str, ...] = ("a", "b")) -> Validation:
    config = settings()
    wrapped = optimizers.wrap(model)
    optimizers.build(wrapped, config, config.stages["sft"])
    return Validation(
        wrapped,
        Split(number),
        num_micro_batches=3,
        max_sequences=limit,
        sequence_length=14,
        device=torch.device("cpu"),
        sets=sets,
    )


@pytest.mark.parametrize(("number", "limit"), [(7, None), (7, 4), (6, None), (7, 99)], ids=str)
def test_loss_is_the_token_mean_of_the_chosen_sequences(number, limit):
    model = toy()
    with torch.no_grad():
        losses = [model(batch).double() for batch in islice(Split(number), limit)]
    found = validation(model, number, limit)()
    assert found == {
        "validation_loss": pytest.approx(torch.cat(losses).mean().item()),
        "validation_loss/a": pytest.approx(torch.cat(losses[::2]).mean().item()),
        "validation_loss/b": pytest.approx(torch.cat(losses[1::2]).mean().item()),
    }
    assert len(set(found.values())) == 3


def test_the_training_does_not_notice():
    model = toy()
    measure = validation(model)
    model.train()
    seen = []
    forward = model.forward

    def watched(batch):
        torch.rand(1)  # as dropout would
        seen.append((model.training, torch.is_grad_enabled()))
        return forward(batch)

    model.forward = watched
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    weights = [parameter.clone() for parameter in model.parameters()]
    first = measure()
    assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert set(seen) == {(False, False)} and model.training
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert not model.trained.weight.main_grad.any()
    assert measure() == first, "the second pass saw other sequences"


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match=r"no token .* raise data\.sets\.a\.validation_share, data\.sets\.b\.valid"):
        validation(toy(), number=0)()


def test_feed_knows_the_data_set_of_every_trained_token():
    """With a sample that trains nothing, and padding."""
    trained = {"b/1": 2, "a/2": 0, "b/3": 4, "a/4": 1}
    samples = []
    for number in trained.values():
        mask = numpy.zeros(6, bool)
        mask[1 : 1 + number] = True
        samples.append(Sample(numpy.arange(1, 7), mask, numpy.zeros(0, numpy.int64)))
    batch = pack(samples, [], list(trained), 30, 8)
    empty = pack([], [], [], 30, 8)
    feed = Feed(iter([batch, empty]), torch.device("cpu"), ["a", "b"])
    assert isinstance(next(feed), PackedBatch)
    assert feed.sets_R is not None and feed.sets_R.tolist() == [1, 1, 1, 1, 1, 1, 0]
    next(feed)
    assert feed.sets_R.tolist() == []
    assert (feed.trained, feed.tokens, feed.pairs) == ([1, 6], 24, 4 * 21)


def test_what_the_kernels_check_is_not_read_from_the_device():
    """A meta tensor has no values to read."""
    sample = Sample(numpy.arange(1, 7), numpy.arange(6) > 3, numpy.array([1, 2]))
    batch = pack([sample], [numpy.zeros((3, 8, 8), numpy.uint8)], ["a/1"], 8, 8)
    moved = next(Feed(iter([batch]), torch.device("meta"), ["a"]))
    for name in ("cu_seqlens", "image_positions", "labels_R"):
        assert getattr(moved, name).is_meta
        assert reference.values_of(getattr(moved, name)) == getattr(batch, name).tolist()
    weight = torch.zeros(5, 4, device="meta")
    with pytest.raises(ValueError, match="target: received 6, the vocabulary has 5 entries"):
        reference.check_linear_cross_entropy(weight[:2], weight, moved.labels_R, None, -100)


def test_a_time_budget_leaves_room_for_a_validation():
    stop = Stop(budget_seconds=1e6)
    stop.stepped(1.0)
    assert not stop.code
    stop.validated(1e6)
    assert stop.code


def test_progress_counts_validations_since_the_lowest():
    progress, stale = Progress(), []
    for loss in (3.0, 2.0, 2.0, 2.5, 1.0, 1.5):
        progress.add(loss)
        stale.append(progress.stale)
    assert stale == [0, 0, 1, 2, 0, 1] and progress.lowest == 1.0
    assert progress.exhausted(1) and not progress.exhausted(2) and not progress.exhausted(None)


def test_the_best_is_the_lowest_of_the_saved_and_the_first_of_equals():
    progress = Progress()
    for iteration, loss in ((10, 2.0), (20, 2.0), (30, 2.5)):
        progress.saving(iteration, loss)
    assert (progress.best, progress.best_loss) == (10, 2.0)
    progress.saving(40, 1.9)
    assert progress.best == 40
