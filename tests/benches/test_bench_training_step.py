"""When the GPU had nothing to do, as the bench of the training step reads it from a profile."""

from __future__ import annotations

from types import SimpleNamespace

import bench_training_step as bench
from torch.autograd import DeviceType


def event(start: float, end: float, name: str, device: DeviceType = DeviceType.CUDA) -> SimpleNamespace:
    """From and to in microseconds."""
    return SimpleNamespace(device_type=device, time_range=SimpleNamespace(start=start, end=end), name=name)


def test_idle_is_when_no_kernel_runs() -> None:
    """In any order, on streams that overlap, and whatever the host does meanwhile."""
    events = [
        event(9000, 9500, "last"),
        event(1000, 4000, "long"),
        event(2000, 3000, "within"),
        event(5000, 7000, "second"),
        event(4000, 5000, "host", DeviceType.CPU),
    ]
    profiler = SimpleNamespace(events=lambda: events)
    assert bench.idle(profiler, longest=1).splitlines() == [
        "idle 3.0 of 8.5 ms; the longest gaps:",
        "    2.00 ms at     6.00  after second, before last",
    ]
