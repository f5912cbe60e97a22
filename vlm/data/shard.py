"""Write a LLaVA data set as WebDataset shards, looking at every sample once so that training meets no surprise.

A sample is `<key>.json` with `id`, `image` and `conversations`, and, if it has a picture, `<key>.jpg` (or `.png`, ...)
with the file's own bytes; where `image` is a list, `<key>.00.jpg`, `<key>.01.jpg` and so on. The key is the sample's
position in the annotations. Same input, same bytes.
"""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from vlm import config as settings
from vlm import files, images, prompt

EXTENSIONS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".gif": "gif", ".webp": "webp", ".bmp": "bmp"}
_CHUNK = 256  # samples read ahead; bounds the memory to some 10 MB of pictures


@dataclass
class _Source:
    """A data set as published, and what is wrong with it."""

    name: str
    annotations: Path
    images: Path
    records: Sequence[Any]
    max_rejected_share: float
    rejected: dict[int, str] = field(default_factory=dict)

    def label(self, index: int) -> str:
        record = self.records[index]
        id_ = record.get("id") if isinstance(record, dict) else None
        return f"{self.annotations}[{index}]" + (f" (id {id_})" if id_ is not None else "")

    def reject(self, index: int, reason: str) -> None:
        self.rejected[index] = reason

    def too_many(self) -> bool:
        return len(self.rejected) > self.max_rejected_share * len(self.records)

    def refuse(self, report: Path, *, complete: bool) -> None:
        self.write_report(report)
        total = len(self.records)
        first = self.rejected[min(self.rejected)]
        raise ValueError(
            f"{'' if complete else 'at least '}{len(self.rejected)} of the {total} samples of {self.annotations} "
            f"({len(self.rejected) / total:.2%}) cannot be used, more than data.max_rejected_share = "
            f"{self.max_rejected_share:.2%} allows. The first: {first}. All are in {report}"
        )

    def write_report(self, path: Path) -> None:
        entries = [
            {"index": index, "id": self.records[index].get("id"), "reason": reason}
            if isinstance(self.records[index], dict)
            else {"index": index, "id": None, "reason": reason}
            for index, reason in sorted(self.rejected.items())
        ]
        files.write_json(
            path,
            {
                "data_set": self.name,
                "num_samples": len(self.records),
                "num_rejected": len(entries),
                "rejected": entries,
            },
        )


