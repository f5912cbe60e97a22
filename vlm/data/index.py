"""Prepare shards for Energon without a question asked: which files hold training, which validation, where samples are.

`energon prepare` splits by ratio over whole shards (three shards at 8:1:1 leave validation empty) and asks for the
sample type; here the file names decide, and samples stay crude for the loader's own cooker.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

METADATA = ".nv-meta"
SPLITS = {"train": "shard-[0-9]+[.]tar", "val": "validation-[0-9]+[.]tar"}  # Energon would eat a backslash


def index(directory: Path) -> None:
    """Write `directory/.nv-meta`, replacing an older one.

    Raises:
        ValueError: the folder holds no training shards, a shard is truncated or has no samples, or two samples have
            the same key.
    """
    shards = sorted(path.name for path in directory.glob("*.tar"))
    if not any(name.startswith("shard-") for name in shards):
        raise ValueError(f"{directory}: no shard-*.tar to index; `vlm data shard` writes them")
    for name in shards:
        _check_end(directory / name)
    metadata = directory / METADATA
    shutil.rmtree(metadata, ignore_errors=True)
    try:
        _prepare(directory, shards)
    except BaseException:
        shutil.rmtree(metadata, ignore_errors=True)  # half an index would be taken for a whole one
        raise


def _check_end(path: Path) -> None:
    """A tar file ends with two zero blocks of 512 bytes (POSIX.1-1988, ustar); a truncated one does not."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        stream.seek(max(size - 1024, 0))
        tail = stream.read()
    if size % 512 or size < 1024 or any(tail):
        raise ValueError(f"{path}: the tar file is truncated ({size} bytes); run `vlm data shard` again")


def _prepare(directory: Path, shards: list[str]) -> None:
    from megatron.energon.flavors import BaseWebdatasetFactory  # 2 s
    from megatron.energon.flavors.webdataset.indexing import DuplicateSampleKeyError

    def progress(items: Iterator[Any], total: int) -> Iterator[Any]:
        return iter(tqdm(items, total=total, desc=f"index {directory.name}", unit="shard"))

    # Energon reports on stdout, and logs the traceback of a shard that it cannot read before it asserts.
    logging.getLogger("megatron.energon").setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            BaseWebdatasetFactory.prepare_dataset(
                directory.absolute(),
                shards,
                split_parts_patterns=list(SPLITS.items()),
                progress_fn=progress,
                workers=min(len(shards), os.cpu_count() or 1, 16),
            )
    except AssertionError as error:
        raise ValueError(f"{directory}: {error} It is empty or damaged; run `vlm data shard` again") from None
    except SystemExit as exit:  # which is how Energon refuses, having printed why
        if not isinstance(exit.__context__, DuplicateSampleKeyError):
            raise
        key = exit.__context__.sample_key
        raise ValueError(f"{directory}: two samples have the key {key}; run `vlm data shard` again") from None
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (directory / METADATA / "dataset.yaml").write_text(yaml.safe_dump(dataset, sort_keys=False))
