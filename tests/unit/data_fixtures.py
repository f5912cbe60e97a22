"""A tokenizer with Mistral's control tokens and chat template, and small source folders in LLaVA's layout."""

from __future__ import annotations

import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from vlm import config as settings

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


def write_vision(folder: Path) -> Path:
    """The one file of a vision model that the loader reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}))
    return folder


def write_source(
    folder: Path, num_samples: int, *, seed: int = 0, text_only_share: float = 0.0, max_words: int = 20
) -> list[dict[str, Any]]:
    """A source folder `{annotations.json, images/*.jpg}` of rendered noise with captions or dialogues.

    Every picture's first pixels hold its index, in blocks that survive JPEG, and its text begins with the same index
    in words, so that a test can tell whether the two still belong together.
    """
    draw = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(num_samples):
        turns: list[dict[str, str]] = []
        for _ in range(draw.choice([1, 1, 2, 3])):
            question, answer = (" ".join(draw.choices(WORDS.split(), k=draw.randint(3, max_words))) for _ in range(2))
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        turns[0]["value"] = f"{index}: {turns[0]['value']}"
        record: dict[str, Any] = {"id": f"{index:06d}", "conversations": turns}
        if draw.random() >= text_only_share:
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            record["image"] = f"{index // 100:05d}/{index:09d}.{'png' if index % 7 == 0 else 'jpg'}"
            write_picture(folder / "images" / record["image"], index)
        records.append(record)
    (folder / "annotations.json").write_text(json.dumps(records))
    return records


def write_loader_folder(root: Path, num_captions: int, num_dialogues: int) -> Path:
    """`data/{captions,dialogues}` sharded and indexed, `language` with a tokenizer, `vision` with its config."""
    from vlm.data.index import index
    from vlm.data.shard import shard

    config = write_config(root / "config.yaml")
    write_source(root / "captions", num_captions, seed=1)
    write_source(root / "dialogues", num_dialogues, seed=2, text_only_share=0.3)
    for name in SETS:
        shard(config, name, root / name, root / "data" / name)
        index(root / "data" / name)
    write_tokenizer(root / "language")
    write_vision(root / "vision")
    return root


def write_picture(path: Path, index: int) -> None:
    pixels = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for bit in range(16):
        pixels[:16, bit * 4 : bit * 4 + 4] = 255 * (index >> bit & 1)
    pixels[16:] = np.random.default_rng(index).integers(0, 256, (48, 1, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=90)


def picture_index(pixels: np.ndarray) -> int:
    """Reads back what `write_picture` drew, from uint8 [3, H, W]."""
    return sum(int(pixels[0, 8, bit * 4 + 2] > 127) << bit for bit in range(16))


def overwrite_pictures(directory: Path, number: int, *, start: int = 0, shard: str = "shard-000000.tar") -> list[str]:
    """Zeros over so many pictures inside a shard of a data set; the keys of their samples."""
    with tarfile.open(directory / shard) as tar:
        pictures = [member for member in tar if not member.name.endswith(".json")][start : start + number]
    with open(directory / shard, "r+b") as stream:
        for member in pictures:
            stream.seek(member.offset_data)
            stream.write(b"\0" * member.size)
    return [f"{directory.name}/{member.name[:9]}" for member in pictures]


def write_config(path: Path, **changes: Any) -> Path:
    """The miniature's settings with data sets `captions` and `dialogues`; changes as `data__workers=2`."""
    root = Path(__file__).resolve().parents[2]
    tree = yaml.safe_load((root / "config/config.yaml").read_text())
    _merge(tree, yaml.safe_load((root / "config/tiny.yaml").read_text()))
    sets = {name: {"source": name, "annotations": "annotations.json", "images": "images"} for name in SETS}
    tree["data"]["sets"] = {
        name: one | {"validation_share": 0.1, "samples_per_shard": 50} for name, one in sets.items()
    }
    tree["data"] |= {"shuffle_buffer": 16, "packing_buffer": 32, "workers": 0, "max_rejected_share": 0.05}
    stage = {"start_from": "combined", "data": {"captions": 1.0, "dialogues": 3.0}, "sequence_length": 512}
    tree["stages"] = {"pretrain": tree["stages"]["pretrain"] | stage}
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        branch = tree
        for parent in parents:
            branch = branch[parent]
        branch[leaf] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(settings.dump(settings.validate(tree)))
    return path


SETS = ("captions", "dialogues")


def _merge(tree: dict[str, Any], overlay: dict[str, Any]) -> None:
    for key, value in overlay.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value
