"""Times kernels and their peers on the GPU, and writes what was measured where a reader finds it.

    make bench                                         all of it
    pytest kernels/benches -k cross_entropy            one operation; the others keep their last results

A run ends by writing kernels/benches/results/<gpu>.json, the table in kernels/README.md and results/<gpu>.png. Without
a GPU everything is skipped and nothing is written.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent):  # this folder's table.py, and vlm_kernels where it is not installed
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import table  # noqa: E402

ROUND_SECONDS = 0.02  # of work between two readings of the clock: long beside a launch, short enough for many rounds
HEAD_START_CYCLES = 40_000_000  # that the GPU idles before a round, while the host launches it: 20 ms at 1.98 GHz
HEAD_START_SECONDS = 0.015  # in which the host must be done
ROUNDS = 21
PACKAGES = ("torch", "triton", "transformer-engine", "liger-kernel", "nvidia-cudnn-cu13")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.suffix == ".py" and file_path.name.startswith("bench_"):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=device_clock))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="the benches time a GPU, and PyTorch sees none"))


class DeviceClock:
    """Seconds that the GPU has worked: what pytest-benchmark takes as timer.

    Each reading waits for the work so far and adds its time. Then it gives the host a head start: the GPU idles while
    the host launches the next round, as it does in a training step, where the host is always ahead. Otherwise a call of
    many short kernels would be timed by Python's launching of them.
    """

    def __init__(self) -> None:
        self.mark: torch.cuda.Event | None = None
        self.seconds = 0.0
        self.host_seconds = 0.0
        """That the host took to launch the last round."""
        self._marked_at = 0.0

    def __call__(self) -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        self.host_seconds = time.perf_counter() - self._marked_at
        now.synchronize()
        if self.mark is not None:  # added up here, because the driver's float32 would be coarse after minutes
            self.seconds += self.mark.elapsed_time(now) / 1e3
        torch.cuda._sleep(HEAD_START_CYCLES)
        self.mark = torch.cuda.Event(enable_timing=True)
        self.mark.record()
        self._marked_at = time.perf_counter()
        return self.seconds


device_clock = DeviceClock()


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """measure(make, provider=.., operation=.., shape=.., dtype=.., stage=.., flop=.., moved_bytes=..) times one cell.

    `make` builds the call. A peer that is not installed is skipped; one that fails is a cell saying why; ours may not.
    """

    def run(make: Callable[[], Callable[[], object]], **cell: Any) -> None:
        cell["gpu"] = torch.cuda.get_device_name()
        try:
            call = make()
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            begin = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            cell["peak_bytes"] = torch.cuda.max_memory_allocated() - begin
        except ImportError as error:
            pytest.skip(f"{cell['provider']} is not installed: {error}")
        except Exception as error:
            if cell["provider"] == "ours":
                raise
            torch.cuda.empty_cache()
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            request.config.stash[CELLS].append(cell | {"failed": reason})
            pytest.skip(reason)
        began = device_clock()
        for _ in range(5):
            call()
        seconds = (device_clock() - began) / 5
        host_seconds = device_clock.host_seconds / 5
        iterations = max(1, min(round(ROUND_SECONDS / seconds), int(HEAD_START_SECONDS / host_seconds)))
        timed = request.getfixturevalue("benchmark")
        timed.group = ", ".join(str(cell[key]) for key in ("operation", "shape", "dtype", "stage"))
        timed.extra_info.update(cell, versions=environment())
        timed.pedantic(call, rounds=ROUNDS, iterations=iterations, warmup_rounds=1)
        if timed.stats is not None:  # None with --benchmark-disable
            stats = timed.stats.stats
            cell |= {"seconds": stats.median, "iqr_seconds": stats.iqr, "rounds": ROUNDS, "iterations": iterations}
            cell["host_seconds"] = host_seconds
            request.config.stash[CELLS].append(cell)
        torch.cuda.empty_cache()

    return run


CELLS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CELLS] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    cells = session.config.stash[CELLS]
    if any("seconds" in cell for cell in cells):
        path = table.write(HERE / "results", cells, environment())
        table.publish(HERE / "results", HERE.parent / "README.md")
        print(f"\n{len(cells)} cells written to {path}, beside its picture, and to kernels/README.md")


def environment() -> dict[str, str]:
    versions = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in ("torch", "triton"):
                versions[name] = {"torch": torch, "triton": triton}[name].__version__
    return versions
