"""The loader at the full recipe's settings: samples per second and core, where the time goes, how full the sequences
are, and how well it shuffles.

    python tests/benches/bench_loader.py [--samples 1500]

Pictures are drawn with the sizes and bytes of LLaVA-Pretrain's, texts with the lengths of its captions and of the
conversations of LLaVA-1.5's mix. They are tokenised by the miniature's tokenizer: Mistral's is not in the repository.
One process without loader processes, one thread; the rate counts its CPU seconds, so that other work on the machine
matters little. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from vlm import config as configuration
from vlm import images
from vlm.config import Config
from vlm.data.index import index
from vlm.data.shard import shard
from vlm.loader import Loader, build
from vlm.loader.packing import best_fit
from vlm.loader.preparation import Preparation
from vlm.prompt import Prompter

ROOT = Path(__file__).resolve().parents[2]
LANGUAGE = ROOT / "resources/tiny/language"
IMAGE_TOKENS = (336 // 14) ** 2
NUM_PICTURES = 300
WINDOW = 256
"""Samples of a step of pretraining: what is shown together."""
WORDS = (
    "a",
    "the",
    "red",
    "blue",
    "green",
    "large",
    "small",
    "circle",
    "square",
    "is",
    "left",
    "of",
    "above",
    "and",
    "in",
)


def settings(root: Path, **data: Any) -> tuple[Config, Path]:
    """The full recipe without loader processes; `root/config.yaml` holds it too."""
    tree = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    tree["data"] |= {"workers": 0} | data
    config = configuration.validate(tree)
    (root / "config.yaml").write_text(configuration.dump(config))
    return config, root / "config.yaml"


def picture(path: Path, draw: np.random.Generator) -> None:
    """Gradients under noise of several scales, as a photo: shortest edge 224 to 448, 20 to 60 kB."""
    short = int(draw.integers(224, 449))
    size = short, int(short * draw.uniform(1.0, 1.6))
    width, height = size if draw.random() < 0.3 else size[::-1]
    ramp = np.linspace(0, 1, width)[None, :, None] * draw.uniform(0, 90, 3)
    pixels = ramp + np.linspace(0, 1, height)[:, None, None] * draw.uniform(0, 90, 3) + draw.uniform(20, 80, 3)
    for scale, amplitude in ((64, 40), (16, 30), (4, 18), (1, 7)):
        grains = draw.normal(0, amplitude, (height // scale + 1, width // scale + 1, 3))
        grain = np.stack(
            [np.asarray(Image.fromarray(one.astype("f")).resize((width, height))) for one in grains.transpose(2, 0, 1)],
            2,
        )
        pixels = pixels + grain
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=87)


def caption(draw: random.Random) -> list[tuple[int, int]]:
    """Words of the question and the answer: 610 tokens with the picture's 576."""
    return [(12, max(6, min(100, round(draw.lognormvariate(math.log(15), 0.6)))))]


def conversation(draw: random.Random) -> list[tuple[int, int]]:
    """Words of the turns: a third short answers about a picture, the others several long turns."""
    if draw.random() < 0.35:
        return [(draw.randint(6, 20), draw.randint(1, 12)) for _ in range(draw.choice([1, 1, 2, 6]))]
    return [(draw.randint(6, 20), draw.randint(20, 120)) for _ in range(draw.randint(1, 7))]


def write(root: Path, name: str, words: Callable[[random.Random], list[tuple[int, int]]], number: int) -> None:
    """A source folder in LLaVA's layout."""
    draw = random.Random(name)
    annotations = {"pretrain": "blip_laion_cc_sbu_558k.json", "sft": "llava_v1_5_mix665k.json"}[name]
    records: list[dict[str, Any]] = []
    for index_ in range(number):
        turns = []
        for asked, answered in words(draw):
            for role, length in (("human", asked), ("gpt", answered)):
                turns.append({"from": role, "value": " ".join(draw.choices(WORDS, k=length))})
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        records.append({"id": str(index_), "image": f"{index_ % NUM_PICTURES}.jpg", "conversations": turns})
    (root / name).mkdir()
    (root / name / "images").symlink_to(root / "pictures")
    (root / name / annotations).write_text(json.dumps(records))


