"""Every item of an evaluation task answered into JSON lines, going on where an interrupted run stopped.

Answers are appended to `<out>.partial` batch by batch; the finished file gets its name, and the order of the task,
at the end. Each line carries the hashes of the checkpoint and of the settings, so that answers are never mixed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vlm import config as configuration
from vlm import files
from vlm.generate.items import TASKS, Item, Turn

if TYPE_CHECKING:
    from vlm.generate.decode import Prompt
    from vlm.generate.speaker import Speaker

Record = dict[str, Any]
HASH_LENGTH = 16
IDENTITY = {"checkpoint": "another checkpoint", "settings": "other settings or data"}
"""Keys of a line that say what made it, and what it means when they differ."""


def generate(config: Path, checkpoint: Path, task: str, source: Path, out: Path) -> None:
    """Answer every item of a task.

    Args:
        config: resolved settings; `evaluation` has prompts, lengths and the batch size.
        checkpoint: Megatron checkpoint, folder of a stage, or exported folder.
        task: `captions`, `captions_shuffled` (the same prompts with the pictures shuffled), `dialogue`, `mmmu` or a
            short-answer benchmark of `vlm.benchmarks.BENCHMARKS` that the settings have a section for.
        source: folder of the evaluation data.
        out: JSON lines `{"id", "image", "prompt", "response", ...}` in the order of the task, which
            `vlm score` reads; for `dialogue` `{"id", "image", "conversation"}`, which `vlm report gallery` reads.

    Raises:
        ValueError: broken settings, data or checkpoint, or lines in `out` that are no answers.
    """
    if task not in TASKS:
        raise ValueError(f"--task: {task!r} does not exist, allowed are {', '.join(TASKS)}")
    settings = configuration.load(config)
    items = TASKS[task].read(settings, source)
    max_new_tokens = TASKS[task].settings(settings).max_new_tokens
    from vlm.generate import speaker  # megatron-core, after what can be refused without it

    speaker.check(settings, checkpoint)
    made_by = {
        "checkpoint": speaker.identity(checkpoint)[:HASH_LENGTH],
        "settings": _hash(items, max_new_tokens, settings.data.image_resize, settings.dtype),
    }
    done = take_up(out, made_by, {item.id for item in items})
    if len(done) < len(items):
        model = speaker.load(checkpoint, backend=settings.kernels.backend, dtype=settings.dtype)
        partial = partial_of(out)
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "a", encoding="utf-8") as stream:
            for record in _answer(model, items, done, settings.evaluation.batch_size, max_new_tokens, task):
                done[record["id"]] = record | made_by
                stream.write(json.dumps(done[record["id"]], ensure_ascii=False) + "\n")
                stream.flush()
    files.write_text(out, "".join(json.dumps(done[item.id], ensure_ascii=False) + "\n" for item in items))
    partial_of(out).unlink(missing_ok=True)


def partial_of(out: Path) -> Path:
    """Where the answers are until all are there."""
    return out.with_name(out.name + ".partial")


def take_up(out: Path, made_by: Record, ids: set[int | str]) -> dict[int | str, Record]:
    """Answers of an interrupted run by id; a line torn by the interruption is cut off its file.

    Also a cut `out` is gone on with: it becomes the partial file. Answers that another checkpoint, other settings or
    other data made are moved aside and nothing is taken up.

    Raises:
        ValueError: a line that is broken elsewhere, or that answers no item.
    """
    partial = partial_of(out)
    path = partial if partial.exists() else out
    if not path.exists():
        return {}
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    done: dict[int | str, Record] = {}
    for number, line in enumerate(whole.split(b"\n") if newline else [], start=1):
        try:
            record = json.loads(line)
            name = record["id"]
            there = {key: record[key] for key in IDENTITY}
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}: line {number} is not a generated answer; remove the file to start again"
            ) from None
        for key, meaning in IDENTITY.items():
            if there[key] != made_by[key]:
                aside = path.with_name(f"{path.name}.{there['checkpoint']}-{there['settings']}")
                path.rename(aside)
                print(f"{path}: answers made by {meaning} were moved to {aside}", file=sys.stderr)
                return {}
        if name not in ids or name in done:
            raise ValueError(
                f"{path}: line {number} answers {name!r}, which is {'twice there' if name in done else 'no item'}"
            )
        done[name] = record
    if torn:
        with open(path, "r+b") as stream:
            stream.truncate(len(whole) + len(newline))
    if path == out and len(done) < len(ids):
        out.rename(partial)
    return done


def _hash(items: Sequence[Item], *settings: Any) -> str:
    """Hash of everything beside the checkpoint that decides the answers. The batch size does not."""
    asked = [(item.id, item.prompt, *item.follow_ups, item.image, item.record) for item in items]
    return hashlib.sha256(json.dumps([asked, *settings]).encode()).hexdigest()[:HASH_LENGTH]


def _answer(
    model: Speaker,
    items: Sequence[Item],
    done: dict[int | str, Record],
    batch_size: int,
    max_new_tokens: int,
    task: str,
) -> Iterator[Record]:
    """Records of the items that are not done, part by part and longest prompts first, so that batches pad little.

    Batches are cut from all items alike, so that an interrupted run goes on with the batches of an undisturbed one.
    """
    lengths = [len(model.prompter.generation(item.prompt, len(item.pictures), key=str(item.id))) for item in items]
    order = sorted(range(len(items)), key=lambda index: (items[index].part, -lengths[index], index))
    batches = [
        [items[index] for index in order[start : start + batch_size]] for start in range(0, len(order), batch_size)
    ]
    batches = [batch for batch in batches if any(item.id not in done for item in batch)]

    def prepare(batch: list[Item]) -> list[Prompt]:
        return [model.prompt(item.prompt, item.opened(), str(item.id)) for item in batch]

    with ThreadPoolExecutor(1) as loader, tqdm(total=len(items), initial=len(done), desc=task, unit="item") as progress:
        ahead = loader.submit(prepare, batches[0])
        for number, batch in enumerate(batches):
            prompts = ahead.result()
            if number + 1 < len(batches):
                ahead = loader.submit(prepare, batches[number + 1])  # decoded while the model answers this one
            for item, conversation in zip(batch, _converse(model, batch, prompts, max_new_tokens), strict=True):
                if item.id not in done:
                    yield {"id": item.id, "image": item.image, **TASKS[task].said(conversation), **item.record}
                    progress.update()


def _converse(
    model: Speaker, batch: Sequence[Item], prompts: Sequence[Prompt], max_new_tokens: int
) -> list[list[Turn]]:
    """What is said about each item of a batch: one turn of all together, then the next with the answers before it.

    Args:
        prompts: those of the first turn.
    """
    said = [[_turn("human", item.prompt)] for item in batch]
    for turn in range(1 + len(batch[0].follow_ups)):
        if turn:
            for conversation, item in zip(said, batch, strict=True):
                conversation.append(_turn("human", item.follow_ups[turn - 1]))
            prompts = [
                model.prompt(conversation, item.opened(), str(item.id))
                for conversation, item in zip(said, batch, strict=True)
            ]
        for conversation, answer in zip(said, model.answer(prompts, max_new_tokens), strict=True):
            conversation.append(_turn("gpt", answer))
    return said


def _turn(role: str, text: str) -> Turn:
    return {"from": role, "value": text}
