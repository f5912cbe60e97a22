"""`vlm train`: one stage, from its parent's checkpoint or from where it stopped, to its last iteration."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from vlm import config as configuration
from vlm.train.plan import prepare

_NOISE = (
    "(Transformer Engine and )?Apex (is|are) not installed",  # one per module of megatron-core that has another way
    "full scope is deprecated",  # megatron-core about the default of its own cuda_graph_scope
    "`load_state_dict` is deprecated",  # megatron-core about its own call of torch
)
"""Warnings that no setting of ours can heed."""


def run(config: Path, stage: str, start_from: Path, data: Path, out: Path) -> int:
    """Train a stage; go on from `out/checkpoints/latest` if that is the same run, and do nothing if it is finished.

    Args:
        config: resolved settings.
        stage: its name under `stages`.
        start_from: checkpoint, or folder of the stage before.
        data: holds one indexed folder per data set.
        out: gets `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `rejected.json` and, at the end, `finished.json`.
            What another run (other settings, parent or data) left there is moved to `out/previous-<hash8>`.

    Returns:
        0, or 1 where loss or gradient were not finite.

    Raises:
        ValueError, FileNotFoundError: what was asked cannot be done; said before the first step.
    """
    plan = prepare(configuration.load(config), stage, start_from, data, out)
    if (checkpoint := plan.finished()) is not None:
        print(f"{stage}: already finished, {checkpoint} is its last checkpoint", file=sys.stderr)
        return 0

    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    from vlm.train.step import NonFiniteError  # torch, megatron-core and Energon: 4 s
    from vlm.train.trainer import Trainer

    try:
        with Trainer(plan) as trainer:
            trainer.train()
    except NonFiniteError as error:
        print(f"vlm: {error}", file=sys.stderr)
        return 1
    return 0