def opened(root: Path, stage: str, **data: Any) -> Loader:
    config, _ = settings(root, **data)
    dirs = {name: root / "data" / name for name in config.stages[stage].data}
    return build(config, stage, dirs, LANGUAGE, root / "vision")


def prepare(root: Path, number: int) -> None:
    """Both data sets, sharded and indexed, and the sizes of CLIP ViT-L/14 at 336 pixels."""
    (root / "pictures").mkdir()
    draw = np.random.default_rng(0)
    for index_ in range(NUM_PICTURES):
        picture(root / "pictures" / f"{index_}.jpg", draw)
    (root / "vision").mkdir()
    (root / "vision/config.json").write_text(json.dumps({"image_size": 336, "patch_size": 14}))
    _, config = settings(root)
    for name, words in (("pretrain", caption), ("sft", conversation)):
        write(root, name, words, number)
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            shard(config, name, root / name, root / "data" / name)
            index(root / "data" / name)


def samples(directory: Path, number: int) -> Iterator[tuple[bytes, bytes]]:
    """Text and picture of the first samples."""
    with tarfile.open(next(iter(sorted(directory.glob("shard-*.tar"))))) as tar:
        members = [tar.extractfile(member).read() for member in islice(tar, 2 * number)]  # type: ignore[union-attr]
    for one, other in zip(members[::2], members[1::2], strict=True):
        yield (one, other) if one.startswith(b"{") else (other, one)


def milliseconds(act: Callable[[Any], Any], items: list[Any]) -> tuple[float, list[Any]]:
    """CPU time of `act` per item, and what it made."""
    started = time.process_time()
    made = [act(item) for item in items]
    return 1000 * (time.process_time() - started) / len(items), made


def breakdown(root: Path, stage: str, number: int) -> dict[str, float]:
    """CPU milliseconds per sample of each thing that is done to it."""
    config, _ = settings(root)
    length, resize = config.stages[stage].sequence_length, config.data.image_resize
    prompter = Prompter(LANGUAGE, config.models.language.image_token, IMAGE_TOKENS)
    preparation = Preparation(prompter, 336, resize, False, length)
    raw = list(samples(root / "data" / stage, number))
    preparation.tokenise(raw[0][0], 1, "warm-up")
    texts, tokens = milliseconds(lambda one: preparation.tokenise(one[0], 1, "sample"), raw)
    decode, opened_ = milliseconds(lambda one: images.load(one[1]), raw)
    shrink, pixels = milliseconds(lambda one: images.resize(one, 336, resize), opened_)
    per_sequence = length // max(map(len, tokens))
    ready = [("sample", sample, (one,)) for sample, one in zip(tokens, pixels, strict=True)]
    groups = [ready[start : start + per_sequence] for start in range(0, len(ready) - per_sequence + 1, per_sequence)]
    packed, _ = milliseconds(preparation.pack, groups)
    return {"tokenise": texts, "decode": decode, "resize": shrink, "pack": packed / per_sequence}


