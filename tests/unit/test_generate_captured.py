"""Batch after batch through one decoder: what a captured step or a cache keeps of one must not reach the next.

On a GPU this compares the replayed graph with the same steps launched one by one, and the decode kernel with PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator

import model_fixtures as fixtures
import pytest
import torch

from vlm import parallel
from vlm.generate.decode import SLOTS_AT_ONCE, Decoder, Prompt

GPU = torch.cuda.is_available()
NEW_TOKENS = 12  # more than the steps between two looks for the end
NO_END = -1


@pytest.fixture(autouse=True, scope="module")
def groups() -> Iterator[None]:
    fixtures.initialize()
    yield
    parallel.destroy()


@pytest.fixture(scope="module")
def batches() -> list[list[Prompt]]:
    """The same shape twice, then more slots, fewer samples, and the first shape again."""
    long = SLOTS_AT_ONCE
    shapes = [[(40, 1), (9, 0), (33, 2)], [(9, 0), (41, 2), (20, 1)], [(long - 9, 1), (5, 0), (long, 2)], [(30, 1)]]
    made = [fixtures.prompts(batch, seed) for seed, batch in enumerate(shapes)]
    return [*made, made[0]]


def decoder(backend: str, dtype: str = "float32", graph: bool | None = None, end: int = NO_END) -> Decoder:
    model = fixtures.for_kernels(backend, dtype).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # weights large enough that answers depend on the prompts
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.dim() > 1 else 0.05)
            parameter.add_(drawn.to(parameter))
    return Decoder(model, image_token_id=fixtures.IMAGE_TOKEN, end=end, graph=graph)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_batches_of_changing_shape_are_answered_as_prompts_alone(backend: str, batches: list[list[Prompt]]) -> None:
    alone, together = decoder("torch", graph=False), decoder(backend)
    wanted = [[alone([prompt], NEW_TOKENS)[0] for prompt in batch] for batch in batches]
    assert len({tuple(answer) for batch in wanted[:-1] for answer in batch}) == 10  # the prompts do matter
    assert [together(batch, NEW_TOKENS) for batch in batches] == wanted


def test_a_size_follows_from_the_batch_alone(batches: list[list[Prompt]]) -> None:
    """An interrupted run goes on with the batches that are left, and says the same to the bit."""
    made = decoder("torch")
    few, many = SLOTS_AT_ONCE, 2 * SLOTS_AT_ONCE
    assert [made.begin(batch, NEW_TOKENS).shape for batch in batches[1:3]] == [(3, few), (3, many)]
    kept = made.begin(batches[0], NEW_TOKENS)
    assert kept.shape == (3, few)
    assert made.begin(batches[1], NEW_TOKENS) is kept  # and what was captured serves the next


def test_an_end_is_seen_between_two_looks(batches: list[list[Prompt]]) -> None:
    whole = decoder("torch")(batches[3], NEW_TOKENS)[0]
    end = whole[2]
    answer = decoder("torch", end=end)(batches[3], NEW_TOKENS)[0]
    assert answer == whole[: whole.index(end)]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton", "transformer_engine"])
def test_a_replayed_step_equals_a_launched_one(backend: str, batches: list[list[Prompt]]) -> None:
    if backend == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    captured, launched = decoder(backend, "bfloat16"), decoder(backend, "bfloat16", graph=False)
    for batch in batches:
        assert captured(batch, NEW_TOKENS) == launched(batch, NEW_TOKENS)
        assert captured._steps is not None and captured._steps._graph is not None
        assert launched._steps is not None and launched._steps._graph is None
