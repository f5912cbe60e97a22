"""What handing a batch to the other ranks of a model-parallel group costs, at the full recipe's size.

    torchrun --nproc-per-node 2 tests/benches/bench_sharing.py

One tensor-parallel group of all processes, over NCCL where there are GPUs and gloo otherwise. Batches are put together
beforehand: what is timed is the transfer alone. Refuses to print if any rank has other tensors than the first.
"""

from __future__ import annotations

import hashlib
import os
import time
from itertools import cycle

import numpy as np
import torch
from torch import distributed

from vlm import parallel
from vlm.batch import PackedBatch, Sample, pack
from vlm.config import Parallel
from vlm.train.feed import Feed
from vlm.train.sharing import is_builder

SEQUENCE, IMAGE_TOKENS, IMAGE_SIZE, NUM_SAMPLES = 9984, 576, 336, 16
ROUNDS = 100


def batch(seed: int) -> PackedBatch:
    draw = np.random.default_rng(seed)
    samples, pictures = [], []
    for _ in range(NUM_SAMPLES):
        tokens = draw.integers(0, 32768, IMAGE_TOKENS + int(draw.integers(25, 48)))
        trained = np.arange(len(tokens)) > len(tokens) - 15
        samples.append(Sample(tokens, trained, np.arange(3, 3 + IMAGE_TOKENS)))
        pictures.append(draw.integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE), np.uint8))
    return pack(samples, pictures, [f"pretrain/{seed:06d}-{i}" for i in range(NUM_SAMPLES)], SEQUENCE, IMAGE_SIZE)


def digest(shared: PackedBatch) -> str:
    tensors = [value.cpu().numpy().tobytes() for value in shared.tensors.values()]
    return hashlib.sha256(b"".join(tensors) + repr(shared.sample_keys).encode()).hexdigest()


def main() -> None:
    world = int(os.environ["WORLD_SIZE"])
    layout = Parallel(
        nodes=1,
        ranks_per_node=world,
        tensor=world,
        pipeline=1,
        sequence=False,
        distributed_optimizer=False,
        recompute=False,
    )
    parallel.initialize(layout, seed=1)
    device = parallel.device()
    made = [batch(seed) for seed in range(4)]
    if device.type == "cuda":
        made = [one.pin_memory() for one in made]
    feed = Feed(cycle(made) if is_builder() else None, device, ("pretrain",))
    found: list[list[str]] = [[] for _ in range(world)]
    distributed.all_gather_object(found, [digest(next(feed)) for _ in made])
    assert found == [[digest(one) for one in made]] * world, "the ranks do not have the same batches"
    started = time.perf_counter()
    for _ in range(ROUNDS):
        next(feed)
    if device.type == "cuda":
        torch.cuda.synchronize()
    milliseconds = 1000 * (time.perf_counter() - started) / ROUNDS
    if distributed.get_rank() == 0:
        size = sum(value.numel() * value.element_size() for value in made[0].tensors.values()) / 1e6
        print(f"{world} ranks on {device.type}: equal batches, {milliseconds:.2f} ms for one of {size:.1f} MB")
    parallel.destroy()


if __name__ == "__main__":
    main()
