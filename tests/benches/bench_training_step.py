"""A whole training step at full size on one GPU: our kernels beside Transformer Engine's, and where the time goes.

    python tests/benches/bench_training_step.py --stage pretrain
    python tests/benches/bench_training_step.py --stage sft --layers 16      as many as fit with an optimizer
    python tests/benches/bench_training_step.py --stage pretrain --profile     what takes the time, when the GPU waits

Mistral-7B and CLIP ViT-L/14@336px with random weights, config/config.yaml's stage on one rank, packed sequences of
captions of about 610 tokens (576 of them image), or of conversations for SFT. Every backend trains the same model on
the same batches; the first is measured again at the end, which shows how far two measurements of one thing differ.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import time
import warnings
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml

from vlm import config as configuration
from vlm import model, parallel
from vlm.batch import PackedBatch, Sample, pack
from vlm.config import Config
from vlm.model import flops
from vlm.model.sizes import language_sizes, vision_sizes
from vlm.train import optimizer as optimizers
from vlm.train.step import Step

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 3
MICRO_BATCHES = 2
NUM_BATCHES = 8
TEXT_TOKENS = {"pretrain": (20, 60), "sft": (60, 700)}
"""Least and most tokens of text beside a picture: captions, and conversations of several turns."""
ANSWERS = {"pretrain": 0.7, "sft": 0.6}
"""Share of the text that is trained."""
LANGUAGE = {
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
    "rope_theta": 1e6,
    "sliding_window": None,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
}
VISION = {
    "architectures": ["CLIPVisionModel"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
}


def settings(stage: str, backend: str) -> Config:
    tree = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    tree["parallel"] |= {"nodes": 1, "ranks_per_node": 1, "tensor": 1, "distributed_optimizer": False}
    tree["kernels"]["backend"] = backend
    tree["stages"][stage]["global_batch"] = MICRO_BATCHES
    return configuration.validate(tree)


def batches(config: Config, stage: str) -> list[PackedBatch]:
    draw, length = np.random.default_rng(0), config.stages[stage].sequence_length
    patches = vision_sizes(VISION).num_image_tokens
    low, high = TEXT_TOKENS[stage]
    packed = []
    for _ in range(NUM_BATCHES):
        samples: list[Sample] = []
        while (room := length - sum(map(len, samples))) >= patches + low:
            text = min(int(draw.integers(low, high)), room - patches)
            tokens = draw.integers(20, LANGUAGE["vocab_size"], patches + text)
            trained = np.arange(len(tokens)) >= len(tokens) - int(text * ANSWERS[stage])
            samples.append(Sample(tokens, trained, np.arange(3, 3 + patches)))
        pictures = list(draw.integers(0, 256, (len(samples), 3, 336, 336), np.uint8))
        keys = [f"{next(iter(config.stages[stage].data))}/{number}" for number in range(len(samples))]
        packed.append(pack(samples, pictures, keys, length, 336).pin_memory())  # as the loader does
    return packed


def random_model(language: dict[str, Any], vision: dict[str, Any], config: Config) -> model.Llava:
    """A model of these sizes, made on the device where it computes."""
    torch.manual_seed(0)
    built = model.build(language, vision, config, initialise=False)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.normal_(std=0.02)
    return built


class Contestant:
    """A stage with one backend, and what its steps took."""

    def __init__(self, stage: str, backend: str, num_layers: int) -> None:
        config = settings(stage, backend)
        language = LANGUAGE | {"num_hidden_layers": num_layers}
        built = random_model(language, VISION, config)
        built.freeze(config.stages[stage].trainable)
        built.train()
        wrapped = optimizers.wrap(built)
        optimizer, self.schedule = optimizers.build(wrapped, config, config.stages[stage])
        given = batches(config, stage)
        self.step = Step(
            wrapped,
            optimizer,
            cycle(given),
            num_micro_batches=MICRO_BATCHES,
            sequence_length=config.stages[stage].sequence_length,
            device=parallel.device(),
            sets=tuple(config.stages[stage].data),
        )
        self.cost = flops.count(
            language_sizes(language),
            vision_sizes(VISION),
            projector_size=config.models.projector.hidden_size,
            feature_layer=config.models.vision.feature_layer,
            trainable=config.stages[stage].trainable,
        )

    def __call__(self) -> Any:
        self.schedule.step(1)
        return self.step()


def measure(stage: str, backend: str, num_layers: int, steps: int, profile: bool) -> dict[str, Any]:
    contestant = Contestant(stage, backend, num_layers)
    for _ in range(WARM_UP):
        contestant()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times, outcomes = [], []
    for _ in range(steps):
        started = time.perf_counter()
        outcomes.append(contestant())
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    operations = median(
        contestant.cost(tokens=o.tokens, pairs=o.pairs, images=o.images, trained_tokens=o.trained_tokens)
        for o in outcomes
    )
    seconds, outcome = median(times), outcomes[-1]
    row = {
        "stage": stage,
        "backend": backend,
        "layers": num_layers,
        "gpu": torch.cuda.get_device_name(),
        "seconds": seconds,
        "tokens_per_second": median(o.tokens for o in outcomes) / seconds,
        "samples_per_second": median(o.samples for o in outcomes) / seconds,
        "mfu": operations / seconds / (flops.peak(torch.cuda.get_device_name(), "bfloat16") or float("nan")),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss": outcome.loss_sum / outcome.trained_tokens,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton", "megatron-core")},
        "date": time.strftime("%Y-%m-%d"),
    }
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            contestant()
            torch.cuda.synchronize()
        print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90))
        print(idle(profiler, longest=12))
    return row


def idle(profiler: torch.profiler.profile, longest: int) -> str:
    """How long the GPU had nothing to do within the profiled step, and the `longest` of those gaps."""
    events = [one for one in profiler.events() or () if one.device_type == torch.autograd.DeviceType.CUDA]
    runs = sorted((one.time_range.start, one.time_range.end, one.name) for one in events)
    first, end, last = runs[0]
    gaps = []
    for start, stop, name in runs[1:]:
        if start > end:
            gaps.append((start - end, end - first, last, name))
        if stop > end:
            end, last = stop, name
    lines = [f"idle {sum(gap for gap, *_ in gaps) / 1e3:.1f} of {(end - first) / 1e3:.1f} ms; the longest gaps:"]
    for gap, at, before, after in sorted(gaps, reverse=True)[:longest]:
        lines.append(f"{gap / 1e3:8.2f} ms at {at / 1e3:8.2f}  after {before[:60]}, before {after[:60]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("pretrain", "sft"), default="pretrain")
    parser.add_argument("--layers", type=int, default=32, help="of the language model")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--backends", nargs="+", default=["triton", "transformer_engine"])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if not torch.cuda.is_available():
        raise SystemExit("bench_training_step.py: needs a GPU, and PyTorch sees none")
    parallel.initialize(None, 1234)
    rows = []
    again = arguments.backends[:1] if len(arguments.backends) > 1 else []
    for backend in [*arguments.backends, *again]:
        row = measure(arguments.stage, backend, arguments.layers, arguments.steps, arguments.profile)
        rows.append(row)
        print(
            f"{row['stage']:9}{row['layers']:3} layers {backend:20}{row['seconds'] * 1e3:9.1f} ms"
            f"{row['tokens_per_second']:9.0f} tokens/s{row['samples_per_second']:7.1f} samples/s  MFU {row['mfu']:.3f}"
            f"  peak {row['peak_gib']:.1f} GiB  loss {row['loss']:.4f}",
            flush=True,
        )
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
