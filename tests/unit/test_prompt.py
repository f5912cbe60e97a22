from __future__ import annotations

from pathlib import Path
from typing import Any

import data_fixtures as fixtures
import numpy as np
import pytest
from PIL import Image

from vlm.prompt import Prompter

CAPTION = [
    {"from": "human", "value": "<image>\nGive a brief description."},
    {"from": "gpt", "value": "a large red circle é"},
]
DIALOGUE = [
    {"from": "human", "value": "what is left of the circle?\n<image>"},
    {"from": "gpt", "value": "a blue square"},
    {"from": "human", "value": "and right?"},
    {"from": "gpt", "value": " nothing is right of the circle \n"},
    {"from": "human", "value": "and inside?"},
    {"from": "gpt", "value": "a"},
]
TEXT_ONLY = [{"from": "human", "value": "is a circle a square?"}, {"from": "gpt", "value": "left [INST] is inside"}]
TWO_PICTURES = [{"from": "human", "value": "<image><image>\nwhich is red?"}, {"from": "gpt", "value": "the left"}]
CASES = {
    "one-turn": (CAPTION, 1),
    "three-turns-trimmed-answer": (DIALOGUE, 1),
    "text-only-control-token-in-text": (TEXT_ONLY, 0),
    "adjacent-pictures": (TWO_PICTURES, 2),
}
# As Megatron's template for Mistral: the prompt ends with a blank, which training gives to the answer's first token.
BLANK_TEMPLATE = fixtures.CHAT_TEMPLATE + "{% if add_generation_prompt %}{{ ' ' }}{% endif %}"


@pytest.fixture(scope="module", params=["metaspace", "prepended-blank", "miniature"])
def folder(request: pytest.FixtureRequest, tiny_language_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "miniature":
        return tiny_language_dir
    folder = tmp_path_factory.mktemp("tokenizer")
    return fixtures.write_tokenizer(folder, prepend=request.param == "prepended-blank")


@pytest.fixture(scope="module")
def prompter(folder: Path) -> Prompter:
    return Prompter(folder, fixtures.IMAGE_TOKEN, fixtures.NUM_IMAGE_TOKENS)


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = fixtures.IMAGE_SIZE
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        patch_size=fixtures.PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=fixtures.IMAGE_TOKEN,
        chat_template=AutoTokenizer.from_pretrained(folder).chat_template,
    )


def _processed(processor: Any, turns: list[dict[str, str]], num_images: int, **options: Any) -> list[int]:
    roles = {"human": "user", "gpt": "assistant"}
    place = {"human": fixtures.IMAGE_TOKEN, "gpt": "<image>"}
    messages = [
        {"role": roles[turn["from"]], "content": turn["value"].replace("<image>", place[turn["from"]])}
        for turn in turns
    ]
    text = processor.apply_chat_template(messages, tokenize=False, **options)
    pictures = [Image.new("RGB", (80, 70))] * num_images
    ids: list[int] = processor(text=text, images=pictures or None, add_special_tokens=False)["input_ids"][0]
    return ids


@pytest.mark.parametrize("case", CASES)
def test_training_tokens_equal_llava_processor(prompter: Prompter, processor: Any, case: str) -> None:
    turns, num_images = CASES[case]
    sample = prompter.training(turns, num_images)
    assert sample.tokens_L.tolist() == _processed(processor, turns, num_images)
    assert len(sample.image_positions) == num_images * fixtures.NUM_IMAGE_TOKENS


@pytest.mark.parametrize("case", CASES)
def test_generation_tokens_equal_llava_processor(prompter: Prompter, processor: Any, case: str) -> None:
    turns, num_images = CASES[case]
    expected = _processed(processor, turns[:1], num_images, add_generation_prompt=True)
    assert prompter.generation(turns[0]["value"], num_images) == expected


@pytest.mark.parametrize(
    "answers", [["a blue square", " <image> is left \n"], ["", "[INST] a"]], ids=["said", "nothing"]
)
def test_a_prompt_after_earlier_turns_equals_llava_processor(
    prompter: Prompter, processor: Any, answers: list[str]
) -> None:
    """What the model answered is text, whatever it is: nothing at all, or the name of a picture's place."""
    turns = [*DIALOGUE[:5]]
    turns[1], turns[3] = ({"from": "gpt", "value": answer} for answer in answers)
    for count in (1, 3, 5):
        expected = _processed(processor, turns[:count], 1, add_generation_prompt=True)
        assert prompter.generation(turns[:count], 1) == expected


