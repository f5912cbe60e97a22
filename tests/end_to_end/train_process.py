"""`vlm train` in a process that can be killed, forked from one that has imported everything: a start costs 0.2 s."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the forked process imports this module by name

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["vlm.train.trainer", "transformers.models.auto.tokenization_auto", "train_process"])


def start(log: Path, die: tuple[str, int] | None = None, **arguments: Any) -> BaseProcess:
    """Begin `vlm train` with `arguments`; standard error goes to `log`.

    Args:
        die: `module:attribute.path` of a function and the number of the call that is never made: the process kills
            itself with SIGKILL instead.
    """
    process = _CONTEXT.Process(target=_train, args=(log, die, arguments))
    process.start()
    return process


def finish(process: BaseProcess, seconds: float = 60.0) -> int:
    process.join(seconds)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def _train(log: Path, die: tuple[str, int] | None, arguments: dict[str, Any]) -> None:
    import torch

    from vlm import cli

    torch.set_num_threads(1)
    sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    if die is not None:
        _die_at(*die)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
    code = cli.main(["train", *options])
    sys.stderr.flush()
    os._exit(code)


def _die_at(target: str, call: int) -> None:
    import importlib

    module, path = target.split(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), 0

    def counted(*positional: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*positional, **named)

    setattr(owner, name, counted)