class _Shards:
    """Tar files of a split, a new one every so many samples. Times and owners are left out: same input, same bytes."""

    def __init__(self, folder: Path, prefix: str, samples_per_shard: int) -> None:
        self._folder, self._prefix, self._samples_per_shard = folder, prefix, samples_per_shard
        self._tar: tarfile.TarFile | None = None
        self.num_samples = 0

    def add(self, key: str, members: dict[str, bytes]) -> None:
        if self.num_samples % self._samples_per_shard == 0:
            self.close()
            name = f"{self._prefix}-{self.num_samples // self._samples_per_shard:06d}.tar"
            self._tar = tarfile.open(self._folder / name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        assert self._tar is not None
        for extension, data in members.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        self.num_samples += 1

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()


def shard(config: Path, set_name: str, source: Path, out: Path) -> None:
    """Write `out/shard-*.tar` (training), `out/validation-*.tar`, `out/shards.json` (counts) and `out/rejected.json`.

    The folder appears when it is complete, and replaces an older one. Samples are shuffled by `seed`; the first
    `validation_share` of them are the validation split.

    Args:
        config: resolved settings.
        set_name: key under `data.sets`.
        source: folder with the annotations and the pictures.
        out: folder of the shards.

    Raises:
        ValueError: the data set is not configured, the annotations cannot be read, or more than
            `data.max_rejected_share` of the samples cannot be used; these are listed in `<out>.rejected.json` then.
    """
    tree = settings.load(config)
    if set_name not in tree.data.sets:
        raise ValueError(f"--set: {set_name!r} is not under data.sets of {config}: {', '.join(tree.data.sets)}")
    data_set = tree.data.sets[set_name]
    annotations = source / data_set.annotations
    data = _Source(
        name=set_name,
        annotations=annotations,
        images=source / data_set.images,
        records=_read(annotations, f"data.sets.{set_name}.annotations"),
        max_rejected_share=tree.data.max_rejected_share,
    )
    order = list(range(len(data.records)))
    random.Random(tree.seed).shuffle(order)
    num_validation = round(data_set.validation_share * len(order))

    report = out.with_name(f"{out.name}.rejected.json")
    for index in tqdm(range(len(order)), desc=f"check {set_name}", unit="sample", mininterval=0.5):
        if reason := _unusable(data, index):
            data.reject(index, reason)
    if data.too_many():
        data.refuse(report, complete=True)

    with files.writing(out) as writing:
        splits = {name: _Shards(writing, name, data_set.samples_per_shard) for name in ("shard", "validation")}
        members_of = tqdm(
            _members(data, order), total=len(order), desc=f"shard {set_name}", unit="sample", mininterval=0.5
        )
        for place, (index, members) in enumerate(members_of):
            if members is not None:
                splits["validation" if place < num_validation else "shard"].add(f"{index:09d}", members)
            elif data.too_many():
                data.refuse(report, complete=False)
        for split in splits.values():
            split.close()
        if splits["shard"].num_samples == 0:
            raise ValueError(
                f"{annotations}: no sample is left for training; see data.sets.{set_name}.validation_share"
            )
        data.write_report(writing / "rejected.json")
        counts = {"train": splits["shard"].num_samples, "validation": splits["validation"].num_samples}
        files.write_json(writing / "shards.json", {"data_set": set_name, **counts, "rejected": len(data.rejected)})
    print(
        f"{set_name}: {counts['train']} training and {counts['validation']} validation samples, "
        f"{len(data.rejected)} rejected ({out / 'rejected.json'})"
    )
    report.unlink(missing_ok=True)


def _read(annotations: Path, key: str) -> Sequence[Any]:
    if not annotations.is_file():
        raise ValueError(f"{annotations} does not exist; it is the source joined with {key}")
    records = files.read_json(annotations)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{annotations}: expected a list of {{id, image, conversations}}, found {records!r:.80}")
    return records


def _unusable(data: _Source, index: int) -> str | None:
    """What is wrong with a sample, as far as its text and the presence of its file tell; None if nothing is."""
    record, label = data.records[index], data.label(index)
    if not isinstance(record, dict):
        return f"{label}: expected an object with id, image and conversations, found {record!r:.80}"
    pictures = _pictures(record)
    try:
        prompt.check(record.get("conversations"), len(pictures), label)
    except ValueError as error:
        return str(error)
    for image in pictures:
        if not isinstance(image, str) or PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image).parts:
            return f"{label}.image: expected a path below {data.images}, found {image!r:.80}"
        if PurePosixPath(image).suffix.lower() not in EXTENSIONS:
            return f"{label}.image: {image} is no {', '.join(EXTENSIONS)}"
        if not (data.images / image).is_file():
            return f"{label}.image: {data.images / image} does not exist"
    return None


def _pictures(record: dict[str, Any]) -> list[Any]:
    """What stands under `image`: one path in LLaVA's own data, a list where a conversation has several pictures."""
    image = record.get("image")
    if image is None:
        return []
    return image if isinstance(image, list) else [image]


def _members(data: _Source, order: Sequence[int]) -> Iterator[tuple[int, dict[str, bytes] | None]]:
    """The tar members of each sample in order, None where a sample is rejected. Pictures are checked in threads."""

    def members(index: int) -> dict[str, bytes] | str:
        record = data.records[index]
        text = {name: record[name] for name in ("id", "image", "conversations") if record.get(name) is not None}
        parts = {}
        pictures = _pictures(record)
        for place, image in enumerate(pictures):
            path = data.images / image
            picture = path.read_bytes()
            try:
                images.verify(picture, name=f"{data.label(index)}.image: {path}")
            except ValueError as error:
                return str(error)
            extension = EXTENSIONS[path.suffix.lower()]
            parts[extension if len(pictures) == 1 else f"{place:02d}.{extension}"] = picture
        return parts | {"json": json.dumps(text, ensure_ascii=False, separators=(",", ":")).encode()}

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # Pillow decodes without the interpreter's lock
        for start in range(0, len(order), _CHUNK):
            chunk = order[start : start + _CHUNK]
            made = pool.map(members, [index for index in chunk if index not in data.rejected])
            for index in chunk:
                result = data.rejected[index] if index in data.rejected else next(made)
                if isinstance(result, str):
                    data.reject(index, result)
                yield index, None if isinstance(result, str) else result
