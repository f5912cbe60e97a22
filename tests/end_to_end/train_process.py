"""`vlm train` in processes that things happen to, forked from one that has imported everything: a start costs 0.2 s."""

from __future__ import annotations

import gc
import hashlib
import importlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))  # the forked process imports this module by name

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["vlm.train.trainer", "transformers.models.auto.tokenization_auto", "train_process"])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Event:
    """What happens inside a process, just before call number `call` of `target`."""

    target: str
    """`module:attribute.path` of a function."""
    call: int
    what: Callable[..., None] = kill
    """A function of a module that the process can import; it gets `arguments`."""
    arguments: tuple[Any, ...] = ()
    within_seconds: float | None = None
    """For a kill: not before the call but so long after it began, or when it has ended if that is earlier."""


def ask(number: int, times: int = 1, gap_seconds: float = 0.0) -> None:
    """Send this process a signal, as a terminal or SLURM would."""
    for _ in range(times):
        os.kill(os.getpid(), number)
        time.sleep(gap_seconds)


def ask_all(number: int) -> None:
    """This process and those that it started, as SLURM does at the time limit."""
    for process in psutil.Process().children(recursive=True):
        process.send_signal(number)
    time.sleep(0.5)
    ask(number)


def ask_while_busy(number: int) -> None:
    """Twice, while the main thread is where Python runs no signal handlers for half a minute."""
    threading.Thread(target=ask, args=(number, 2, 0.5)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 50_000_000)


def stop_still() -> None:
    """As a machine that hangs: nothing of this process goes on, and its connections stay open."""
    os.kill(os.getpid(), signal.SIGSTOP)


def limit_files(num_bytes: int) -> None:
    """Let no file grow beyond a size, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def fail(number: int, path: str) -> None:
    raise OSError(number, os.strerror(number), path)


def shorten(*paths: Path) -> None:
    for path in paths:
        os.truncate(path, path.stat().st_size // 2)


def plant_not_a_number() -> None:
    """In a weight of the projector, as a broken memory might."""
    (model,) = (one for one in gc.get_objects() if type(one).__name__ == "Llava")
    parameter = next(model.vision_projection.parameters())
    parameter.data.view(-1)[0] = float("nan")


def start(
    log: Path,
    *events: Event | tuple[str, int] | None,
    values: Mapping[str, Any] | None = None,
    rank: dict[str, str] | None = None,
    **arguments: Any,
) -> BaseProcess:
    """Begin `vlm train` with `arguments`; standard error goes to `log`.

    Args:
        events: a pair of target and call stands for a kill.
        values: `module:name` of constants of the program to what they should be instead.
        rank: variables that make it one rank of several.
    """
    happens = [event if isinstance(event, Event) else Event(*event) for event in events if event is not None]
    process = _CONTEXT.Process(target=_train, args=(log, happens, dict(values or {}), rank or {}, arguments))
    process.start()
    return process


def start_ranks(log: Path, world: int, events: Mapping[int, Sequence[Event]], **options: Any) -> list[BaseProcess]:
    """Begin all ranks of one training; events by rank. The log of rank 1 is `log` with `.1` appended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
    return [
        start(
            log if rank == 0 else log.with_name(f"{log.name}.{rank}"),
            *events.get(rank, ()),
            rank={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **options,
        )
        for rank in range(world)
    ]


def finish(process: BaseProcess, seconds: float = 60.0) -> int:
    process.join(seconds)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def _train(
    log: Path, events: Sequence[Event], values: dict[str, Any], rank: dict[str, str], arguments: dict[str, Any]
) -> None:
    import torch

    from vlm import cli

    torch.set_num_threads(1)
    os.environ |= rank
    sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    for name, value in values.items():
        owner, attribute = _find(name)
        setattr(owner, attribute, value)
    for event in events:
        _arrange(event)
    options = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in arguments.items()
    ]
    try:
        code = cli.main(["train", *options])
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def _find(target: str) -> tuple[Any, str]:
    module, path = target.split(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def _arrange(event: Event) -> None:
    owner, name = _find(event.target)
    original, calls = getattr(owner, name), 0

    def counted(*positional: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != event.call:
            return original(*positional, **named)
        if event.within_seconds is None:
            event.what(*event.arguments)
            return original(*positional, **named)
        threading.Timer(event.within_seconds, kill).start()
        original(*positional, **named)
        kill()

    setattr(owner, name, counted)
