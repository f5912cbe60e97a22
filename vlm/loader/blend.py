"""The data sets of a stage as Energon wants them: checked, and named with their weights in a MetadatasetV2 file."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlm import files

METADATA = ".nv-meta"


def write(path: Path, weights: Mapping[str, float], data_dirs: Mapping[str, Path]) -> Path:
    """Write the blend. Every sample carries the name of its data set as a subflavor.

    Args:
        path: YAML file to write.
        weights: `stages.<stage>.data`: how often each data set is drawn from, relative to the others.
        data_dirs: indexed folder of each data set.
    """
    blend = [
        {"weight": weight, "path": str(data_dirs[name].absolute()), "subflavors": {"set": name}}
        for name, weight in weights.items()
    ]
    tree = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"train": {"blend": blend}}}
    files.write_text(path, yaml.safe_dump(tree, sort_keys=False))
    return path


def count(directory: Path) -> int:
    """Training samples of an indexed data set, after checking that its shards are whole.

    Energon notices a truncated shard only when it reads there, in the middle of an epoch.

    Raises:
        ValueError: the folder was not indexed, or a shard is missing or shorter than its index says.
    """
    counts = _shard_counts(directory)
    ends = dict(_query(directory, "SELECT tar_file_id, MAX(byte_offset + byte_size) FROM samples GROUP BY tar_file_id"))
    for number, name in enumerate(counts):  # tar_file_id counts the shards in this order
        shard = directory / name
        if not shard.is_file():
            raise ValueError(f"{shard} does not exist, but is in the index; run `vlm data shard` and `vlm data index`")
        if shard.stat().st_size < ends[number]:
            raise ValueError(
                f"{shard} is truncated: {shard.stat().st_size} bytes, its samples end at {ends[number]}; "
                "run `vlm data shard` and `vlm data index` again"
            )
    return sum(number for name, number in counts.items() if name.startswith("shard-"))


@dataclass(frozen=True)
class Entry:
    """Where a sample lies in a shard."""

    key: str
    """`<data set>/<sample>`"""
    shard: Path
    parts: Mapping[str, tuple[int, int]]
    """Offset and size in bytes by extension, in alphabetical order."""

    def read(self, part: str) -> bytes:
        """One part of the sample; nothing if it has no such part.

        Raises:
            ValueError: the shard has become shorter, or has vanished.
        """
        offset, size = self.parts.get(part, (0, 0))
        try:
            with open(self.shard, "rb", buffering=0) as stream:
                stream.seek(offset)
                data = stream.read(size)
        except OSError as error:
            raise ValueError(f"{self.key}: {self.shard} cannot be read ({error.strerror})") from None
        if len(data) < size:
            raise ValueError(
                f"{self.key}: {self.shard} ends inside it; run `vlm data shard` and `vlm data index` again"
            )
        return data


def validation(name: str, directory: Path) -> list[Entry]:
    """The validation samples of a data set that `count` has checked, in the order of its shards.

    Args:
        name: of the data set.
        directory: its indexed folder.
    """
    query = """
        SELECT tar_file_id, sample_key, part_name, content_byte_offset, content_byte_size
        FROM samples JOIN sample_parts USING (tar_file_id, sample_index) ORDER BY tar_file_id, sample_index, part_name
    """
    shards = list(_shard_counts(directory))
    places: dict[tuple[int, str], dict[str, tuple[int, int]]] = {}
    for number, key, part, offset, size in _query(directory, query):
        if shards[number].startswith("validation-"):
            places.setdefault((number, key), {})[part] = (offset, size)
    return [Entry(f"{name}/{key}", directory / shards[number], parts) for (number, key), parts in places.items()]


def _shard_counts(directory: Path) -> dict[str, int]:
    metadata = directory / METADATA
    if not (metadata / "dataset.yaml").is_file():
        what = "is not indexed" if directory.is_dir() else "does not exist"
        raise ValueError(f"{directory} {what}: run `vlm data shard` and `vlm data index {directory}` first")
    counts: dict[str, int] = json.loads((metadata / ".info.json").read_text())["shard_counts"]
    return counts


def _query(directory: Path, query: str) -> list[Any]:
    path = directory / METADATA / "index.sqlite"
    with closing(sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)) as database:
        return database.execute(query).fetchall()
