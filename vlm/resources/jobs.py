"""What the workflow's jobs ask a cluster for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vlm.config import Config
from vlm.resources import parameters, speed, storage
from vlm.resources.bases import Bases
from vlm.resources.gpus import Gpu
from vlm.resources.memory import FP32

MB = 10**6
PROCESS_BYTES = 6 * 10**9
"""Of a process that imports torch and megatron-core and holds a CUDA context."""
WORKER_BYTES = 1.5 * 10**9
"""Of a loader's process, its buffers included."""
STREAMING_BYTES = 8 * 10**9
"""Of a step that goes over the weights one by one: 6 GB at most (vlm.convert), and what surrounds it."""
WRITING_BYTES_PER_SECOND = 200 * 10**6
"""Of a network file system, for a process that reads and writes."""
DECODING_SECONDS = 0.05
"""Of one token for a whole batch, a 7B model; not measured."""
SETTING_UP_MINUTES = 15
LATE = 1.25
"""Time asked for over time expected."""
QUESTIONS = {"captions": 5000, "captions_shuffled": 5000, "mmmu": 900, "vqav2": 214_354}
"""Items of a task, the largest of the short-answer benchmarks among them; of the others at most `OTHERS`."""
OTHERS = 10_000
Step = Literal["convert_language", "convert_vision", "combine", "verify", "export"]


@dataclass(frozen=True)
class Resources:
    """What a job asks for."""

    nodes: int
    gpus_per_node: int
    cpus_per_task: int
    """Per node: it has one task, which starts the ranks."""
    mem_mb: int
    """Of the host, per node, in 10^6 bytes."""
    disk_mb: int
    """What the job adds to `results/`."""
    runtime_minutes: int
    """From its beginning to its end, if nothing interrupts it. May be more than a partition allows; a training that is
    stopped goes on."""


def of_training(
    config: Config, stage: str, bases: Bases, gpu: Gpu, efficiency: speed.Efficiency | None = None
) -> Resources:
    """A stage's training. Whether it fits is for `vlm.resources.memory` to say.

    Host memory is that of the ranks and their loaders' workers, and the checkpoint that is written from memory while
    training goes on: once, or twice where the distributed optimizer's state is gathered first.

    Args:
        efficiency: by default that of the bench.

    Raises:
        ValueError: the base models cannot be split as the layout says.
    """
    bases.check(config.parallel)
    settings, parallel = config.stages[stage], config.parallel
    step = speed.of_training(config, stage, bases, gpu, efficiency or speed.efficiency(config, stage))
    checkpoints = storage.of_stage(config, stage, bases)
    copies = 2 if parallel.distributed_optimizer else 1
    loaders = max(1, parallel.ranks_per_node // (parallel.tensor * parallel.pipeline))
    memory = (
        parallel.ranks_per_node * PROCESS_BYTES
        + loaders * config.data.workers * WORKER_BYTES
        + copies * checkpoints.each
    )
    return Resources(
        nodes=parallel.nodes,
        gpus_per_node=parallel.ranks_per_node,
        cpus_per_task=2 * parallel.ranks_per_node + loaders * config.data.workers,
        mem_mb=_mb(memory),
        disk_mb=_mb(checkpoints.total),
        runtime_minutes=SETTING_UP_MINUTES + math.ceil(settings.iterations * step.seconds * LATE / 60),
    )


def of_conversion(config: Config, step: Step, bases: Bases) -> Resources:
    """A step that reads weights and writes them elsewhere, or compares them with `transformers` in fp32 on a GPU."""
    models = storage.base_models(bases, config)
    whole = storage.combined(bases, config)
    written = {
        "convert_language": models["language"],
        "convert_vision": models["vision"],
        "combine": whole,
        "verify": 0,
        "export": whole,
    }[step]
    memory = STREAMING_BYTES
    if step == "verify":  # their model before it is on the GPU, and as much for what it is read from
        memory += 2 * FP32 * sum(count.total for count in parameters.of_parts(bases, config).values())
    minutes = math.ceil(2 * max(written, whole if step == "verify" else 0) / WRITING_BYTES_PER_SECOND / 60)
    return Resources(
        nodes=1,
        gpus_per_node=int(step == "verify"),
        cpus_per_task=4,
        mem_mb=_mb(memory),
        disk_mb=_mb(written),
        runtime_minutes=SETTING_UP_MINUTES + minutes,
    )


def of_generation(config: Config, task: str, bases: Bases) -> Resources:
    """One task's answers by one model, on one GPU.

    Args:
        task: `captions`, `captions_shuffled`, `dialogue`, `mmmu` or a benchmark of `evaluation`.

    Raises:
        ValueError: the configuration has no such task.
    """
    evaluation = config.evaluation
    lengths = {name: benchmark.max_new_tokens for name, benchmark in evaluation.benchmarks.items()}
    for name in ("captions", "dialogue", "mmmu"):
        lengths[name] = getattr(evaluation, name).max_new_tokens
    lengths["captions_shuffled"] = lengths["captions"]
    if task not in lengths:
        raise ValueError(f"task: {task!r} does not exist, allowed are {', '.join(sorted(lengths))}")
    items = QUESTIONS.get(task, OTHERS)
    if task == "dialogue":
        items = evaluation.dialogue.num_images * len(evaluation.dialogue.questions)
    steps = math.ceil(items / evaluation.batch_size) * lengths[task]
    weights = sum(count.total for count in parameters.of_parts(bases, config).values())
    return Resources(
        nodes=1,
        gpus_per_node=1,
        cpus_per_task=8,
        mem_mb=_mb(PROCESS_BYTES + weights * (2 if config.dtype == "bfloat16" else 4)),
        disk_mb=100,
        runtime_minutes=SETTING_UP_MINUTES + math.ceil(steps * DECODING_SECONDS * LATE / 60),
    )


def _mb(num_bytes: float) -> int:
    return math.ceil(num_bytes / MB)