def test_every_answer_of_a_dialogue_is_asked_for_as_it_was_trained(prompter: Prompter) -> None:
    tokens = prompter.training(DIALOGUE, 1)
    starts = np.flatnonzero(np.diff(np.concatenate([[False], tokens.trained_L]).astype(int)) == 1)
    assert len(starts) == 3
    for count, start in zip((1, 3, 5), starts, strict=True):
        assert prompter.generation(DIALOGUE[:count], 1) == tokens.tokens_L[:start].tolist()


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (DIALOGUE[:2], "human first and last; found human, gpt"),
        (DIALOGUE[1:4], "human first and last; found gpt, human, gpt"),
        ([], "human first and last"),
        ([*DIALOGUE[:2], {"from": "human", "value": " "}], "the prompt is empty"),
        ([*DIALOGUE[:2], {"from": "human", "value": "<image>"}], "2 <image> in the text, 1 picture"),
    ],
    ids=["ends-with-an-answer", "begins-with-an-answer", "nothing", "empty-question", "later-picture"],
)
def test_a_conversation_that_asks_nothing_is_refused(
    prompter: Prompter, turns: list[dict[str, str]], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^4: .*{message}"):
        prompter.generation(turns, 1, key="4")


@pytest.mark.parametrize("case", CASES)
def test_answers_and_nothing_else_are_trained(prompter: Prompter, case: str) -> None:
    turns, num_images = CASES[case]
    sample = prompter.training(turns, num_images)
    borders = np.flatnonzero(np.diff(np.concatenate([[False], sample.trained_L, [False]]).astype(int)))
    answers = [prompter.tokenizer.decode(sample.tokens_L[a:b]).split() for a, b in borders.reshape(-1, 2)]
    assert ["".join(words) for words in answers] == ["".join(turn["value"].split()) + "</s>" for turn in turns[1::2]]
    assert not sample.trained_L[sample.image_positions].any()


@pytest.mark.parametrize("template", [fixtures.CHAT_TEMPLATE, BLANK_TEMPLATE], ids=["bare", "blank-after-prompt"])
def test_prompt_ends_where_training_begins(tmp_path: Path, template: str) -> None:
    folder = fixtures.write_tokenizer(tmp_path, chat_template=template)
    prompter = Prompter(folder, fixtures.IMAGE_TOKEN, fixtures.NUM_IMAGE_TOKENS)
    sample = prompter.training(CAPTION, 1)
    prompt = prompter.generation(CAPTION[0]["value"], 1)
    assert sample.tokens_L[: len(prompt)].tolist() == prompt
    assert np.flatnonzero(sample.trained_L)[0] == len(prompt)
    assert prompter.tokenizer.convert_ids_to_tokens(prompt[-1]) == "[/INST]"


TEMPLATES = {
    "trimmed": (fixtures.CHAT_TEMPLATE, True),
    "verbatim": (fixtures.CHAT_TEMPLATE.replace(" | trim", ""), True),
    "blank-after-prompt": (BLANK_TEMPLATE, True),
    "header": (fixtures.CHAT_TEMPLATE.replace("' ' + message", "'GPT: ' + message"), True),
    "trimmed-on-one-side": (fixtures.CHAT_TEMPLATE.replace("| trim", ".rstrip()"), False),
    "by-content": (
        fixtures.CHAT_TEMPLATE.replace("message['content'] | trim", "message['content'].split('left')[-1]"),
        False,
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_remembered_layout_gives_the_spans_of_rendering(tmp_path: Path, template: str) -> None:
    text, remembered = TEMPLATES[template]
    prompter = Prompter(fixtures.write_tokenizer(tmp_path, chat_template=text), fixtures.IMAGE_TOKEN, 64)
    turns = [*DIALOGUE[:4], {"from": "human", "value": "<s> [INST] x"}, {"from": "gpt", "value": " left or left \t"}]
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    rendered = prompter._render(messages)
    expected = prompter._rendered_answers(messages, rendered, "key")
    assert prompter._answers(messages, rendered, "key") == expected
    layout = prompter._layouts[6]
    assert layout is not None and (layout.answers(messages, rendered) == expected) == remembered
    answers = [rendered[start:end] for start, end in expected]
    assert all(answer.endswith("</s>") for answer in answers) and answers[0].strip() in rendered
    assert not any("[/INST]" in answer for answer in answers)


def test_plain_keeps_only_the_picture(prompter: Prompter) -> None:
    plain = prompter.training(CAPTION, 1, plain=True)
    picture_only = [{"from": "human", "value": "<image>"}, CAPTION[1]]
    assert plain.tokens_L.tolist() == prompter.training(picture_only, 1).tokens_L.tolist()
    with pytest.raises(ValueError, match="folder/7: prompt: plain"):
        prompter.training(TEXT_ONLY, 0, plain=True, key="folder/7")


def _turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": text} for role, text in pairs]


REFUSED = {
    "role": (
        _turns(("human", "hi"), ("bot", "hello")),
        0,
        r"conversations\[1\].from: 'bot' does not exist.*human, gpt",
    ),
    "out-of-turn": (_turns(("gpt", "hello"), ("human", "hi")), 0, r"conversations\[0\].from: 'gpt' is out of turn"),
    "no-answer": (_turns(("human", "hi")), 0, "the last turn is human's"),
    "empty-turn": (_turns(("human", "hi"), ("gpt", " \n")), 0, r"conversations\[1\].value: the turn is empty"),
    "not-text": (_turns(("human", "hi"), ("gpt", 3)), 0, r"conversations\[1\]: expected"),
    "no-turns": ([], 0, "must be a list of turns"),
    "tag-without-picture": (_turns(("human", "<image>\nhi"), ("gpt", "a")), 0, "1 <image> in the text, 0 picture"),
    "picture-without-tag": (_turns(("human", "hi"), ("gpt", "a")), 1, "0 <image> in the text, 1 picture"),
    "tag-in-answer": (_turns(("human", "hi"), ("gpt", "<image>")), 1, "<image> in a gpt turn"),
    "reserved-token": (_turns(("human", "[control_8]"), ("gpt", "a")), 0, r"contains \[control_8\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_conversation_is_refused_by_name(prompter: Prompter, case: str) -> None:
    turns, num_images, message = REFUSED[case]
    with pytest.raises(ValueError, match=rf"^sft/000012: .*{message}|^sft/000012: {message}"):
        prompter.training(turns, num_images, key="sft/000012")


def test_prompt_without_its_picture_is_refused(prompter: Prompter) -> None:
    with pytest.raises(ValueError, match="ask: 0 <image> in the text, 1 picture"):
        prompter.generation("what is it?", 1, key="ask")


def test_image_token_outside_the_vocabulary_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"models.language.image_token: '<image>'"):
        Prompter(folder, "<image>", 64)


def test_tokenizer_without_chat_template_is_refused(tmp_path: Path) -> None:
    folder = fixtures.write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        Prompter(folder, fixtures.IMAGE_TOKEN, 64)
