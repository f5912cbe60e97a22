"""Batched, padded, cached greedy decoding gives the tokens that transformers gives for each prompt alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import model_fixtures as fixtures
import numpy as np
import pytest
import torch

from vlm import parallel
from vlm.generate.decode import Decoder, Prompt

SHAPES = [(17, 1), (5, 0), (30, 2), (17, 0), (15, 1)]
NEW_TOKENS = 8
NO_END = -1


@pytest.fixture(autouse=True, scope="module")
def groups() -> Iterator[None]:
    fixtures.initialize()
    yield
    parallel.destroy()


@pytest.fixture(scope="module")
def reference() -> Any:
    return fixtures.huggingface()


@pytest.fixture(scope="module")
def model(reference: Any) -> Any:
    return fixtures.ours(reference).eval()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return fixtures.prompts(SHAPES, seed=4)


def decode(model: Any, prompts: list[Prompt], end: int = NO_END, new: int = NEW_TOKENS) -> list[list[int]]:
    return Decoder(model, image_token_id=fixtures.IMAGE_TOKEN, end=end)(prompts, new)


@pytest.fixture(scope="module")
def expected(reference: Any, prompts: list[Prompt]) -> list[list[int]]:
    """Each prompt alone through transformers' `generate`."""
    from vlm import images as pictures
    from vlm.model.sizes import CLIP_MEAN, CLIP_STD

    answers = []
    for prompt in prompts:
        inputs: dict[str, Any] = {"input_ids": torch.tensor([prompt.tokens])}
        if prompt.images:
            stack = torch.from_numpy(np.stack(prompt.images))
            inputs["pixel_values"] = pictures.normalise(stack, CLIP_MEAN, CLIP_STD, torch.float32)
        reference.generation_config.eos_token_id = None
        out = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        answers.append(out[0, len(prompt.tokens) :].tolist())
    return answers


def test_mixed_lengths_and_pictures_equal_transformers(
    model: Any, prompts: list[Prompt], expected: list[list[int]]
) -> None:
    assert len({tuple(answer) for answer in expected}) == len(prompts)  # the prompts do matter
    assert decode(model, prompts) == expected
    assert [decode(model, [prompt])[0] for prompt in prompts] == expected
    assert decode(model, prompts[::-1]) == expected[::-1]


def test_pictures_reach_their_own_prompt(model: Any, prompts: list[Prompt], expected: list[list[int]]) -> None:
    first, *others = prompts
    blank = Prompt(first.tokens, [np.zeros_like(first.images[0])], "blank")
    answers = decode(model, [blank, *others])
    assert answers[0] != expected[0]
    assert answers[1:] == expected[1:]


def test_the_end_token_ends_one_answer_and_not_the_others(
    model: Any, prompts: list[Prompt], expected: list[list[int]]
) -> None:
    end = expected[0][3]
    assert decode(model, prompts, end) == [a[: a.index(end)] if end in a else a for a in expected]
    assert decode(model, prompts[:1], end) == [expected[0][: expected[0].index(end)]]
    assert decode(model, prompts, new=2) == [answer[:2] for answer in expected]


def test_a_prompt_beyond_the_models_positions_is_refused_by_name(model: Any, prompts: list[Prompt]) -> None:
    with pytest.raises(ValueError, match="prompt-2: 30 tokens and 227 new ones are more than the model's 256"):
        decode(model, prompts, new=227)
