"""`vlm train`: one stage, from its parent's checkpoint or from where it stopped, to its last iteration."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

from vlm import config as configuration
from vlm.checkpoint import lock, places
from vlm.train import launch
from vlm.train.plan import Plan, prepare
from vlm.train.stop import EXIT_STOPPED, Stop, parse_duration

_NOISE = (
    "(Transformer Engine and )?Apex (is|are) not installed",  # one per module of megatron-core that has another way
    "full scope is deprecated",  # megatron-core about the default of its own cuda_graph_scope
    "`load_state_dict` is deprecated",  # megatron-core about its own calls of torch
    "`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",  # its distributed optimizer's views of fp32 parameters
)
"""Warnings that no setting of ours can heed."""


def run(
    config: Path,
    stage: str,
    start_from: Path,
    data: Path,
    out: Path,
    stop_after: str | None = None,
    wait: bool = False,
) -> int:
    """Train a stage; go on from `out/checkpoints/latest` if that is the same run, and do nothing if it is finished.

    Args:
        config: resolved settings.
        stage: its name under `stages`.
        start_from: checkpoint, or folder of the stage before.
        data: holds one indexed folder per data set.
        out: gets `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `rejected.json` and, at the end, `finished.json`.
            What another run (other settings, parent or data) left there is moved to `out/previous-<hash8>`.
        stop_after: how long this process may live, as `90m` or `3h50m`; it saves and ends while there is time to.
        wait: wait for another training in `out` to end, instead of refusing to work beside it.

    Returns:
        As docs/failures.md lists them: 0; 75 where a signal or `stop_after` ended it early and the same command goes
        on; 73 where another training owns `out`; 1 where a step was not finite, the disk full or a rank gone.

    Raises:
        ValueError, FileNotFoundError: what was asked cannot be done; said before the first step.
    """
    settings = configuration.load(config)
    budget_seconds = None if stop_after is None else parse_duration(stop_after)
    plan = prepare(settings, stage, start_from, data, out)
    if _is_finished(plan):
        return 0
    claims = out / "lock"
    try:
        if launch.needed(settings.parallel):
            # The first rank takes it, and works on should this process be killed; on another node it may have done so.
            if launch.is_first_node():
                lock.await_free(claims, wait=wait)
            if wait and _is_finished(plan):
                return 0
            options = {"config": config, "stage": stage, "start-from": start_from, "data": data, "out": out}
            command = [f"--{name}={value}" for name, value in options.items()]
            command += [] if stop_after is None else [f"--stop-after={stop_after}"]
            return launch.run([sys.executable, "-m", "vlm.cli", "train", *command], settings.parallel)
        rank = int(os.environ.get("RANK", "0"))
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(Stop(budget_seconds, quiet=rank > 0))
            if rank == 0:
                stack.enter_context(lock.hold(claims, wait=wait, cancelled=lambda: bool(stop.code)))
                places.clear_unfinished(out)
            return 0 if wait and _is_finished(plan) else _train(plan, stop)
    except lock.Taken as taken:
        print(f"vlm: {taken}", file=sys.stderr)
        return lock.EXIT_TAKEN
    except OSError as error:
        print(f"vlm: {stage}: {error}; what was saved is whole, the same command goes on from there", file=sys.stderr)
        return 1


def _is_finished(plan: Plan) -> bool:
    checkpoint = plan.finished()
    if checkpoint is not None:
        print(f"{plan.stage}: already finished, {checkpoint} is its last checkpoint", file=sys.stderr)
    return checkpoint is not None


def _train(plan: Plan, stop: Stop) -> int:
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    import torch

    from vlm import checkpoint, parallel
    from vlm.train.step import NonFiniteError  # torch, megatron-core and Energon: 4 s
    from vlm.train.trainer import Trainer
    from vlm.train.watch import Watch

    parallel.initialize(plan.config.parallel, plan.config.seed)
    try:
        with Watch(), Trainer(plan, stop) as trainer:
            stopped = trainer.train()
    except (NonFiniteError, checkpoint.NotSaved) as error:
        if torch.distributed.get_rank() == 0:  # all ranks say the same, or the watch has told the first one
            print(f"vlm: {error}", file=sys.stderr)
        return 1
    parallel.destroy()  # not after an error, when other ranks may still wait in a collective
    if stopped is None:
        return 0
    if trainer.first_rank:
        print(f"vlm: {stopped}", file=sys.stderr)
    return EXIT_STOPPED
