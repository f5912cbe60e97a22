"""Tests marked `interpreted` run in Triton's interpreter, in a child process of their own.

triton reads TRITON_INTERPRET when it is imported, and other tests of a session may have imported it already; an
interpreter switched on for the whole session would in turn slow down every test that touches a kernel. So the marked
tests of a module become one item that runs them in a child. With TRITON_INTERPRET=1 set they run where they are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreted: runs in Triton's interpreter, in a child process")
    config.addinivalue_line("markers", "compiled: runs Triton's compiler, so not with TRITON_INTERPRET=1")


class InterpreterRun(pytest.Item):
    """The marked tests of one module, in a child process with the interpreter switched on."""

    def __init__(self, *, children, **arguments):
        super().__init__(**arguments)
        self.children = children

    def runtest(self):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=5"]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("PYTEST_XDIST_WORKER", None)
        result = subprocess.run(
            command + self.children, cwd=self.config.rootpath, env=environment, capture_output=True, text=True
        )
        self.add_report_section("call", "interpreter", result.stdout)
        if result.returncode:
            pytest.fail(result.stdout + result.stderr, pytrace=False)

    def reportinfo(self):
        return self.path, None, f"{len(self.children)} tests in the interpreter"


def pytest_collection_modifyitems(config, items):
    kept, modules = [], {}
    for item in items:
        if HERE in item.path.parents:
            if INTERPRETED and item.get_closest_marker("compiled"):
                item.add_marker(pytest.mark.skip(reason="TRITON_INTERPRET=1 replaces the compiler"))
            if not INTERPRETED and item.get_closest_marker("interpreted"):
                module = item.getparent(pytest.Module)
                if module not in modules:
                    modules[module] = InterpreterRun.from_parent(module, name="interpreter", children=[])
                    kept.append(modules[module])
                modules[module].children.append(item.nodeid)
                continue
        kept.append(item)
    items[:] = kept


def _mend_bfloat16() -> None:
    """triton 3.7.1's interpreter multiplies the bits of bfloat16 matrices as integers and rounds to it by cutting."""
    import numpy as np
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(x):
        if x.dtype.scalar != bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, x, to):
        if x.dtype.scalar != float32 or to.scalar != bfloat16:
            return cast(self, x, to)
        bits = np.ascontiguousarray(x.data).view(np.uint32)
        nearest_even = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return TensorHandle(np.where(np.isnan(x.data), 0x7FC0, nearest_even).astype(np.uint16), to.scalar)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl


if INTERPRETED:
    _mend_bfloat16()
