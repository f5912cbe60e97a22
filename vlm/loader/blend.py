"""The data sets of a stage as Energon wants them: checked, and named with their weights in a MetadatasetV2 file."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

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
    metadata = directory / METADATA
    if not (metadata / "dataset.yaml").is_file():
        what = "is not indexed" if directory.is_dir() else "does not exist"
        raise ValueError(f"{directory} {what}: run `vlm data shard` and `vlm data index {directory}` first")
    counts: dict[str, int] = json.loads((metadata / ".info.json").read_text())["shard_counts"]
    with closing(sqlite3.connect(f"file:{metadata / 'index.sqlite'}?mode=ro&immutable=1", uri=True)) as database:
        query = "SELECT tar_file_id, MAX(byte_offset + byte_size) FROM samples GROUP BY tar_file_id"
        ends = dict(database.execute(query).fetchall())
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
