"""How long a training step takes: its operations at a share of the GPU's peak, and what ranks wait for each other.

    step = (m + p - 1) / p * (operations of a micro-batch / (t * peak * share) + all-reduces of the layers) + gradients

with m micro-batches per data-parallel rank, t tensor-parallel ranks and p pipeline stages: the pipeline's bubble is
p - 1 micro-batches (Narayanan et al., arXiv:2104.04473, section 2.2). A layer sums its activations over the
tensor-parallel ranks twice forward and twice backward (Shoeybi et al., arXiv:1909.08053, section 3), in a ring that
moves 2 (t - 1) / t of them; gradients once per step over the data-parallel ranks. Nothing of this is overlapped, and
what ranks wait for was not measured: links are taken at a share of what their data sheets state.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from vlm.config import Config
from vlm.model import flops
from vlm.resources import parameters
from vlm.resources.bases import Bases
from vlm.resources.gpus import Gpu
from vlm.resources.memory import FP32
from vlm.resources.workload import of_sequence

MEASURED = {
    ("triton", False): 0.588,
    ("transformer_engine", False): 0.472,
    ("triton", True): 0.515,
    ("transformer_engine", True): 0.455,
}
"""Share of the peak (model FLOPs, MFU) by backend and whether the language model learns: one H200, one rank, mean
of the runs in tests/benches/results/training_step_nvidia-h200.json."""
ASSUMED = 0.3
"""Of a backend that was not measured."""
LINK_SHARE = 0.8
NETWORK_BYTES_PER_SECOND = 50e9
"""Between machines, per GPU: a 400 Gb/s adapter each."""


@dataclass(frozen=True)
class Efficiency:
    """Share of the GPU's peak that the model's own operations reach, in layers without communication."""

    share: float
    found: str
    """Where it comes from, in words."""


@dataclass(frozen=True)
class Speed:
    """A training step."""

    flops: int
    """Of the model, over all GPUs; recomputation is not counted."""
    compute_seconds: float
    """On each GPU, recomputation included."""
    waiting_seconds: float
    """For tensor- and data-parallel ranks, and for the pipeline to fill and drain."""
    efficiency: Efficiency

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.waiting_seconds


def efficiency(config: Config, stage: str, *, stated: float | None = None, metrics: Path | None = None) -> Efficiency:
    """The share to count with: stated, measured in a run of one rank, or that of the bench.

    Args:
        stated: share of the peak, 0 to 1.
        metrics: `metrics.jsonl` of a stage like this one on the same kind of GPU.

    Raises:
        ValueError: a share that is none, or a file without an `mfu`.
    """
    if stated is not None:
        if not 0 < stated <= 1:
            raise ValueError(f"--mfu: {stated} is not a share of the peak, which is above 0 and at most 1")
        return Efficiency(stated, "as stated")
    if metrics is not None:
        lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
        shares = [line["mfu"] for line in lines if "mfu" in line]
        if not shares:
            raise ValueError(f"{metrics}: has no line with an mfu, which only runs on a known GPU in bfloat16 write")
        return Efficiency(median(shares), f"median of {metrics}")
    backend = config.kernels.backend
    share = MEASURED.get((backend, "language" in config.stages[stage].trainable))
    if share is None:
        return Efficiency(ASSUMED, f"assumed, {backend} was not measured")
    return Efficiency(share, f"measured on one H200 with {backend}")


def of_training(config: Config, stage: str, bases: Bases, gpu: Gpu, share: Efficiency) -> Speed:
    """Time of a step on so many of these GPUs as the layout of the configuration has."""
    settings, parallel = config.stages[stage], config.parallel
    sequence = of_sequence(config, stage, bases)
    cost = flops.count(
        bases.language,
        bases.vision,
        projector_size=config.models.projector.hidden_size,
        feature_layer=config.models.vision.feature_layer,
        trainable=settings.trainable,
    )
    of_micro_batch = cost(
        tokens=round(sequence.tokens),
        pairs=round(sequence.pairs),
        images=round(sequence.pictures),
        trained_tokens=round(sequence.trained_tokens),
    )
    again = 0.0
    if parallel.recompute:  # the layers forward once more, beside forward and one or two passes backward
        passes = 2 + ("language" in settings.trainable)
        again = cost.per_token * sequence.tokens / passes + cost.per_pair * sequence.pairs / 3
    micro_batches = settings.global_batch // parallel.data
    ranks = parallel.tensor * parallel.pipeline
    compute = micro_batches * (of_micro_batch + again) / (ranks * gpu.peak(config.dtype) * share.share)
    layers = micro_batches * _layers(config, bases, sequence.slots, gpu)
    bubble = (parallel.pipeline - 1) / micro_batches * (compute + layers)
    waiting = layers + bubble + _gradients(config, stage, bases, gpu)
    return Speed(settings.global_batch * of_micro_batch, compute, waiting, share)


def _ring(num_bytes: float, ranks: int, link: float) -> float:
    """Seconds of an all-reduce."""
    return 2 * (ranks - 1) / ranks * num_bytes / (link * LINK_SHARE)


def _layers(config: Config, bases: Bases, slots: int, gpu: Gpu) -> float:
    """Of one micro-batch on a rank of one pipeline stage."""
    parallel, sizes = config.parallel, bases.language
    activations = slots * sizes.hidden_size * (2 if config.dtype == "bfloat16" else 4)
    times = (6 if parallel.recompute else 4) * sizes.num_layers / parallel.pipeline
    return times * _ring(activations, parallel.tensor, _link(parallel.tensor, config, gpu))


def _gradients(config: Config, stage: str, bases: Bases, gpu: Gpu) -> float:
    parallel, settings = config.parallel, config.stages[stage]
    counts = parameters.of_stage(bases, config, parallel, 0)
    trained = sum(count.on(parallel.tensor) for part, count in counts.items() if part in settings.trainable)
    return _ring(trained * FP32, parallel.data, _link(parallel.world_size, config, gpu))


def _link(ranks: int, config: Config, gpu: Gpu) -> float:
    """Of so many neighbouring ranks: within a machine, or else the network."""
    inside = ranks <= config.parallel.ranks_per_node
    return gpu.link_bytes_per_second if inside else NETWORK_BYTES_PER_SECOND
