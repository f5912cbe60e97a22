"""Write a LLaVA data set as WebDataset shards, looking at every sample once so that training meets no surprise.

A sample is `<key>.json` with `id`, `image` and `conversations`, and, if it has a picture, `<key>.jpg` (or `.png`, ...)
with the file's own bytes; where `image` is a list, `<key>.00.jpg`, `<key>.01.jpg` and so on. The key is the sample's
position in the annotations. Same input, same bytes, however many processes write.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from vlm import config as settings
from vlm import files, prompt
from vlm.config import DataSet
from vlm.data.annotations import Annotations
from vlm.data.writer import Job, Writer, finished, open_folder
from vlm.pictures import Pictures, Place

EXTENSIONS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".gif": "gif", ".webp": "webp", ".bmp": "bmp"}
_FIRST = 5  # examples that the report gives of what it only counts
_NUMBERS = len(Place._fields)


@dataclass
class _Checked:
    """What one pass over the annotations has found."""

    name: str
    tree: DataSet
    annotations: Annotations
    pictures: Pictures
    max_rejected_share: float
    rejected: dict[int, str] = field(default_factory=dict)
    left_out: bytearray = field(default_factory=bytearray)
    """1 for each sample without its picture, where `missing_images` is `drop`."""
    places: array[int] = field(default_factory=lambda: array("q"))
    """Places of all pictures one after the other; those of sample i begin at number first[i]."""
    first: array[int] = field(default_factory=lambda: array("q", [0]))
    wanted: dict[str, int] = field(default_factory=dict)
    """Pictures that samples name, by image set, and how many of them are missing, with the first."""
    missing: dict[str, tuple[int, str]] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    """Ids that came before. LLaVA's own lists have many: several conversations about one picture."""

    def label(self, index: int, record: Any) -> str:
        id_ = record.get("id") if isinstance(record, dict) else None
        return f"{self.annotations.path}[{index}]" + (f" (id {id_})" if id_ is not None else "")

    def places_of(self, index: int) -> Iterator[Place]:
        for number in range(self.first[index], self.first[index + 1]):
            yield Place(*self.places[number * _NUMBERS : (number + 1) * _NUMBERS])

    def image_set(self, image: str) -> str:
        """The declared image set that a picture belongs to; else the folder of all of them."""
        return next((name for name in self.tree.image_sets if image.startswith(f"{name}/")), self.tree.images)

    def too_many(self) -> bool:
        return len(self.rejected) > self.max_rejected_share * len(self.annotations)

    def refuse(self, report: Path, *, complete: bool) -> None:
        files.write_json(report, self.report())
        total = len(self.annotations)
        first = self.rejected[min(self.rejected)]
        raise ValueError(
            f"{'' if complete else 'at least '}{len(self.rejected)} of the {total} samples of {self.annotations.path} "
            f"({len(self.rejected) / total:.2%}) cannot be used, more than data.max_rejected_share = "
            f"{self.max_rejected_share:.2%} allows. The first: {first}. All are in {report}"
        )

    def report(self) -> dict[str, Any]:
        rejected = []
        for index, reason in sorted(self.rejected.items()):
            record = self.annotations[index]
            id_ = record.get("id") if isinstance(record, dict) else None
            rejected.append({"index": index, "id": id_, "reason": reason})
        left_out = self.missing if self.tree.missing_images == "drop" else {}
        return {
            "data_set": self.name,
            "num_samples": len(self.annotations),
            "num_rejected": len(rejected),
            "rejected": rejected,
            "num_left_out": sum(self.left_out),
            "missing_images": {name: {"num": count, "first": one} for name, (count, one) in left_out.items()},
            "num_repeated_ids": len(self.repeated),
            "first_repeated_ids": self.repeated[:_FIRST],
        }


