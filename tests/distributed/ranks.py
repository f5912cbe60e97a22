"""Starts the ranks of a test, which meet through a file.

They are on the CPU; with `gpus`, each has one of its own, and speaks NCCL, where there are enough of them.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing import connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed

for folder in ("distributed", "unit", "end_to_end"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))  # the processes import tests by name

# Importing megatron-core where there is a GPU starts CUDA, which does not survive a fork.
_CONTEXT = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
_CONTEXT.set_forkserver_preload(["vlm.train.trainer", "vlm.model.builder", "ranks"])


def launch(world: int, function: Any, *arguments: Any, seconds: float = 120.0, gpus: bool = False) -> None:
    """Run `function(*arguments)` on `world` ranks; fails as soon as one of them does."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"  # no port, so tests beside this one cannot collide
        ranks = [_CONTEXT.Process(target=_run, args=(rank, world, store, function, arguments)) for rank in range(world)]
        hidden = {} if gpus and torch.cuda.device_count() >= world else {"CUDA_VISIBLE_DEVICES": ""}
        with mock.patch.dict(os.environ, hidden):
            for process in ranks:
                process.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end and all(process.exitcode in (0, None) for process in ranks):
            running = [process.sentinel for process in ranks if process.exitcode is None]
            if not running:
                break
            connection.wait(running, timeout=end - time.monotonic())
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
            process.join()
    assert codes == [0] * world, f"exit codes of the ranks: {codes}"


def _run(rank: int, world: int, store: str, function: Any, arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, init_method=store, rank=rank, world_size=world)
    function(*arguments)
