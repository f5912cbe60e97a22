"""A stage that trains in a second: a combined checkpoint of two layers, and batches by number instead of a data set."""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ranks
from data_fixtures import IMAGE_SIZE, NUM_IMAGE_TOKENS, write_config
from train_workspace import OPTIMIZER, PROJECTOR, write_language, write_vision

from vlm.batch import PackedBatch, Sample, pack

SETS = ("captions", "dialogues")
SEQUENCE_LENGTH, GLOBAL_BATCH, ITERATIONS = 192, 4, 20
SAVED = ITERATIONS // 2
SHAPES = [[(100, 1), (40, 0)], [(90, 1), (95, 1)], [(60, 0), (50, 0)]]
"""Tokens and pictures of the samples of a micro-batch; every third one has no picture."""
VALIDATION = 10_000
"""Number of the first validation batch; there is a global batch of them."""
IMAGE_TOKEN = 10


def batch(number: int) -> PackedBatch:
    """The micro-batch of a number: samples of random tokens, the last of them trained, a different share in each."""
    draw = np.random.default_rng(number)
    samples, pictures = [], []
    for length, images in SHAPES[number % len(SHAPES)]:
        tokens = draw.integers(11, 40, length)  # few of the vocabulary, so that there is something to learn
        slots = np.arange(3, 3 + NUM_IMAGE_TOKENS * images)
        tokens[slots] = IMAGE_TOKEN
        trained = np.arange(length) >= length - draw.integers(3, 20)
        samples.append(Sample(tokens, trained, slots))
        pictures += list(draw.integers(0, 256, (images, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8))
    keys = [f"{SETS[i % 2]}/{number}-{i}" for i in range(len(samples))]
    return pack(samples, pictures, keys, SEQUENCE_LENGTH, IMAGE_SIZE)


class Numbered(Iterator[PackedBatch]):
    """Stands for the loader: data-parallel rank r of n takes the numbers r, r + n, r + 2n, .. after `first`."""

    rejected: dict[str, str] = {}

    def __init__(self, first: int, rank: int, world: int, end: int | None = None) -> None:
        self._first = self._next = first + rank
        self._world, self._end = world, end

    def __iter__(self) -> Numbered:
        self._next = self._first
        return self

    def __next__(self) -> PackedBatch:
        if self._end is not None and self._next >= self._end:
            raise StopIteration
        number, self._next = self._next, self._next + self._world
        return batch(number)

    def state(self) -> bytes:
        return json.dumps(self._next).encode()

    def restore(self, state: bytes) -> None:
        self._next = json.loads(state)

    def close(self) -> None:
        pass


def make(folder: Path, **language: Any) -> Path:
    """The combined checkpoint, and of the data sets what `vlm train` looks at before it starts; returns the folder."""
    from vlm.convert import combine
    from vlm.convert.language import convert as convert_language
    from vlm.convert.vision import convert as convert_vision

    convert_language(write_language(folder / "hub/language", **language), folder / "language")
    convert_vision(write_vision(folder / "hub/vision"), folder / "vision")
    combine.combine(settings(folder / "config.yaml"), folder / "language", folder / "vision", folder / "combined")
    for name in SETS:
        (folder / "data" / name / ".nv-meta").mkdir(parents=True)
        (folder / "data" / name / "shard-000000.tar").write_bytes(b"-")
    return folder


def settings(path: Path, *, dtype: str = "float32", workers: int = 0, **parallel: Any) -> Path:
    """Settings with stages that learn from `combined` (`pretrain`, `sft`, `all`) and from `pretrain` (`sft_after`)."""
    shared = {
        "data": dict.fromkeys(SETS, 1.0),
        "prompt": "instruction",
        "sequence_length": SEQUENCE_LENGTH,
        "global_batch": GLOBAL_BATCH,
        "iterations": ITERATIONS,
        "save_interval": SAVED,
        "log_interval": 1,
        "validation_interval": SAVED,
        "optimizer": OPTIMIZER | {"lr": 3e-3, "min_lr": 3e-4},
    }
    stages = {
        "pretrain": shared | {"start_from": "combined", "trainable": ["projector"]},
        "sft": shared | {"start_from": "combined", "trainable": ["projector", "language"]},
        "all": shared | {"start_from": "combined", "trainable": ["vision", "projector", "language"]},
        "sft_after": shared | {"start_from": "pretrain", "trainable": ["projector", "language"]},
    }
    layout = {f"parallel__{key}": value for key, value in parallel.items()}
    return write_config(path, stages=stages, dtype=dtype, data__workers=workers, **PROJECTOR, **layout)


def train(
    config: Path, stage: str, start_from: Path, data: Path, out: Path, first: int, broken: int | None = None
) -> None:
    """Runs on every rank: a stage to its end, saying to `out/log` what it has to say.

    Args:
        first: number of the first batch, for a loader that starts anew in the middle.
        broken: number of a batch whose loss is not a number.
    """
    from vlm import config as configuration
    from vlm import loader, parallel
    from vlm.train import plan, trainer
    from vlm.train.step import NonFiniteError
    from vlm.train.stop import Stop

    def build(config: Any, *_: Any, rank: int, world: int, split: str) -> Numbered:
        if split == "val":
            return Numbered(VALIDATION, rank, world, end=VALIDATION + GLOBAL_BATCH)
        if rank == 0:
            with open(out / "seeds", "a") as stream:
                print(config.seed, file=stream)
        return Numbered(first, rank, world)

    loader.build = build
    _break(broken)
    with open(out / "log", "a", buffering=1) as sys.stderr:
        prepared = plan.prepare(configuration.load(config), stage, start_from, data, out)
        parallel.initialize(prepared.config.parallel, prepared.config.seed)
        try:
            with trainer.Trainer(prepared, Stop()) as run:
                run.train()
        except (ValueError, NonFiniteError) as error:
            print(f"refused: {error}", file=sys.stderr)
        except Exception:
            traceback.print_exc()
            raise


def _break(number: int | None) -> None:
    from vlm.model.language import LanguageModel
    from vlm.model.llava import Llava

    forward, losses = Llava.forward, LanguageModel.losses

    def watched(model: Any, packed: PackedBatch) -> Any:
        bad = packed.sample_keys[0].startswith(f"{SETS[0]}/{number}-")
        LanguageModel.losses = lambda *arguments: losses(*arguments) * (float("nan") if bad else 1.0)
        return forward(model, packed)

    if number is not None:
        Llava.forward = watched


def run(
    folder: Path,
    out: Path,
    stage: str = "sft",
    start_from: Path | None = None,
    first: int = 0,
    broken: int | None = None,
    **layout: Any,
) -> Path:
    """Train a stage of `folder` in processes of their own; returns `out`."""
    out.mkdir(parents=True, exist_ok=True)
    arguments = settings(out / "config.yaml", **layout), stage, start_from or folder / "combined", folder / "data", out
    ranks.launch(layout.get("ranks_per_node", 1), train, *arguments, first, broken, gpus=True)
    return out


def resume(folder: Path, finished: Path, out: Path, **options: Any) -> Path:
    """Go on from the middle of a finished run, beside which `out` has to lie: their parent's place is relative."""
    shutil.copytree(finished, out)
    shutil.rmtree(out / f"checkpoints/iteration_{ITERATIONS:07d}")
    (out / "checkpoints/latest").write_text(f"iteration_{SAVED:07d}\n")
    (out / "finished.json").unlink()
    for name in ("log", "seeds"):
        (out / name).unlink()
    return run(folder, out, **options)


def curve(out: Path) -> list[list[float]]:
    """Loss and gradient norm of every iteration, and the validation losses."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    validation = [[line["validation_loss"]] for line in lines if "validation_loss" in line]
    return [[line["loss"], line["gradient_norm"]] for line in lines if "loss" in line] + validation
