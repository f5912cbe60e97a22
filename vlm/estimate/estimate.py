"""All figures of a run, as one tree of plain values that is printed as a table or as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm.config import Config, Parallel
from vlm.estimate import layouts
from vlm.resources import Bases, Gpu, jobs, memory, parameters, speed, storage, workload

DAY = 24 * 60 * 60


@dataclass(frozen=True)
class Question:
    """What is asked about."""

    config: Config
    bases: Bases
    gpu: Gpu
    per_node: int
    """GPUs of a machine."""
    results: Path
    mfu: float | None = None
    metrics: Path | None = None

    def efficiency(self, stage: str) -> speed.Efficiency:
        return speed.efficiency(self.config, stage, stated=self.mfu, metrics=self.metrics)


def estimate(question: Question) -> dict[str, Any]:
    """Figures of the whole run.

    Raises:
        ValueError: the base models cannot be split as the layout says.
    """
    config, bases, gpu = question.config, question.bases, question.gpu
    bases.check(config.parallel)
    counts = parameters.of_parts(bases, config)
    stages = {stage: _stage(question, stage) for stage in config.ordered_stages}
    return {
        "run": config.run,
        "gpu": {"name": gpu.name, "memory_bytes": gpu.memory_bytes, "usable_bytes": gpu.usable_bytes},
        "layout": _layout(config.parallel),
        "models": dict(bases.found),
        "backend": config.kernels.backend,
        "dtype": config.dtype,
        "parameters": {part: count.total for part, count in counts.items()},
        "stages": stages,
        "fits": all(stage["fits"] for stage in stages.values()),
        "days": sum(stage["days"] for stage in stages.values()),
        "smallest_layout": _smallest(question, list(stages)),
        "disk": _disk(question),
    }


def _layout(parallel: Parallel) -> dict[str, Any]:
    return {**parallel.model_dump(), "gpus": parallel.world_size, "data": parallel.data}


def _smallest(question: Question, stages: list[str]) -> dict[str, Any] | None:
    found = layouts.smallest(question.config, question.bases, question.gpu, question.per_node, stages)
    if found is None:
        return None
    return {**_layout(found.config.parallel), "peak_bytes": found.peak_bytes, "days": found.seconds / DAY}


def _stage(question: Question, stage: str) -> dict[str, Any]:
    config, bases, gpu = question.config, question.bases, question.gpu
    settings = config.stages[stage]
    counts = parameters.of_parts(bases, config)
    trained = sum(counts[part].total for part in settings.trainable)
    stages = memory.of_training(config, stage, bases)
    held = max(stages, key=lambda one: one.total)
    other = layouts.with_layout(config, recompute=not config.parallel.recompute)
    efficiency = question.efficiency(stage)
    step = speed.of_training(config, stage, bases, gpu, efficiency)
    sequence = workload.of_sequence(config, stage, bases)
    sequences = settings.iterations * settings.global_batch
    checkpoints = storage.of_stage(config, stage, bases)
    return {
        "trainable": list(settings.trainable),
        "trainable_parameters": trained,
        "frozen_parameters": sum(count.total for count in counts.values()) - trained,
        "memory": {**asdict(held), "total": held.total},
        "pipeline_stage": stages.index(held),
        "fits": held.total <= gpu.usable_bytes,
        "recompute": config.parallel.recompute,
        "total_with_recompute_changed": memory.peak(other, stage, bases).total,
        "logits_avoided_bytes": memory.logits_avoided(config, stage, bases),
        "smallest_layout": _smallest(question, [stage]),
        "flops_per_step": step.flops,
        "efficiency": asdict(efficiency),
        "compute_seconds": step.compute_seconds,
        "waiting_seconds": step.waiting_seconds,
        "seconds_per_step": step.seconds,
        "tokens_per_second": settings.global_batch * sequence.tokens / step.seconds,
        "tokens_per_sample": sequence.tokens / sequence.samples,
        "iterations": settings.iterations,
        "days": settings.iterations * step.seconds / DAY,
        "samples": round(sequences * sequence.samples),
        "epochs": _epochs(question, stage, sequences * sequence.samples),
        "checkpoint_bytes": checkpoints.each,
        "checkpoints": checkpoints.number,
        "job": asdict(jobs.of_training(config, stage, bases, gpu, efficiency)),
    }


def _epochs(question: Question, stage: str, samples: float) -> dict[str, dict[str, Any]]:
    """By data set: times that each of its samples is seen, None where nobody knows how many there are."""
    settings = question.config.stages[stage]
    total = sum(settings.data.values())
    found = {}
    for name, weight in settings.data.items():
        there = workload.of_set(question.config, name, question.results)
        epochs = samples * weight / total / there.num_samples if there.num_samples else None
        found[name] = {"samples": there.num_samples, "found": there.found, "epochs": epochs}
    return found


def _disk(question: Question) -> list[dict[str, Any]]:
    """A row per folder: what, how many bytes at most, None where nobody knows."""
    config, bases = question.config, question.bases
    models = storage.base_models(bases, config)
    rows: list[tuple[str, int | None]] = [
        (f"base model, {part}: {getattr(config.models, part).source}", size) for part, size in models.items()
    ]
    rows += [(f"convert/{part}", size) for part, size in models.items()]
    rows.append(("convert/combined", storage.combined(bases, config)))
    for name, data in config.data.sets.items():
        if config.miniature is None:
            rows.append((f"source of {name}", storage.fetched(data.source)))
            rows += [
                (f"source of {name}: {where}", storage.fetched(origins)) for where, origins in data.image_sets.items()
            ]
        rows.append((f"data/{name}, shards", storage.shards(config, name, question.results)))
    if config.miniature is None:
        for name, source in (("captions", config.evaluation.captions), ("mmmu", config.evaluation.mmmu)):
            rows.append((f"source of {name}", storage.fetched(source.source)))
    for stage in config.ordered_stages:
        rows.append((f"train/{stage}, checkpoints", storage.of_stage(config, stage, bases).total))
    if config.export:
        rows.append(("export", storage.combined(bases, config)))
    return [{"what": what, "bytes": size} for what, size in rows]