def shard(config: Path, set_name: str, source: Path, out: Path, workers: int = 1) -> None:
    """Write `out/shard-*.tar` (training), `out/validation-*.tar`, `out/shards.json` (counts) and `out/rejected.json`.

    The folder appears when it is complete, and replaces an older one. Samples are shuffled by `seed`; the first
    `validation_share` of them are the validation split. After an interruption the finished shards are kept, which wait
    in a hidden folder beside `out`; where `out` is complete already, nothing is done.

    Args:
        config: resolved settings.
        set_name: key under `data.sets`.
        source: folder with the annotations and the pictures, in folders or in zip archives.
        out: folder of the shards.
        workers: processes that write.

    Raises:
        ValueError: the data set is not configured, the annotations cannot be read, an image set is missing, the disk is
            too small, or more than `data.max_rejected_share` of the samples cannot be used; these are listed in
            `<out>.rejected.json` then.
    """
    tree = settings.load(config)
    if set_name not in tree.data.sets:
        raise ValueError(f"--set: {set_name!r} is not under data.sets of {config}: {', '.join(tree.data.sets)}")
    if workers < 1:
        raise ValueError(f"--workers: {workers} processes write nothing, use 1 or more")
    data_set = tree.data.sets[set_name]
    path = source / data_set.annotations
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it is the source joined with data.sets.{set_name}.annotations")
    data = _Checked(set_name, data_set, Annotations(path), Pictures(source), tree.data.max_rejected_share)
    report = out.with_name(f"{out.name}.rejected.json")
    _check(data)
    if data.too_many():
        data.refuse(report, complete=True)
    jobs = _jobs(data, tree.seed)
    if not any(job.name.startswith("shard-") for job in jobs):
        raise ValueError(f"{path}: no sample is left for training; see data.sets.{set_name}.validation_share")

    fingerprint = _fingerprint(data, jobs)
    if not _complete(out, fingerprint):
        with open_folder(out, fingerprint) as writing:
            _write(data, jobs, writing, workers, report)
            _finish(data, jobs, writing, fingerprint)
            files.put_in_place(writing, out)
    report.unlink(missing_ok=True)
    counts = files.read_json(out / "shards.json")
    left_out = f"{counts['left_out']} left out without their pictures, " if counts["left_out"] else ""
    print(
        f"{set_name}: {counts['train']} training and {counts['validation']} validation samples, {left_out}"
        f"{counts['rejected']} rejected ({out / 'rejected.json'})",
        file=sys.stderr,
    )


def _check(data: _Checked) -> None:
    """Look at all texts and find all pictures, without reading these."""
    seen: set[str] = set()
    size = data.annotations.path.stat().st_size
    with tqdm(total=size, desc=f"check {data.name}", unit="B", unit_scale=True, mininterval=0.5) as progress:
        for index, record in enumerate(data.annotations.scan(progress.update)):
            left_out, reason = False, _malformed(data, index, record)
            if reason is None:
                id_ = str(record.get("id"))
                if id_ in seen:
                    data.repeated.append(id_)
                seen.add(id_)
                if absent := _find_pictures(data, record):
                    left_out = data.tree.missing_images == "drop"
                    reason = None if left_out else f"{data.label(index, record)}.image: {absent} does not exist"
            if reason is not None:
                data.rejected[index] = reason
            data.left_out.append(left_out)
            data.first.append(len(data.places) // _NUMBERS)
    data.pictures.forget()
    if data.tree.missing_images == "stop":
        _refuse_missing_sets(data)


def _malformed(data: _Checked, index: int, record: Any) -> str | None:
    """What is wrong with a sample, as far as its text tells; None if nothing is."""
    label = data.label(index, record)
    if not isinstance(record, dict):
        return f"{label}: expected an object with id, image and conversations, found {record!r:.80}"
    pictures = _images(record)
    try:
        prompt.check(record.get("conversations"), len(pictures), label)
    except ValueError as error:
        return str(error)
    for image in pictures:
        if not isinstance(image, str) or PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image).parts:
            return (
                f"{label}.image: expected a path below {data.pictures.folder / data.tree.images}, found {image!r:.80}"
            )
        if PurePosixPath(image).suffix.lower() not in EXTENSIONS:
            return f"{label}.image: {image} is no {', '.join(EXTENSIONS)}"
    return None


def _find_pictures(data: _Checked, record: dict[str, Any]) -> Path | None:
    """Note the places of a sample's pictures; the first one that is missing, if any."""
    absent = None
    for image in _images(record):
        path, group = f"{data.tree.images}/{image}", data.image_set(image)
        place = data.pictures.find(path)
        data.wanted[group] = data.wanted.get(group, 0) + 1
        if place is not None:
            data.places.extend(place)
            continue
        count, first = data.missing.get(group, (0, image))
        data.missing[group] = (count + 1, first)
        absent = absent or data.pictures.folder / path
    return absent


def _refuse_missing_sets(data: _Checked) -> None:
    key = f"data.sets.{data.name}"
    gone = [name for name, (count, _) in data.missing.items() if count == data.wanted[name]]
    if gone:
        where = {name: name if name == data.tree.images else f"{data.tree.images}/{name}" for name in gone}
        each = "; ".join(
            f"{data.pictures.folder / where[name]} has none of {data.wanted[name]} pictures, the first of them "
            f"{data.missing[name][1]}"
            for name in gone
        )
        raise ValueError(
            f"{data.annotations.path}: whole image sets are missing: {each}. Fetch them ({key}.image_sets), or leave "
            f"their samples out with {key}.missing_images: drop"
        )


def _images(record: dict[str, Any]) -> list[Any]:
    """What stands under `image`: one path in LLaVA's own data, a list where a conversation has several pictures."""
    image = record.get("image")
    if image is None:
        return []
    return image if isinstance(image, list) else [image]


