"""Captions of a batch at full size on one GPU: how many a second, and how near a step is to what memory allows.

    python tests/benches/bench_generation.py --output tests/benches/results/generation_nvidia-h200.json
    python tests/benches/bench_generation.py --tiny            any machine: does it run

Mistral-7B and CLIP ViT-L/14@336px with random weights in bf16; each prompt is a picture (576 tokens) and a caption's
question, each answer as long as it may be. `triton+graph` is what `vlm generate` does; `triton` launches the same step
kernel by kernel, and `torch` attends through PyTorch. A decoding step reads every weight once, but for the embedding,
and the keys and values so far: its floor is those bytes at the bandwidth of a copy.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_training_step import LANGUAGE, VISION, random_model, settings

from vlm import parallel
from vlm.generate.decode import Decoder, Prompt
from vlm.model import Llava

TEXT_TOKENS = 20
"""The caption's question of config/config.yaml between its [INST] and [/INST]."""
IMAGE_TOKEN = 10
NO_END = -1
GRAPH = "+graph"
FULL_LANGUAGE = LANGUAGE | {"num_hidden_layers": 32}
TINY_LANGUAGE = LANGUAGE | {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "num_hidden_layers": 2,
}
TINY_VISION = VISION | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 28,
}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_bandwidth(num_bytes: int) -> float:
    """Bytes read and written per second by a copy of `num_bytes`, the best of ten."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=parallel.device())
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        synchronise()
        started = time.perf_counter()
        target.copy_(source)
        synchronise()
        best = min(best, time.perf_counter() - started)
    return 2 * num_bytes / best


def captions(model: Llava, batch: int) -> list[Prompt]:
    draw = np.random.default_rng(batch)
    vision = model.vision_model
    prompts = []
    for _ in range(batch):
        text = draw.integers(20, model.language_model.sizes.vocab_size, TEXT_TOKENS).tolist()
        tokens = [*text[:3], *[IMAGE_TOKEN] * model.num_image_tokens, *text[3:]]
        prompts.append(Prompt(tokens, [draw.integers(0, 256, (3, vision.img_h, vision.img_w), np.uint8)]))
    return prompts


def bytes_of_step(model: Llava, batch: int, num_keys: float) -> tuple[int, int]:
    """What a step reads: of weights, and of `num_keys` keys and values of each sample."""
    language = model.language_model
    parameters = dict(language.named_parameters())
    embedding = language.embedding.word_embeddings.weight
    weights = sum(p.numel() * p.element_size() for p in parameters.values() if p is not embedding)
    config = language.config
    per_key = 2 * config.num_layers * config.num_query_groups * config.kv_channels * embedding.element_size()
    return weights, int(batch * num_keys * per_key)


def measure(model: Llava, contestant: str, batch: int, new_tokens: int, bandwidth: float) -> tuple[dict[str, Any], Any]:
    """A row of times, and the answers."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    decoder = Decoder(model, image_token_id=IMAGE_TOKEN, end=NO_END, graph=contestant.endswith(GRAPH))
    prompts = captions(model, batch)
    decoder.begin(prompts, new_tokens).advance()  # compiles, and takes memory
    synchronise()
    times = [time.perf_counter()]
    steps = decoder.begin(prompts, new_tokens)
    answers = [steps.tokens_B.clone()]
    synchronise()
    times.append(time.perf_counter())
    for _ in range(new_tokens - 1):
        steps.advance()
        answers.append(steps.tokens_B.clone())
    synchronise()
    times.append(time.perf_counter())
    prefill, decoding = times[1] - times[0], times[2] - times[1]
    step = decoding / (new_tokens - 1)
    prompt_tokens = len(prompts[0].tokens)
    weights, cache = bytes_of_step(model, batch, prompt_tokens + new_tokens / 2)
    row = {
        "contestant": contestant,
        "batch": batch,
        "layers": model.config.num_layers,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "captions_per_second": batch / (prefill + decoding),
        "prefill_seconds": prefill,
        "step_seconds": step,
        "weight_bytes": weights,
        "cache_bytes": cache,
        "copy_bytes_per_second": bandwidth,
        "share_of_weight_floor": weights / bandwidth / step,
        "share_of_floor": (weights + cache) / bandwidth / step,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton", "megatron-core")},
        "date": time.strftime("%Y-%m-%d"),
    }
    return row, torch.stack(answers, dim=1).tolist()


def run(contestants: Sequence[str], batches: Sequence[int], new_tokens: int, tiny: bool) -> list[dict[str, Any]]:
    """One model at a time; each row says which share of its tokens the first contestant gave, too."""
    parallel.initialize(None, 1234)
    bandwidth = copy_bandwidth(2**24 if tiny else 2**31)
    language, vision = (TINY_LANGUAGE, TINY_VISION) if tiny else (FULL_LANGUAGE, VISION)
    rows: list[dict[str, Any]] = []
    first: dict[int, Any] = {}
    for backend in dict.fromkeys(name.removesuffix(GRAPH) for name in contestants):
        model = random_model(language, vision, settings("sft", backend)).eval()
        for contestant in (name for name in contestants if name.removesuffix(GRAPH) == backend):
            for batch in batches:
                row, answers = measure(model, contestant, batch, new_tokens, bandwidth)
                row["same_tokens"] = float(np.mean(np.array(answers) == np.array(first.setdefault(batch, answers))))
                rows.append(row)
                print(
                    f"{contestant:14} B {batch:4}{row['captions_per_second']:9.1f} captions/s  prefill "
                    f"{row['prefill_seconds'] * 1e3:8.1f} ms  step {row['step_seconds'] * 1e3:7.2f} ms, "
                    f"{row['share_of_weight_floor']:.2f} of the weights' floor, {row['share_of_floor']:.2f} with the "
                    f"cache's  peak {row['peak_gib'] or 0:.1f} GiB  same tokens {row['same_tokens']:.3f}",
                    flush=True,
                )
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        del model
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestants", nargs="+", default=["triton+graph", "triton", "torch"])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="small sizes, also on a CPU, where nothing is captured")
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    contestants = given.contestants
    if not torch.cuda.is_available():
        if not given.tiny:
            raise SystemExit("bench_generation.py: needs a GPU, and PyTorch sees none; --tiny runs on a CPU")
        contestants = list(dict.fromkeys(name.removesuffix(GRAPH) for name in contestants))
    rows = run(contestants, given.batches, given.new_tokens, given.tiny)
    if given.output:
        given.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
