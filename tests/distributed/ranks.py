"""Ranks that run a whole stage with the real trainer, on batches that are the same whoever takes them.

Processes are forked from one that has imported everything, and meet through a file: no port can collide.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
for folder in ("distributed", "unit", "end_to_end"):
    sys.path.insert(0, str(TESTS / folder))  # the processes import this module by name

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["vlm.train.trainer", "vlm.model.builder", "ranks"])


def launch(world: int, function: Any, *arguments: Any, seconds: float = 120.0) -> None:
    """Run `function(*arguments)` on `world` ranks; fails where one of them does."""
    ranks = [
        _CONTEXT.Process(target=_run, args=(rank, world, os.getpid(), function, arguments)) for rank in range(world)
    ]
    store(os.getpid()).unlink(missing_ok=True)
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(seconds)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * world


def store(parent: int) -> Path:
    return Path(os.environ.get("TMPDIR", "/tmp")) / f"vlm-ranks-{parent}"


def _run(rank: int, world: int, parent: int, function: Any, arguments: Any) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    distributed.init_process_group("gloo", init_method=f"file://{store(parent)}", rank=rank, world_size=world)
    function(*arguments)
