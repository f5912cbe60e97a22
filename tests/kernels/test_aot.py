"""What holds the kernels to kernels/compiled.txt: it must be able to fail."""

from __future__ import annotations

import dataclasses

import aot
import pytest


def test_a_kernel_that_is_not_as_recorded_is_refused(tmp_path, monkeypatch):
    kernel = aot.Compiled("some_kernel bfloat16", 8, 3, 32, 0, 0, 4, 1, 0)
    monkeypatch.setattr(aot, "RECORD", tmp_path / "compiled.txt")
    aot.record([f".{kernel}"])
    aot.check_recorded([kernel])
    with pytest.raises(AssertionError, match="compiled.txt lacks this line"):
        aot.check_recorded([dataclasses.replace(kernel, registers=33)])
