"""Shards at scale: samples per second and core out of a zip archive, memory over time, and whether time grows linearly.

    python tests/benches/bench_shard.py [--samples 50000 100000 200000] [--workers 2] [--side 64]

A few hundred JPEG files stand for all pictures of an archive like LLaVA-Pretrain's. With 336 pixels they have 50 kB, as
that one's have on average; small ones show what all else costs. Each size is written by a command of its own; its
memory, with that of the processes that it starts, is looked at ten times a second. Then comes the Energon index. Rates
count CPU seconds, so that other work on the machine matters little. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image

from vlm import config as configuration

ROOT = Path(__file__).resolve().parents[2]
NUM_PICTURES = 300
MIB = 2**20


def pictures(side: int) -> list[bytes]:
    """JPEG files of coarse colours under fine noise."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(NUM_PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 6, side // 6, 3), np.uint8))
        pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) + rng.normal(0, 6, (side, side, 3))
        stream = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
        made.append(stream.getvalue())
    return made


def write_source(folder: Path, number: int, side: int) -> Path:
    """`annotations.json` and `images.zip`, as LLaVA-Pretrain has them."""
    draw, files, records = random.Random(0), pictures(side), []
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for index in range(number):
            image = f"{index // 1000:05d}/{index:09d}.jpg"
            archive.writestr(image, files[index % NUM_PICTURES])
            caption = " ".join(draw.choices(("a", "red", "circle", "left", "of", "the", "blue", "square"), k=12))
            turns = [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": caption}]
            records.append({"id": f"{index:09d}", "image": image, "conversations": turns})
    (folder / "annotations.json").write_text(json.dumps(records))
    return folder


def write_config(path: Path) -> Path:
    """The full recipe with the one data set `bench`."""
    tree: dict[str, Any] = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    one = {"source": "bench", "annotations": "annotations.json", "images": "images"}
    tree["data"]["sets"] = {"bench": one | {"validation_share": 0.01, "samples_per_shard": 10000}}
    for stage in tree["stages"].values():
        stage["data"] = {"bench": 1.0}
    path.write_text(configuration.dump(configuration.validate(tree)))
    return path


def memory(process: psutil.Process) -> float:
    """MiB of a process and those that it started; pages that they share count once (Pss)."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total / MIB


def run(arguments: list[str]) -> tuple[float, float, list[float]]:
    """Wall seconds and CPU seconds of a command with all its processes, and its memory over time in MiB."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = psutil.Popen([sys.executable, "-m", "vlm.cli", *arguments], stderr=subprocess.DEVNULL)
    used = []
    while process.poll() is None:
        try:
            used.append(memory(process))
        except psutil.Error:
            break
        time.sleep(0.1)
    if process.wait():
        raise SystemExit(f"{' '.join(arguments)}: failed, run it alone to see why")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - start, busy, used


def tenths(used: list[float]) -> str:
    """The peak of each tenth of the time."""
    parts = [used[len(used) * n // 10 : len(used) * (n + 1) // 10] for n in range(10)]
    return " ".join(f"{max(part):.0f}" for part in parts if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[50_000, 100_000, 200_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--side", type=int, default=64, help="pixels of the pictures (default: 64)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = str(write_config(folder / "config.yaml"))
        for number in options.samples:
            source, out = write_source(folder / f"{number}", number, options.side), folder / f"{number}-shards"
            line = ["data", "shard", "--config", config, "--set", "bench", "--source", str(source), "--out", str(out)]
            wall, busy, used = run([*line, "--workers", str(options.workers)])
            print(
                f"{number:,} samples, {options.workers} workers: {wall:.1f} s, {number / busy:,.0f} samples/s per "
                f"core, {busy / number * 1e6:.0f} us each; MiB over time: {tenths(used)}",
                flush=True,
            )
            wall, busy, used = run(["data", "index", str(out)])
            print(
                f"    index: {wall:.1f} s, {number / busy:,.0f} samples/s per core, peak {max(used):.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