def rate(root: Path, stage: str, number: int) -> tuple[float, Loader]:
    """CPU milliseconds per sample of the whole loader, once its buffer is full and its pictures are decoded at last."""
    loader = opened(root, stage, packing_buffer=min(1024, number // 3))
    next(loader)
    loader.num_samples = loader.num_sequences = loader.num_tokens = 0
    started = time.process_time()
    while loader.num_samples < number:
        next(loader)
    return 1000 * (time.process_time() - started) / loader.num_samples, loader


def efficiency(root: Path, stage: str, number: int) -> None:
    """Share of slots that hold tokens, by the size of the packing buffer, without reading any picture."""
    config, _ = settings(root)
    length = config.stages[stage].sequence_length
    prompter = Prompter(LANGUAGE, config.models.language.image_token, IMAGE_TOKENS)
    preparation = Preparation(prompter, 336, config.data.image_resize, False, length)
    lengths = [len(preparation.tokenise(text, 1, "sample")) for text, _ in samples(root / "data" / stage, number)]
    quantiles = " / ".join(f"{value:.0f}" for value in np.quantile(lengths, [0.05, 0.5, 0.95]))
    print(f"  tokens of a sample: mean {np.mean(lengths):.0f}; 5 / 50 / 95 %: {quantiles}")
    draw = random.Random(0)
    many = draw.choices(lengths, k=16 * 1024)
    for buffer in (64, 256, 1024, 4096):
        parts = [many[start : start + buffer] for start in range(0, len(many), buffer)]
        slots = sum(len(best_fit(part, length)) for part in parts) * length
        mark = "  <- config.yaml" if buffer == config.data.packing_buffer else ""
        print(f"  packing_buffer {buffer:5d}: {sum(many) / slots:.4f} of the slots hold tokens{mark}")


def shuffling(root: Path, number: int) -> None:
    """Orders of one epoch: how far neighbours are from each other, and how many neighbours of before stay together."""
    data = root / "data" / "pretrain"
    data.rename(root / "data" / "with-pictures")
    (root / "vision/config.json").write_text(json.dumps({"image_size": 336, "patch_size": 168}))
    records = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * number
    (root / "pretrain/blip_laion_cc_sbu_558k.json").write_text(json.dumps(records))
    _, path = settings(root)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        shard(path, "pretrain", root / "pretrain", data)
        index(data)
    places = {}
    for file in sorted(data.glob("shard-*.tar")):
        with tarfile.open(file) as tar:
            places |= {f"pretrain/{name[:9]}": len(places) + i for i, name in enumerate(tar.getnames())}
    total, chance = len(places), 2 * WINDOW / len(places)
    print(f"\nshuffling {total} samples; a permutation has distance 1.00 and {chance:.2%} of the neighbours together")
    print(f"  {'run':>5} {'buffer':>7} {'distance':>9} {'together':>9} {'of an epoch seen':>17}")
    ours = settings(root)[0].data
    for run, buffer in ((100, 100), (100, 1000), (100, 10000), (10, 1000), (ours.shuffle_run, ours.shuffle_buffer)):
        loader = opened(root, "pretrain", shuffle_run=run, shuffle_buffer=buffer, packing_buffer=1)
        order = np.array([places[batch.sample_keys[0]] for batch in islice(loader, total)])
        when = np.full(total, -WINDOW * 10)
        when[order] = np.arange(total)
        distance = np.abs(np.diff(order)).mean() / (total / 3)
        together = np.mean(np.abs(np.diff(when)) < WINDOW)
        mark = "  <- config.yaml" if (run, buffer) == (ours.shuffle_run, ours.shuffle_buffer) else ""
        print(f"  {run:5d} {buffer:7d} {distance:9.2f} {together:9.2%} {len(set(order)) / total:17.1%}{mark}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--samples", type=int, default=1500)
    arguments.add_argument("--shuffled", type=int, default=20000, help="samples of the shuffled set")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root, given.samples)
        sizes = [path.stat().st_size / 1000 for path in (root / "pictures").iterdir()]
        print(
            f"pictures of {min(sizes):.0f} to {max(sizes):.0f} kB, mean {np.mean(sizes):.0f}; the miniature's tokenizer"
        )
        for stage in ("pretrain", "sft"):
            whole, loader = rate(root, stage, given.samples // 2)
            parts = breakdown(root, stage, 200)
            parts["read, draw, hand on"] = whole - sum(parts.values())
            print(
                f"\n{stage}: {1000 / whole:.0f} samples/s per core, packing efficiency {loader.packing_efficiency:.3f}"
            )
            print("  " + ", ".join(f"{name} {value:.2f} ms" for name, value in parts.items()))
            efficiency(root, stage, 1000)
        shuffling(root, given.shuffled)


if __name__ == "__main__":
    main()