def _jobs(data: _Checked, seed: int) -> list[Job]:
    """The shards, each with its samples: a split's usable ones in shuffled order, so many to a shard."""
    order = list(range(len(data.annotations)))
    random.Random(seed).shuffle(order)
    num_validation = round(data.tree.validation_share * len(order))
    jobs = []
    for name, part in {"shard": order[num_validation:], "validation": order[:num_validation]}.items():
        usable = array("q", (index for index in part if index not in data.rejected and not data.left_out[index]))
        size = data.tree.samples_per_shard
        for number, start in enumerate(range(0, len(usable), size)):
            jobs.append(Job(f"{name}-{number:06d}.tar", usable[start : start + size]))
    return jobs


def _fingerprint(data: _Checked, jobs: Sequence[Job]) -> str:
    """Equal where the same shards would be written: the texts, which samples where, and where pictures come from."""
    digest = hashlib.sha256(data.annotations.sha256.encode())
    for job in jobs:
        digest.update(job.name.encode() + job.samples.tobytes())
    digest.update(data.places.tobytes())
    for archive in data.pictures.archives:
        about = archive.stat()
        digest.update(f"{archive.name} {about.st_size} {about.st_mtime_ns}".encode())
    return digest.hexdigest()


def _complete(out: Path, fingerprint: str) -> bool:
    if not (out / "shards.json").is_file():
        return False
    content = files.read_json(out / "shards.json")
    return content.get("fingerprint") == fingerprint and all(
        (out / name).is_file() and (out / name).stat().st_size == size for name, size in content["sizes"].items()
    )


def _write(data: _Checked, jobs: Sequence[Job], folder: Path, workers: int, report: Path) -> None:
    """Write the shards that are not finished yet, and stop when too many pictures turn out to be broken."""
    outcomes = {job.name: finished(folder, job.name) for job in jobs}
    for outcome in outcomes.values():
        data.rejected |= outcome.rejected if outcome else {}
    left = [job for job in jobs if outcomes[job.name] is None]
    total = sum(len(job.samples) for job in jobs)
    needed, free = sum(_bytes(data, job) for job in left), shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{report.parent}: the shards of {data.name} need {needed:,} bytes, its disk has {free:,} free"
        )

    from vlm import images  # torch, 2 s

    def members(index: int) -> dict[str, bytes]:
        """A sample's members of the tar file; ValueError where it cannot be used."""
        record = data.annotations[index]
        label = data.label(index, record)
        text = {name: record[name] for name in ("id", "image", "conversations") if record.get(name) is not None}
        parts = {}
        pictures = _images(record)
        for number, (image, place) in enumerate(zip(pictures, data.places_of(index), strict=True)):
            path = f"{data.tree.images}/{image}"
            try:
                picture = data.pictures.read(path, place)
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(f"{label}.image: {error}") from None
            images.verify(picture, name=f"{label}.image: {data.pictures.folder / path}")
            extension = EXTENSIONS[PurePosixPath(image).suffix.lower()]
            parts[extension if len(pictures) == 1 else f"{number:02d}.{extension}"] = picture
        try:
            return parts | {"json": json.dumps(text, ensure_ascii=False, separators=(",", ":")).encode()}
        except UnicodeEncodeError as error:
            raise ValueError(f"{label}: half a character, which is no valid Unicode ({error.reason})") from None

    done = total - sum(len(job.samples) for job in left)
    bar = tqdm(total=total, initial=done, desc=f"shard {data.name}", unit="sample", mininterval=0.5)
    with bar, Writer(folder, members, left, workers) as writer:
        for number, rejected in writer:
            bar.update(number)
            data.rejected |= rejected
            if data.too_many():
                data.refuse(report, complete=False)


def _bytes(data: _Checked, job: Job) -> int:
    """About what a shard takes: members in blocks of 512 bytes, each after a header of one."""
    blocks = 20
    for index in job.samples:
        sizes = [place.size for place in data.places_of(index)] + [data.annotations.num_bytes(index)]
        blocks += sum(1 + -(-size // 512) for size in sizes)
    return blocks * 512


def _finish(data: _Checked, jobs: Sequence[Job], folder: Path, fingerprint: str) -> None:
    """Reports beside the shards; what only an interrupted run needs goes."""
    counts = {"shard": 0, "validation": 0}
    sizes = {}
    for job in jobs:
        outcome = finished(folder, job.name)
        assert outcome is not None, f"{job.name} was not written"
        counts[job.name.split("-")[0]] += outcome.num_samples
        if outcome.num_samples:
            sizes[job.name] = (folder / job.name).stat().st_size
    if not counts["shard"]:
        raise ValueError(f"{data.annotations.path}: no training sample is left, all of their pictures are broken")
    report = data.report()
    files.write_json(folder / "rejected.json", report)
    for hidden in folder.glob(".*"):
        hidden.unlink()
    files.write_json(
        folder / "shards.json",
        {
            "data_set": data.name,
            "train": counts["shard"],
            "validation": counts["validation"],
            "rejected": report["num_rejected"],
            "left_out": report["num_left_out"],
            "fingerprint": fingerprint,
            "sizes": sizes,
        },
    )
