"""Compile Triton kernels for sm_90 on any machine, and read back what ptxas and the disassembler say about them.

`compile_launches` runs an operation on meta-like CPU tensors with the launches of its kernels intercepted, so what is
compiled is exactly what the operation would launch on a GPU: same constants, same specialisation.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 1024  # what one block may use on sm_90
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
COLUMNS = f"{'kernel':58} {'warps':>5} {'stages':>6} {'registers':>9} {'spilled':>7} {'shared':>7} {'HGMMA':>5}"


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for sm_90."""

    name: str
    num_warps: int
    num_stages: int
    registers: int
    spilled_bytes: int  # stored to and loaded from local memory, and the stack
    shared_bytes: int
    hgmma: int  # warp-group matrix instructions in the SASS
    waits: int  # for such instructions
    narrow: int  # loads and stores of global memory by single 16-bit words, which a mask can cause

    def __str__(self):
        return (
            f"{self.name:58} {self.num_warps:5} {self.num_stages:6} {self.registers:9} {self.spilled_bytes:7} "
            f"{self.shared_bytes:7} {self.hgmma:5}"
        )


def compile_launch(label, kernel, arguments, keywords) -> Compiled:
    """Compile `kernel` as a launch with these arguments would: 1 and multiples of 16 are specialised."""
    options = {name: keywords.pop(name) for name in ("num_warps", "num_stages") if name in keywords}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    fixed = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in constants or value is None or (type(value) is int and value == 1 and name not in fixed):
            signature[name] = "constexpr"
            constexprs[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            if not kernel.params[position].do_not_specialize_on_alignment:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor | GluonDescriptor):
            layout = f",{value.layout!r}" if isinstance(value, GluonDescriptor) else ""
            signature[name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}{layout}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if name not in fixed and value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    language = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = language(kernel, signature, constexprs, attributes)
    binary = triton.compile(source, target=HOPPER, options=options)
    return read_back(label, binary)


def read_back(label, binary) -> Compiled:
    """Registers, stack and SASS of a compiled kernel, through the tools inside the triton wheel."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    path = Path(str(next(p for name, p in binary.metadata_group.items() if name.endswith(".cubin"))))
    usage = subprocess.run([tools / "cuobjdump", "-res-usage", path], check=True, capture_output=True, text=True).stdout
    sass = subprocess.run([tools / "nvdisasm", "-c", path], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass)) * 4
    metadata = binary.metadata
    return Compiled(
        name=label,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        registers=registers,
        spilled_bytes=max(stack, local),
        shared_bytes=metadata.shared,
        hgmma=len(re.findall(r"\bHGMMA\b", sass)),
        waits=len(re.findall(r"\bWARPGROUP\.DEPBAR\b", sass)),
        narrow=len(re.findall(r"\b(?:LDG|STG)\.\S*U16\b", sass)),
    )


class _Recorder:
    """Stands in for a kernel: remembers its launches instead of making them."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *arguments, **keywords: self.launches.append((self.kernel, arguments, keywords))


def compile_launches(label, module, operation) -> list[Compiled]:
    """Compile every kernel of `module` that `operation()` launches, once each.

    The outputs of the operation are uninitialised memory: nothing runs.
    """
    launches = []
    kernels = {n: k for n, k in vars(module).items() if isinstance(k, triton.runtime.JITFunction) and "kernel" in n}
    with mock.patch.multiple(module, **{name: _Recorder(kernel, launches) for name, kernel in kernels.items()}):
        operation()
    return [
        compile_launch(f"{kernel.__name__.strip('_')} {label}", kernel, arguments, dict(keywords))
        for kernel, arguments, keywords in launches
    ]


def table(compiled: list[Compiled]) -> str:
    return "\n".join([COLUMNS, *map(str, compiled)])


def check(compiled: list[Compiled], *, matrix: bool = True, spilled_bytes: int = 0) -> None:
    """No spills, shared memory that a block may have, warp-group matrix instructions where a kernel multiplies.

    `spilled_bytes` may be spilled outside of the loops, which only a profile can tell.
    """
    print(table(compiled), file=sys.stderr)
    for kernel in compiled:
        assert kernel.spilled_bytes <= spilled_bytes, kernel
        assert kernel.shared_bytes <= SHARED_BYTES, kernel
        assert kernel.hgmma > 0 or not matrix, kernel


HEADER = f"triton {triton.__version__}, sm_90"
RECORD = Path(__file__).parents[2] / "kernels/compiled.txt"
RENEW = "pytest tests/kernels -p no:xdist -k compiled -s 2>&1 | python tests/kernels/aot.py"


def check_recorded(compiled: list[Compiled]) -> None:
    """The table that reviewers read has these very lines, so that a change of a kernel shows what it costs."""
    header, *lines = RECORD.read_text().splitlines()
    if header != HEADER:
        return  # another compiler counts otherwise
    for kernel in compiled:
        assert str(kernel) in lines, f"kernels/compiled.txt lacks this line; renew it with `{RENEW}`:\n{kernel}"


def record(output: list[str]) -> None:
    """Put the kernels printed in a test run's output in place of the recorded ones of the same names."""
    printed = {line.lstrip(".F") for line in output if re.match(r"[.F]*\w+_kernel .*\d+\s*$", line.rstrip())}
    printed = {line.rstrip() for line in printed}
    names = {line[:58] for line in printed}
    kept = (
        {line for line in RECORD.read_text().splitlines()[2:] if line[:58] not in names} if RECORD.exists() else set()
    )
    RECORD.write_text("\n".join([HEADER, COLUMNS, *sorted(printed | kept)]) + "\n")


if __name__ == "__main__":
    record(sys.stdin.read().splitlines())
