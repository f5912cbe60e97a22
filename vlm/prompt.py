"""The one place where a conversation becomes tokens, so that training and generation cannot disagree.

The text is the tokenizer's own chat template, tokenised once; an answer is found in it by character offsets. The result
equals `transformers`' `LlavaProcessor` with `apply_chat_template`. L: tokens of a sample, P: image tokens per picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from vlm.batch import Sample

IMAGE_TAG = "<image>"
"""Stands for a picture in the texts of LLaVA's data sets."""
ROLES = {"human": "user", "gpt": "assistant"}


def check(conversations: Any, num_images: int, key: str) -> None:
    """Refuse a conversation that cannot be trained on; needs no tokenizer.

    Args:
        conversations: turns `{"from": "human" | "gpt", "value": text}`, human first, alternating, gpt last.
        num_images: pictures of the sample, one `<image>` each, all in human turns.
        key: the sample's name, for messages.

    Raises:
        ValueError: what is wrong, and with which sample.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str) or not conversations:
        raise ValueError(f"{key}: conversations must be a list of turns, found {conversations!r:.80}")
    num_tags = 0
    for index, turn in enumerate(conversations):
        where = f"{key}: conversations[{index}]"
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise ValueError(f"{where}: expected {{'from': .., 'value': text}}, found {turn!r:.80}")
        role, text = turn.get("from"), turn["value"]
        if role not in ROLES:
            raise ValueError(f"{where}.from: {role!r} does not exist, allowed are {', '.join(ROLES)}")
        if role != ("human", "gpt")[index % 2]:
            raise ValueError(f"{where}.from: {role!r} is out of turn; human and gpt alternate, human first")
        if not text.strip():
            raise ValueError(f"{where}.value: the turn is empty")
        tags = text.count(IMAGE_TAG)
        if tags and role == "gpt":
            raise ValueError(f"{where}.value: {IMAGE_TAG} in a gpt turn")
        num_tags += tags
    if conversations[-1]["from"] != "gpt":
        raise ValueError(f"{key}: the last turn is human's, there is no answer to learn")
    check_images(num_tags, num_images, key)


def check_images(num_tags: int, num_images: int, key: str) -> None:
    """Raise ValueError unless a text has one `<image>` per picture."""
    if num_tags != num_images:
        reason = "a picture without its place in the text" if num_tags < num_images else "a place without a picture"
        raise ValueError(f"{key}: {num_tags} {IMAGE_TAG} in the text, {num_images} picture(s): {reason}")


class Prompter:
    """Turns conversations into token ids for one tokenizer.

    Args:
        tokenizer_dir: Hugging Face folder with a fast tokenizer and its chat template.
        image_token: token that stands for one image patch; one entry of the vocabulary.
        num_image_tokens: P, copies of it per picture.

    Raises:
        ValueError: the folder has no fast tokenizer or no chat template, or the token is not in its vocabulary.
    """

    def __init__(self, tokenizer_dir: str | Path, image_token: str, num_image_tokens: int) -> None:
        from transformers import AutoTokenizer  # 2 s

        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        if not self.tokenizer.is_fast:
            raise ValueError(f"{tokenizer_dir}: needs a fast tokenizer (tokenizer.json), found {type(self.tokenizer)}")
        if not self.tokenizer.chat_template:
            raise ValueError(f"{tokenizer_dir}: the tokenizer has no chat template")
        self.image_token = image_token
        self.num_image_tokens = num_image_tokens
        self._layouts: dict[int, _Layout | None] = {}
        self._backend = self.tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        ids = self._backend.encode(image_token, add_special_tokens=False).ids
        if self._backend.token_to_id(image_token) is None or len(ids) != 1:
            raise ValueError(
                f"models.language.image_token: {image_token!r} is not one token of the vocabulary in {tokenizer_dir}"
            )
        self.image_token_id: int = ids[0]

    def training(
        self,
        conversations: Sequence[Mapping[str, str]],
        num_images: int,
        plain: bool = False,
        *,
        key: str = "sample",
    ) -> Sample:
        """Tokens of a whole conversation, with the answers marked: their text with the blank before it, and `</s>`.

        Args:
            conversations: turns as `check` wants them.
            num_images: pictures of the sample.
            plain: reduce the first human turn to its pictures, as LLaVA does when it aligns the projector.
            key: the sample's name, for messages.

        Raises:
            ValueError: the conversation cannot be used; see `check`.
        """
        check(conversations, num_images, key)
        messages = self._messages(conversations, key)
        if plain:
            count = messages[0]["content"].count(self.image_token)
            if count == 0:
                raise ValueError(f"{key}: prompt: plain leaves nothing of a first turn without {IMAGE_TAG}")
            messages[0]["content"] = self.image_token * count
        text = self._render(messages)
        encoding = self._encode(text)
        starts_l = np.fromiter((offset[0] for offset in encoding.offsets), np.int64, len(encoding))
        trained_l = np.zeros(len(starts_l), bool)
        for start, end in self._answers(messages, text, key):
            trained_l |= (starts_l >= start) & (starts_l < end)
        ids_l = np.array(encoding.ids, np.int64)
        # Control tokens split the text before anything else looks at it, so one image token may stand for P copies
        # while the text is tokenised (three times faster, for 576 copies forty), and is repeated afterwards.
        copies_l = np.where(ids_l == self.image_token_id, self.num_image_tokens, 1)
        tokens_L = np.repeat(ids_l, copies_l)
        return Sample(
            tokens_L=tokens_L,
            trained_L=np.repeat(trained_l, copies_l),
            image_positions=np.flatnonzero(tokens_L == self.image_token_id),
        )

    def generation(
        self, asked: str | Sequence[Mapping[str, str]], num_images: int, *, key: str = "prompt"
    ) -> list[int]:
        """Token ids of a prompt that ends where the training sequence has the first trained token of its answer.

        Args:
            asked: the question, or the turns of a conversation that ends with it. One `<image>` per picture, in human
                turns; what a model answered is taken as it is, also where it said nothing.
            num_images: pictures of the prompt.
            key: the prompt's name, for messages.

        Raises:
            ValueError: the numbers of `<image>` and of pictures differ, a question is empty, or the turns do not
                alternate from a human's first to a human's last.
        """
        turns = [{"from": "human", "value": asked}] if isinstance(asked, str) else asked
        roles = [turn["from"] for turn in turns]
        if len(turns) % 2 == 0 or roles != [("human", "gpt")[index % 2] for index in range(len(turns))]:
            raise ValueError(f"{key}: human and gpt alternate, human first and last; found {', '.join(roles)}")
        questions = [turn["value"] for turn in turns[::2]]
        if not all(question.strip() for question in questions):
            raise ValueError(f"{key}: the prompt is empty")
        check_images(sum(question.count(IMAGE_TAG) for question in questions), num_images, key)
        messages = self._messages(turns, key)
        ids = self._encode(self._render(messages, prompt=True)).ids
        return [token for id_ in ids for token in (self.num_image_tokens if id_ == self.image_token_id else 1) * [id_]]

    def _messages(self, turns: Sequence[Mapping[str, str]], key: str) -> list[dict[str, str]]:
        """The turns as a chat template takes them. Only a human's `<image>` is a picture's place."""
        if any(self.image_token in turn["value"] for turn in turns):
            raise ValueError(f"{key}: the text contains {self.image_token}, which is reserved for image patches")
        tags = {"human": self.image_token, "gpt": IMAGE_TAG}
        return [
            {"role": ROLES[turn["from"]], "content": turn["value"].replace(IMAGE_TAG, tags[turn["from"]])}
            for turn in turns
        ]

    def _render(self, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        # Some templates end the prompt with the blank that belongs to the answer's first token; left there, the model
        # would have to go on from a lone blank that it has never seen (Megatron's Mistral template does this).
        return text.rstrip(" ") if prompt else text

    def _encode(self, text: str) -> Any:
        bos = self.tokenizer.bos_token
        return self._backend.encode(text, add_special_tokens=not (bos and text.startswith(bos)))

    def _answers(self, messages: list[dict[str, str]], text: str, key: str) -> list[tuple[int, int]]:
        """Character spans of the assistant's turns in the rendered text.

        Rendering every prefix takes longer than tokenising does. What the template puts between the turns is therefore
        remembered per number of turns, and used where laying the turns into it gives the very text that was rendered.
        """
        if len(messages) not in self._layouts:
            self._layouts[len(messages)] = self._layout(len(messages), key)
        layout = self._layouts[len(messages)]
        return (layout and layout.answers(messages, text)) or self._rendered_answers(messages, text, key)

    def _rendered_answers(self, messages: list[dict[str, str]], text: str, key: str) -> list[tuple[int, int]]:
        """What each of the assistant's turns adds to the text rendered up to its question."""
        spans = []
        for turn in range(0, len(messages), 2):
            before = self._render(messages[: turn + 1], prompt=True)
            after = text if turn + 2 == len(messages) else self._render(messages[: turn + 2])
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(f"{key}: the chat template renders turn {turn + 1} differently once more turns follow")
            spans.append((len(before), len(after)))
        return spans

    def _layout(self, num_turns: int, key: str) -> _Layout | None:
        """The template's own text around marks that stand for the turns, None where it does not simply lay them out."""
        marks = [f"\ue000{turn}\ue001" for turn in range(num_turns)]  # private use: in no template and no sane text
        roles = ("user", "assistant")
        messages = [{"role": roles[turn % 2], "content": f"\t{mark}\t"} for turn, mark in enumerate(marks)]
        text = self._render(messages)
        pieces, starts, trimmed, cursor = [], [], [], 0
        for mark in marks:
            at = text.find(mark, cursor)
            if at < 0:
                return None
            trimmed.append(text[at - 1] != "\t")
            edge = 0 if trimmed[-1] else 1
            pieces.append(text[cursor : at - edge])
            starts.append(cursor)
            cursor = at + len(mark) + edge
        pieces.append(text[cursor:])
        starts.append(cursor)
        spans = self._rendered_answers(messages, text, key)
        # A span begins in the piece before the assistant's turn and ends in the one after it.
        offsets = [(start - starts[2 * i + 1], end - starts[2 * i + 2]) for i, (start, end) in enumerate(spans)]
        return _Layout(pieces, trimmed, offsets)


@dataclass(frozen=True)
class _Layout:
    """What a chat template writes around a number of turns."""

    pieces: list[str]
    """Before the first turn, between the turns, after the last."""
    trimmed: list[bool]
    """Whether the blanks at the ends of a turn are taken off."""
    offsets: list[tuple[int, int]]
    """Where each answer begins in the piece before its turn, and ends in the piece after it."""

    def answers(self, messages: list[dict[str, str]], text: str) -> list[tuple[int, int]] | None:
        """Character spans of the answers, None if the template has written anything but this layout."""
        turns = [
            message["content"].strip() if trimmed else message["content"]
            for message, trimmed in zip(messages, self.trimmed, strict=True)
        ]
        parts = [part for pair in zip(self.pieces, [*turns, ""], strict=True) for part in pair]
        if "".join(parts) != text:
            return None
        ends = list(accumulate(map(len, parts), initial=0))
        return [(ends[4 * i + 2] + start, ends[4 * i + 4] + end) for i, (start, end) in enumerate(self.offsets)]
