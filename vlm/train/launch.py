"""Starts the ranks of this machine and ends as they do: `vlm train` is its own launcher.

`torchrun` reports 1 for whatever its ranks report, kills them 30 seconds after it was asked to end, and dies of
SIGUSR1. This passes requests on, waits for the save however long it takes, and keeps the exit code. Ranks that
`torchrun` or another launcher started (RANK is set) are left alone.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from vlm.config import Parallel
from vlm.train import stop

GRACE_SECONDS = 15.0
"""After one rank has failed the others say what they know of it and end by themselves; then they are killed."""
_POLL_SECONDS = 0.1


def needed(parallel: Parallel) -> bool:
    """Whether ranks have to be started: several are promised, and this process is none of them."""
    return parallel.world_size > 1 and "RANK" not in os.environ


def run(command: Sequence[str], parallel: Parallel) -> int:
    """Start `parallel.ranks_per_node` processes and wait for them.

    With several nodes every one runs this once, with MASTER_ADDR and MASTER_PORT set and its number in NODE_RANK or
    SLURM_NODEID.

    Args:
        command: what each rank runs; finds its place in RANK, LOCAL_RANK and WORLD_SIZE.

    Returns:
        0 if all ranks ended well, 75 if they were stopped and have saved, else the exit code of the first that failed.

    Raises:
        RuntimeError: there are several nodes, and it is not said which one this is.
        ValueError: SLURM gave the job fewer nodes or GPUs than the settings promise.
    """
    _check_allocation(parallel)
    ranks: dict[int, subprocess.Popen[bytes]] = {}

    def pass_on(number: int, frame: object) -> None:
        for process in list(ranks.values()):
            process.send_signal(number)

    old = {number: signal.signal(number, pass_on) for number in stop.SIGNALS}
    # Inherited: a request that finds a rank still importing waits until `Stop` hears it, instead of ending the process.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop.SIGNALS)
    try:
        for rank, environment in _environments(parallel).items():
            # In a session of its own, so that a terminal asks the launcher alone.
            ranks[rank] = subprocess.Popen(
                command, env=os.environ | environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop.SIGNALS)
        return _wait(ranks)
    finally:
        for process in ranks.values():
            process.kill()
        for number, handler in old.items():
            signal.signal(number, handler)


def is_first_node() -> bool:
    """Whether this machine has the first rank, as far as the launcher's variables say."""
    return (_node() or "0") == "0"


def _node() -> str | None:
    return os.environ.get("NODE_RANK", os.environ.get("SLURM_NODEID"))


def _check_allocation(parallel: Parallel) -> None:
    """A step of SLURM may get less than it was submitted for, without a word; ranks would then share a GPU, or wait for
    others that never come."""
    nodes = os.environ.get("SLURM_STEP_NUM_NODES", str(parallel.nodes))
    if int(nodes) != parallel.nodes:
        raise ValueError(
            f"parallel.nodes: promises {parallel.nodes} machines, SLURM started this on {nodes}: submit with "
            f"`--nodes={parallel.nodes}` and start with `srun --ntasks-per-node=1`, or change the key"
        )
    gpus = os.environ.get("SLURM_STEP_GPUS")
    if gpus is not None and len(gpus.split(",")) < parallel.ranks_per_node:
        raise ValueError(
            f"parallel.ranks_per_node: promises {parallel.ranks_per_node} processes with a GPU each, SLURM gave this "
            f"machine {len(gpus.split(','))}: submit with `--gres=gpu:{parallel.ranks_per_node}`, or change the key"
        )


def _environments(parallel: Parallel) -> dict[int, dict[str, str]]:
    """What each rank of this machine finds in its environment, by rank."""
    if parallel.nodes == 1:
        node, address, port = 0, "127.0.0.1", _free_port()
    else:
        found = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")}
        number = _node()
        missing = [name for name, value in {**found, "NODE_RANK": number}.items() if value is None]
        if missing:
            raise RuntimeError(f"parallel.nodes: is {parallel.nodes}, but {', '.join(missing)} is not set on this one")
        node, address, port = int(number or 0), str(found["MASTER_ADDR"]), str(found["MASTER_PORT"])
    shared = {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "WORLD_SIZE": str(parallel.world_size),
        "LOCAL_WORLD_SIZE": str(parallel.ranks_per_node),
        # As torchrun does: each rank would else take all cores for its own.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    first = node * parallel.ranks_per_node
    return {
        first + local: {"RANK": str(first + local), "LOCAL_RANK": str(local), **shared}
        for local in range(parallel.ranks_per_node)
    }


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _wait(ranks: Mapping[int, subprocess.Popen[bytes]]) -> int:
    running, first_failed, code, since = dict(ranks), None, 0, 0.0
    while running:
        for rank, process in list(running.items()):
            ended = process.poll()
            if ended is None:
                continue
            del running[rank]
            if ended not in (0, stop.EXIT_STOPPED) and first_failed is None:
                first_failed, since, code = rank, time.monotonic(), ended if ended > 0 else 1
                if ended < 0:
                    print(f"vlm: rank {rank} was killed by {stop.name(-ended)}", file=sys.stderr, flush=True)
            elif first_failed is None:
                code = max(code, ended)
        if first_failed is not None and time.monotonic() - since > GRACE_SECONDS:
            for process in running.values():
                process.kill()
        time.sleep(_POLL_SECONDS)
    if first_failed is not None and code < 128:
        print(
            f"vlm: ended because of rank {first_failed}; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
    return code
