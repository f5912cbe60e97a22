"""A tokenizer with Mistral's control tokens and chat template, and small source folders in LLaVA's layout."""

from __future__ import annotations

import json
import random
from pathlib import Path

IMAGE_TOKEN = "[control_8]"
IMAGE_SIZE, PATCH_SIZE = 64, 8
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
CONTROL_TOKENS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"] + [f"[control_{i}]" for i in range(3, 9)]
# The shape of Mistral-7B-Instruct-v0.3's own template, without its tools: the assistant's text is trimmed.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
WORDS = "a the red blue green large small circle square triangle is left right of above below inside and in"


def write_tokenizer(folder: Path, *, prepend: bool = False, chat_template: str = CHAT_TEMPLATE) -> Path:
    """Train a byte-fallback BPE of 400 entries.

    `prepend` normalises as Mistral v0.3's fast tokenizer does (a blank is prepended to the text after every control
    token), otherwise blanks are only replaced.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    draw = random.Random(0)
    texts = [" " + " ".join(draw.choices(WORDS.split(), k=12)) for _ in range(400)]
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=CONTROL_TOKENS + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator([text.replace(" ", "▁") if prepend else text for text in texts], trainer)
    # The bytes are entries of the vocabulary, not control tokens.
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] in CONTROL_TOKENS]
    folder.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tree)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder
