"""The miniature's data sets: rendered scenes in the exact layouts of the real sets, so that every step runs unchanged.

LLaVA-Pretrain, LLaVA-Instruct-150K, COCO captions and MMMU are written under one folder, each named as the last part of
its source. What a world holds out is in no picture and no text of the training sets; half of the test pictures show it.
Same settings, same bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vlm import config as configuration
from vlm import files
from vlm.config import Config, Miniature
from vlm.tiny import text, world
from vlm.tiny.scenes import Scene
from vlm.tiny.world import World

IMAGE_TAG = "<image>"
IMAGE_LAST_SHARE = 0.1
"""Share of the captioning turns with the picture after the instruction."""
TEXT_ONLY_SHARE = 0.05
COMPARISON_SHARE = 0.15
"""Shares of the instruction conversations without a picture, and with two."""
MAX_TURNS = 5
MMMU_IMAGES = 7
"""Picture columns of MMMU's tables."""
DIFFICULTY = {1: "Easy", 2: "Medium", 3: "Hard"}
"""By the number of things in the fullest picture."""
BATCH = 250
"""Pictures rendered together: of shapes 15 MB of floating-point values, of emoji 85 MB and as much for each layer."""

PATIENCE = 200
"""After so many scenes in vain those with (or without) what is held out are taken to have no answer left to give."""

Record = dict[str, Any]
AnyScene = Scene[Any]


def write(config: Path, out: Path) -> None:
    """Render all data sets. Each folder appears when it is complete, and replaces an older one.

    Args:
        config: resolved settings; `miniature` has the sizes, `data.sets` and `evaluation` the names of the files.
        out: folder of the data sets.

    Raises:
        ValueError: the settings are not those of a miniature.
    """
    settings = configuration.load(config)
    if settings.miniature is None:
        raise ValueError(f"{config}: miniature is not set, so the data sets are to be fetched, not rendered")
    if lost := {"pretrain", "sft"} - set(settings.data.sets):
        raise ValueError(f"{config}: data.sets.{min(lost)} is missing, the miniature renders pretrain and sft")
    kind = world.of(settings.miniature)
    seen = _write_pretrain(settings, settings.miniature, kind, out)
    seen |= _write_sft(settings, settings.miniature, kind, out)
    _write_captions(settings, settings.miniature, kind, out, seen)
    _write_mmmu(settings, settings.miniature, kind, out, seen)


def _write_pretrain(settings: Config, sizes: Miniature, kind: World, out: Path) -> set[AnyScene]:
    """LLaVA-Pretrain: one instruction and one caption per picture."""
    data, rng = settings.data.sets["pretrain"], random.Random(f"{settings.seed}/pretrain")
    records: list[Record] = []
    shown: dict[str, AnyScene] = {}
    for number in range(1, sizes.pretrain_samples + 1):
        scene = kind.sample(rng)
        image = f"{number // 1000:05d}/{number:09d}.jpg"
        asked = [IMAGE_TAG, rng.choice(text.INSTRUCTIONS)]
        if rng.random() < IMAGE_LAST_SHARE:
            asked.reverse()
        turns = [("\n".join(asked), rng.choice(text.captions(scene)))]
        records.append({"id": f"{number:09d}", "image": image, "conversations": _conversation(turns)})
        shown[image] = scene
    with _folder(out / data.folder("pretrain")) as folder:
        _save(folder / data.images, kind, shown, rng, "pictures to caption")
        _write_list(folder / data.annotations, records)
    return set(shown.values())


def _write_sft(settings: Config, sizes: Miniature, kind: World, out: Path) -> set[AnyScene]:
    """LLaVA-Instruct-150K: conversations about a picture, about two (`image` is a list then), and about none."""
    data, rng = settings.data.sets["sft"], random.Random(f"{settings.seed}/sft")
    records: list[Record] = []
    shown: dict[str, AnyScene] = {}
    for number in range(1, sizes.sft_samples + 1):
        about, turns = conversation(rng, settings, kind)
        record: Record = {"id": f"{number:012d}"}
        images = [f"coco/train2017/{len(shown) + place:012d}.jpg" for place in range(1, len(about) + 1)]
        if images:
            record["image"] = images[0] if len(images) == 1 else images
            turns[0] = (f"{IMAGE_TAG}\n" * len(images) + turns[0][0], turns[0][1])
        records.append(record | {"conversations": _conversation(turns)})
        shown |= dict(zip(images, about, strict=True))
    with _folder(out / data.folder("sft")) as folder:
        _save(folder / data.images, kind, shown, rng, "pictures to talk about")
        _write_list(folder / data.annotations, records)
    return set(shown.values())


def conversation(
    rng: random.Random, settings: Config, kind: World = world.SHAPES
) -> tuple[list[AnyScene], list[tuple[str, str]]]:
    """Scenes (none, one or two) and turns about them, in which nothing is named that is held out.

    A wrong option that names a held-out pair would teach that such a thing is never there.
    """
    while True:
        about, turns = _draw_conversation(rng, settings, kind)
        if not any(kind.names_held_out(part) for turn in turns for part in turn):
            return about, turns


def _draw_conversation(
    rng: random.Random, settings: Config, kind: World
) -> tuple[list[AnyScene], list[tuple[str, str]]]:
    draw = rng.random()
    if draw < TEXT_ONLY_SHARE:
        return [], [kind.knowledge(rng) for _ in range(rng.randint(1, MAX_TURNS))]
    scene = kind.sample(rng)
    if draw < TEXT_ONLY_SHARE + COMPARISON_SHARE:
        other = kind.sample(rng)
        asked = [kind.question(rng, "Comparison", scene, other) for _ in range(rng.randint(1, 3))]
        return [scene, other], [_turn(one, settings) for one in asked if one]
    turns = []
    if rng.random() < 0.7:
        turns.append((settings.evaluation.captions.prompt, text.captions(scene)[0]))
    if rng.random() < 0.3:
        turns.append(kind.chat(rng, scene))
    for subject in rng.sample(kind.taught, MAX_TURNS):
        if len(turns) < MAX_TURNS and (one := kind.question(rng, subject, scene)):
            turns.append(_turn(one, settings))
    rng.shuffle(turns)  # else every answer could be copied from the caption
    return [scene], turns[: rng.randint(2, MAX_TURNS)]


def _turn(asked: text.Question, settings: Config) -> tuple[str, str]:
    test = settings.evaluation.mmmu
    return asked.prompt(test.prompt_multiple_choice, test.prompt_open), asked.reply


def _write_captions(settings: Config, sizes: Miniature, kind: World, out: Path, seen: set[AnyScene]) -> None:
    """COCO captions: five references per picture."""
    test, rng = settings.evaluation.captions, random.Random(f"{settings.seed}/captions")
    split = Path(test.images).name
    images: list[Record] = []
    annotations: list[Record] = []
    shown: dict[str, AnyScene] = {}
    for number in range(1, sizes.test_images + 1):
        scene = _unseen(rng, kind, number % 2 == 0, seen)
        name = f"COCO_{split}_{number:012d}.jpg"
        images.append({"id": number, "file_name": name, "width": kind.canvas, "height": kind.canvas, "license": 1})
        for caption in text.captions(scene):
            annotations.append({"id": len(annotations) + 1, "image_id": number, "caption": caption})
        shown[name] = scene
    licences = [{"id": 1, **kind.licence}]
    info = {"description": "Rendered scenes", "version": "1.0"}
    with _folder(out / test.folder("captions")) as folder:
        _save(folder / test.images, kind, shown, rng, "pictures to test captions")
        files.write_json(
            folder / test.annotations,
            {"info": info, "licenses": licences, "images": images, "annotations": annotations},
        )


def _write_mmmu(settings: Config, sizes: Miniature, kind: World, out: Path, seen: set[AnyScene]) -> None:
    """MMMU: a table per subject, and the answers of all."""
    test, rng = settings.evaluation.mmmu, random.Random(f"{settings.seed}/mmmu")
    answers = {}
    with _folder(out / test.folder("mmmu")) as folder:
        for subject in tqdm(kind.subjects, desc="subjects to test", unit="subject"):
            asked = questions(rng, kind, subject, sizes.questions_per_subject, seen)
            pictures = _encode(kind, [scene for one in asked for scene in one.scenes], rng.getrandbits(32), "PNG")
            rows = [
                _row(f"{test.split}_{subject}_{number}", one, [next(pictures) for _ in one.scenes])
                for number, one in enumerate(asked, start=1)
            ]
            for row in rows:
                row["subfield"] = kind.subjects[subject]
                answers[row["id"]] = {"question_type": row["question_type"], "ground_truth": row["answer"]}
            _write_table(folder / subject / f"{test.split}-00000-of-00001.parquet", rows)
        files.write_json(folder / "answer_dict_val.json", answers)


def questions(rng: random.Random, kind: World, subject: str, count: int, seen: set[AnyScene]) -> list[text.Question]:
    """Questions about unseen scenes, every second with what is held out. Answers come equally often."""
    limit = math.ceil(count / kind.num_answers[subject]) if subject in kind.num_answers else count
    asked: list[text.Question] = []
    answered: Counter[str] = Counter()
    fruitless = 0
    while len(asked) < count:
        held_out = (len(asked) + fruitless // PATIENCE) % 2 == 1
        scene, other = (_unseen(rng, kind, held_out, seen) for _ in range(2))
        one = kind.question(rng, subject, scene, other if subject == "Comparison" else None)
        if one and answered[one.answer] < limit:
            asked.append(one)
            answered[one.answer] += 1
            fruitless = 0
        else:
            fruitless += 1
    return asked


def _row(name: str, asked: text.Question, pictures: Sequence[bytes]) -> Record:
    markers = "".join(f"<image {number}>\n" for number in range(1, len(pictures) + 1))
    images: Record = {f"image_{number}": None for number in range(1, MMMU_IMAGES + 1)}
    for number, picture in enumerate(pictures, start=1):
        images[f"image_{number}"] = {"bytes": picture, "path": f"{name}_{number}.png"}
    return {
        "id": name,
        "question": markers + asked.text,
        "options": str(list(asked.options)),
        "explanation": "; ".join(text.captions(scene)[0] for scene in asked.scenes),
        **images,
        "img_type": "['Rendered scenes']",
        "answer": asked.reply,
        "topic_difficulty": DIFFICULTY[max(len(scene.things) for scene in asked.scenes)],
        "question_type": "multiple-choice" if asked.options else "open",
        "subfield": None,
    }


def _write_table(path: Path, rows: Sequence[Record]) -> None:
    import pyarrow
    from pyarrow import parquet

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([(name, image if name.startswith("image_") else pyarrow.string()) for name in rows[0]])
    path.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema), path)


def _unseen(rng: random.Random, kind: World, held_out: bool, seen: set[AnyScene]) -> AnyScene:
    """A test scene: not one of the training scenes, and given to no other test item. Notes it in `seen`."""
    while (scene := kind.sample(rng, held_out)) in seen:
        pass
    seen.add(scene)
    return scene


def _conversation(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": role, "value": said} for turn in turns for role, said in zip(("human", "gpt"), turn, strict=True)]


def _write_list(path: Path, records: Sequence[Record]) -> None:
    """As the real lists are: one line, without the indentation that would double the size of the file."""
    files.write_text(path, json.dumps(records))


def _save(folder: Path, kind: World, shown: Mapping[str, AnyScene], rng: random.Random, what: str) -> None:
    """Render scenes into JPEG files named by the keys."""
    for parent in {(folder / name).parent for name in shown}:
        parent.mkdir(parents=True)
    names = list(shown)
    with tqdm(total=len(names), desc=what, unit="picture", mininterval=0.5) as progress:
        for start in range(0, len(names), BATCH):
            batch = names[start : start + BATCH]
            pictures = _encode(kind, [shown[name] for name in batch], rng.getrandbits(32), "JPEG")
            for name, picture in zip(batch, pictures, strict=True):
                (folder / name).write_bytes(picture)
            progress.update(len(batch))


def _encode(kind: World, shown: Sequence[AnyScene], seed: int, format_: str) -> Iterator[bytes]:
    """Rendered scenes as the bytes of picture files; JPEG without loss of colour resolution."""
    options = {"quality": 95, "subsampling": 0} if format_ == "JPEG" else {}
    for pixels_HWC in kind.render(shown, seed).permute(0, 2, 3, 1).contiguous().numpy():
        stream = io.BytesIO()
        Image.fromarray(pixels_HWC).save(stream, format_, **options)
        yield stream.getvalue()


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `out` when it is complete."""
    writing, old = (out.with_name(f".{out.name}.{what}") for what in ("writing", "old"))
    for left in (writing, old):
        shutil.rmtree(left, ignore_errors=True)
    writing.mkdir(parents=True)
    yield writing
    if out.exists():
        out.rename(old)
    writing.rename(out)
    shutil.rmtree(old, ignore_errors=True)
