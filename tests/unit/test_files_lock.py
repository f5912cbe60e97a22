"""What only one process at a time may write."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from vlm import files


def test_a_second_holder_waits_for_the_first_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))  # locks are per opening, as between processes
    files.lock(first, "first waits")
    held = threading.Event()

    def take() -> None:
        files.lock(second, "second waits")
        held.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert not held.wait(0.3)
    os.close(first)
    assert held.wait(10)
    thread.join()
    os.close(second)
    assert capsys.readouterr().err == "second waits\n"
