"""What is known of a GPU: its memory, its peak, and how fast it talks to its neighbours."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlm.model import flops

GIB = 2**30
USABLE = 0.92
"""Share of the memory that tensors may take. The rest is the CUDA context, buffers of NCCL and cuBLAS, and holes that
PyTorch's allocator leaves."""


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    """As the driver reports it in all."""
    peak_flops: float
    """Dense bfloat16 operations per second."""
    link_bytes_per_second: float
    """To the other GPUs of its machine, one way: NVLink where it has one, else PCIe."""

    def peak(self, dtype: str) -> float:
        """Of products in the run's type. In float32, which no tensor core multiplies, a sixteenth as on an A100."""
        return self.peak_flops if dtype == "bfloat16" else self.peak_flops / 16

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * USABLE)


def _known(name: str, device: str, memory_mib: int, link_gb: float) -> Gpu:
    peak = flops.peak(device, "bfloat16")
    assert peak is not None, device
    return Gpu(name, memory_mib * 2**20, peak, link_gb * 1e9)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _known("h100", "H100", 81559, 450),
        _known("h100-nvl", "H100 NVL", 95830, 300),
        _known("h100-pcie", "H100 PCIe", 81559, 64),
        _known("h200", "H200", 143771, 450),
        _known("b200", "B200", 183359, 900),
        _known("a100-80", "A100", 81920, 300),
        _known("a100-40", "A100", 40960, 300),
        _known("l40s", "L40S", 46068, 32),
    )
}
"""By the name that `--gpu` takes. Memory is `nvidia-smi`'s total in MiB; links are those of NVIDIA's data sheets, which
state both directions together."""

_STATED = re.compile(r"(?P<gib>\d+(\.\d+)?):(?P<teraflops>\d+(\.\d+)?)(:(?P<link>\d+(\.\d+)?))?")
_LINK_GB = 32.0
"""PCIe 4.0 with 16 lanes, for a GPU whose link is not stated."""


def gpu(name: str) -> Gpu:
    """A GPU by its name, or by what is stated of it: `GiB:TFLOP/s` or `GiB:TFLOP/s:GB/s`.

    Raises:
        ValueError: neither; lists the known ones.
    """
    if found := GPUS.get(name.lower()):
        return found
    stated = _STATED.fullmatch(name)
    if stated is None or not float(stated["gib"]) or not float(stated["teraflops"]):
        raise ValueError(
            f"--gpu: {name!r} is not known, allowed are {', '.join(GPUS)}; or state its memory in GiB and its dense "
            "bfloat16 peak in TFLOP/s, and the GB/s of its link one way if it has NVLink: 96:400 or 96:400:300"
        )
    link = float(stated["link"] or _LINK_GB)
    return Gpu(name, int(float(stated["gib"]) * GIB), float(stated["teraflops"]) * 1e12, link * 1e9)
