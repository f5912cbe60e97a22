"""Which layouts a run could have, and which is the smallest that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlm import config as configuration
from vlm.config import Config
from vlm.resources import Bases, Gpu, memory, speed

MOST_GPUS = 256


@dataclass(frozen=True)
class Candidate:
    """A configuration with one layout."""

    config: Config
    peak_bytes: int
    """Of the fullest GPU in the stages that were asked about."""
    seconds: float
    """Of all their steps."""


def with_layout(config: Config, **layout: Any) -> Config:
    """The configuration with some keys of `parallel` changed.

    Raises:
        ValueError: as `vlm.config.validate`.
    """
    tree = config.model_dump(mode="json")
    return configuration.validate({**tree, "parallel": {**tree["parallel"], **layout}})


def candidates(config: Config, bases: Bases, gpu: Gpu, gpus: int, per_node: int, stages: list[str]) -> list[Candidate]:
    """Every layout of so many GPUs that the models, the batches and the sequences can be split by."""
    found = []
    for layout in _layouts(gpus, per_node):
        try:
            changed = with_layout(config, **layout)
            bases.check(changed.parallel)
        except ValueError:  # it does not divide
            continue
        peak = max(memory.peak(changed, stage, bases).total for stage in stages)
        seconds = sum(
            speed.of_training(changed, stage, bases, gpu, speed.efficiency(changed, stage)).seconds
            * changed.stages[stage].iterations
            for stage in stages
        )
        found.append(Candidate(changed, peak, seconds))
    return found


def _layouts(gpus: int, per_node: int) -> Iterator[dict[str, Any]]:
    """Simple ones first. Tensor-parallel ranks stay within a machine."""
    shape = {"nodes": max(1, gpus // per_node), "ranks_per_node": min(gpus, per_node)}
    for pipeline in _powers(gpus):
        for tensor in _powers(shape["ranks_per_node"]):
            if gpus % (tensor * pipeline):
                continue
            for recompute in (False, True):
                for sequence in (False, True)[: min(tensor, 2)]:
                    yield {
                        **shape,
                        "tensor": tensor,
                        "pipeline": pipeline,
                        "sequence": sequence,
                        "distributed_optimizer": gpus > tensor * pipeline,
                        "recompute": recompute,
                    }


def _powers(most: int) -> Iterator[int]:
    """1, 2, 4, .. up to `most`."""
    power = 1
    while power <= most:
        yield power
        power *= 2


def best(found: list[Candidate], gpu: Gpu) -> Candidate | None:
    """The fastest that fits, the simplest of equals; None where none fits."""
    fitting = [one for one in found if one.peak_bytes <= gpu.usable_bytes]
    return min(fitting, key=lambda one: one.seconds, default=None)


def smallest(config: Config, bases: Bases, gpu: Gpu, per_node: int, stages: list[str]) -> Candidate | None:
    """The fastest layout of the fewest GPUs that fit, or None up to `MOST_GPUS`. Numbers of GPUs are powers of two up
    to a machine, then whole machines."""
    numbers = [number for number in _powers(per_node) if number < per_node]
    numbers += [per_node * nodes for nodes in _powers(MOST_GPUS // per_node)]
    for number in numbers:
        if (found := best(candidates(config, bases, gpu, number, per_node, stages), gpu)) is not None:
            return found
    return None
