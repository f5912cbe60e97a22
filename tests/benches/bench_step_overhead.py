"""What the trainer's step costs beyond megatron-core's own: the miniature's stages, against a bare loop in one process.

    python tests/benches/bench_step_overhead.py [--pairs 60]

Both train a copy of the same model on the same batches, with the same schedule, mcore's and optimizer; the bare loop
does nothing else, the trainer's also takes its batches from a feed, reduces, reports and watches for signals. They take
turns step by step, so that whatever else the machine does slows both. Then the peak memory of each stage, each in a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
import yaml
from megatron.core.pipeline_parallel import get_forward_backward_func
from snakemake.utils import update_config

from vlm import config as configuration
from vlm import model, parallel
from vlm.batch import PackedBatch, Sample, pack
from vlm.config import Config
from vlm.model import flops
from vlm.model.sizes import language_sizes, vision_sizes
from vlm.train import optimizer as optimizers
from vlm.train.metrics import Meter, Reporter, Totals
from vlm.train.step import Step
from vlm.train.stop import Stop

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("pretrain", "sft")
WARM_UP = 5
NUM_BATCHES = 16
PEAK_STEPS = 10


def settings() -> Config:
    tree = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    update_config(tree, yaml.safe_load((ROOT / "config/tiny.yaml").read_text()))
    return configuration.validate(tree)


def base_models(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    sources = config.models.language.source, config.models.vision.source
    language, vision = (json.loads((ROOT / source / "config.json").read_text()) for source in sources)
    return language, vision


def batches(config: Config, stage: str) -> list[PackedBatch]:
    """Random conversations about a picture each, of the miniature's lengths: 64 image tokens and 20 to 60 of text."""
    language, vision = base_models(config)
    sizes, draw = vision_sizes(vision), np.random.default_rng(0)
    length, patches = config.stages[stage].sequence_length, sizes.num_image_tokens
    name = next(iter(config.stages[stage].data))
    packed = []
    for _ in range(NUM_BATCHES):
        samples: list[Sample] = []
        while (room := length - sum(map(len, samples))) >= patches + 60:
            text = int(draw.integers(20, 60))
            tokens = draw.integers(20, language["vocab_size"], min(patches + text, room))
            trained = np.arange(len(tokens)) >= len(tokens) - text // 2
            samples.append(Sample(tokens, trained, np.arange(3, 3 + patches)))
        shape = (len(samples), 3, sizes.image_size, sizes.image_size)
        pictures = list(draw.integers(0, 256, shape, np.uint8))
        keys = [f"{name}/{number}" for number in range(len(samples))]
        packed.append(pack(samples, pictures, keys, length, sizes.image_size))
    return packed


def build(config: Config, stage: str) -> tuple[Any, Any, Any]:
    """The stage's model with random weights, in mcore's DDP, with its optimizer and schedule."""
    torch.manual_seed(0)
    built = model.build(*base_models(config), config)
    built.freeze(config.stages[stage].trainable)
    built.train()
    wrapped = optimizers.wrap(built, distributed_optimizer=config.parallel.distributed_optimizer)
    return wrapped, *optimizers.build(wrapped, config, config.stages[stage])


