"""Parquet files as the Hub's data sets keep them: columns read by name, pictures one row group at a time."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARD = re.compile(r"(?P<name>.+?)-(?P<number>\d+)-of-(?P<total>\d+)\b.*\.parquet")
"""Name of one of a table's files, which may end in a hash: `test-00000-of-00002-1a2b3c.parquet`."""


@dataclass(frozen=True)
class Picture:
    """A picture in a column of a parquet file, read when it is needed: the pictures of a split can be larger than the
    memory."""

    path: Path
    row_group: int
    row: int
    """Inside the row group."""
    column: str

    def read(self) -> bytes:
        """Bytes of the picture's file. Neighbours come out of the same reading.

        Raises:
            ValueError: there is no picture in that row.
        """
        data = _pictures(self.path, self.row_group, self.column)[self.row]
        if not data:
            raise ValueError(f"{self.path}: row {self.row} of row group {self.row_group} has no `{self.column}`")
        return data


@functools.lru_cache(maxsize=2)
def _pictures(path: Path, row_group: int, column: str) -> list[bytes | None]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        rows = table.read_row_group(row_group, columns=[column]).column(column).to_pylist()
    return [(row or {}).get("bytes") for row in rows]


def find(folder: Path, pattern: str) -> list[Path]:
    """Files in the order of their names, all of them: those named `..-00001-of-00003..` say how many there are.

    Returns:
        Nothing where no file fits the pattern.

    Raises:
        ValueError: some of a table's files are missing, so that a score would be over a part of it.
    """
    paths = sorted(folder.glob(pattern))
    there: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for path in paths:
        if found := SHARD.fullmatch(path.name):
            there[path.parent, found["name"], int(found["total"])].add(int(found["number"]))
    for (parent, name, total), numbers in there.items():
        if missing := sorted(set(range(total)) - numbers):
            raise ValueError(
                f"{parent}: {len(missing)} of the {total} files {name}-* are missing, first number {missing[0]}"
            )
    return paths


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of some columns of a parquet file.

    Raises:
        ValueError: not a parquet file.
    """
    from pyarrow import parquet
    from pyarrow.lib import ArrowInvalid

    try:
        rows: list[dict[str, Any]] = parquet.read_table(path, columns=list(columns)).to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a parquet file: {error}") from None
    return rows


def column_names(path: Path) -> list[str]:
    """Names of a parquet file's columns.

    Raises:
        ValueError: not a parquet file.
    """
    from pyarrow import parquet
    from pyarrow.lib import ArrowInvalid

    try:
        return list(parquet.read_schema(path).names)
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a parquet file: {error}") from None


def places(path: Path) -> Iterator[tuple[int, int]]:
    """Row group and place in it of each row of a parquet file."""
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    for row_group in range(metadata.num_row_groups):
        for row in range(metadata.row_group(row_group).num_rows):
            yield row_group, row