def bare(config: Config, stage: str, stream: Iterator[PackedBatch]) -> Callable[[], None]:
    """A step of megatron-core and nothing else."""
    wrapped, optimizer, schedule = build(config, stage)

    def loss(losses_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total = losses_R.sum()
        return total, torch.tensor(losses_R.numel(), dtype=torch.int), total.detach()

    def forward(iterator: Iterator[PackedBatch], model: Any) -> tuple[torch.Tensor, Any]:
        return model(next(iterator)), loss

    forward_backward = partial(
        get_forward_backward_func(),
        forward_step_func=forward,
        data_iterator=stream,
        model=[wrapped],
        num_microbatches=config.stages[stage].global_batch,
        seq_length=config.stages[stage].sequence_length,
        micro_batch_size=1,
    )

    def step() -> None:
        schedule.step(1)
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward()
        optimizer.step()

    return step


class Ours:
    """A step as `vlm.train.trainer` takes and reports it."""

    def __init__(self, config: Config, stage: str, stream: Iterator[PackedBatch], out: Path, stop: Stop) -> None:
        self.stage, self.stop = config.stages[stage], stop
        wrapped, self.optimizer, self.schedule = build(config, stage)
        self.step = Step(
            wrapped,
            self.optimizer,
            stream,
            num_micro_batches=self.stage.global_batch,
            sequence_length=self.stage.sequence_length,
            device=parallel.device(),
            sets=tuple(self.stage.data),
        )
        language, vision = base_models(config)
        cost = flops.count(
            language_sizes(language),
            vision_sizes(vision),
            projector_size=config.models.projector.hidden_size,
            feature_layer=config.models.vision.feature_layer,
            trainable=self.stage.trainable,
        )
        self.meter, self.totals, self.iteration = Meter(cost, 1, None), Totals(), 0
        self.reporter = Reporter(out, start=0, iterations=10**6, description=stage)

    def __call__(self) -> None:
        assert not self.stop.code
        self.schedule.step(1)
        outcome = self.step()
        self.stop.stepped(outcome.seconds)
        self.iteration += 1
        self.totals.add(outcome)
        self.reporter.advance(outcome)
        if self.iteration % self.stage.log_interval == 0:
            rate = optimizers.learning_rate(self.optimizer)
            self.reporter.write(self.totals.line(self.iteration, outcome, rate, self.meter, peak_bytes()))


def peak_bytes() -> int:
    """Of the GPU, or of all of this process; getrusage would also count what started it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) * 1024


def seconds(step: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(config: Config, stage: str, pairs: int) -> str:
    """A row of the table."""
    given = batches(config, stage)
    with tempfile.TemporaryDirectory() as folder, Stop(budget_seconds=1e6) as stop:
        contestants = Ours(config, stage, cycle(given), Path(folder), stop), bare(config, stage, cycle(given))
        times: list[list[float]] = [[], []]
        for number in range(WARM_UP + pairs):
            for index in (0, 1) if number % 2 else (1, 0):
                taken = seconds(contestants[index])
                if number >= WARM_UP:
                    times[index].append(taken)
        contestants[0].reporter.close()
    low, middle, high = quantiles([ours / theirs for ours, theirs in zip(*times, strict=True)], n=4)
    ours, theirs = (median(several) * 1e3 for several in times)
    return (
        f"{stage:10}{ours:12.1f}{theirs:12.1f}{ours / theirs:10.3f}"
        f"{middle:14.3f} ({low:.3f} to {high:.3f}, {pairs} pairs)"
    )


def peak_of(config: Config, stage: str) -> tuple[int, int]:
    """Peak memory of this process in bytes, before the model is built and after some steps."""
    before = peak_bytes()
    with tempfile.TemporaryDirectory() as folder, Stop() as stop:
        step = Ours(config, stage, cycle(batches(config, stage)), Path(folder), stop)
        for _ in range(PEAK_STEPS):
            step()
        step.reporter.close()
    return before, peak_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60, help="timed steps of each")
    parser.add_argument("--peak-of", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # as the miniature trains
    config = settings()
    parallel.initialize(config.parallel, config.seed)
    if arguments.peak_of:
        print(*peak_of(config, arguments.peak_of))
        return
    print(f"{'':10}{'ours, ms':>12}{'bare, ms':>12}{'ratio':>10}{'by pair':>14}")
    for stage in STAGES:
        print(compare(config, stage, arguments.pairs), flush=True)
    print(f"\n{'':10}{'peak, MB':>12}{'of that before the model, MB':>32}")
    for stage in STAGES:
        command = [sys.executable, __file__, f"--peak-of={stage}"]
        found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        before, peak = (int(value) / 1e6 for value in found.stdout.splitlines()[-1].split())
        print(f"{stage:10}{peak:12.0f}{before:32.0f}", flush=True)


if __name__ == "__main__":
    main()
