"""One owner per folder: who is refused, who takes over, and that never two do."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from vlm.checkpoint import lock

HOLD = """
import sys, time
from pathlib import Path
from vlm.checkpoint import lock
lock.BEAT_SECONDS = 0.05
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def claim(folder: Path, number: int, owner: lock.Owner | None, age_seconds: float = 0.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:06d}.json"
    path.write_text(json.dumps({"owner": asdict(owner) if owner else None}))
    then = time.time() - age_seconds
    os.utime(path, (then, then))
    return path


def elsewhere() -> lock.Owner:
    return replace(lock.Owner.this(), host="n7", machine="another", job="4711")


def test_an_owner_keeps_others_out_by_name_until_it_lets_go(tmp_path):
    folder = tmp_path / "sft" / "lock"
    with lock.hold(folder):
        with pytest.raises(lock.Taken, match=rf"{folder.parent}: belongs to .* process {os.getpid()} on "):
            lock.await_free(folder, wait=False)
        with pytest.raises(lock.Taken), lock.hold(folder):
            pass
    with lock.hold(folder):
        assert [path.name for path in folder.iterdir()] == ["000002.json"]


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_killed_owner_on_this_machine_is_followed_at_once(tmp_path, reaped):
    process = holder(tmp_path)
    with pytest.raises(lock.Taken, match=f"process {process.pid} on "):
        lock.await_free(tmp_path, wait=False)
    process.kill()
    if reaped:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    started = time.monotonic()
    with lock.hold(tmp_path):
        assert time.monotonic() - started < 1
    process.wait()


def test_another_process_of_the_same_number_is_not_the_owner(tmp_path):
    mine = lock.Owner.this()
    claim(tmp_path, 3, replace(mine, started=mine.started - 100))
    assert lock.await_free(tmp_path, wait=False) == 4


def test_an_owner_elsewhere_that_beats_is_named_with_its_job(tmp_path):
    path = claim(tmp_path, 1, elsewhere(), age_seconds=15)
    threading.Timer(0.2, os.utime, [path]).start()
    with pytest.raises(lock.Taken, match=r"on n7 in SLURM job 4711, since "):
        lock.await_free(tmp_path, wait=False)


def test_an_owner_elsewhere_that_was_silent_too_long_is_gone(tmp_path, monkeypatch):
    claim(tmp_path, 1, elsewhere(), age_seconds=lock.GONE_SECONDS + 5)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the clocks of two machines may differ; only the files' counts
    assert lock.await_free(tmp_path, wait=False) == 2


def test_an_owner_elsewhere_gets_its_time_to_be_heard(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "GONE_SECONDS", 2.0)
    claim(tmp_path, 1, elsewhere(), age_seconds=1)
    started = time.monotonic()
    assert lock.await_free(tmp_path, wait=False) == 2
    assert time.monotonic() - started > 0.5


def test_a_claim_that_was_overtaken_is_given_back(tmp_path):
    """Between the last look and the claim, others may have come and gone."""
    claim(tmp_path, 7, elsewhere())
    assert not lock._Claims(tmp_path).make(6)
    assert [path.name for path in tmp_path.iterdir()] == ["000007.json"]


def _contend(folder: Path, start: Barrier, rounds: int) -> None:
    for number in range(rounds):
        start.wait(60)
        try:
            with lock.hold(folder / f"{number}"):
                (folder / f"winner-{number}-{os.getpid()}").touch()
                start.wait(60)
        except lock.Taken:
            start.wait(60)


def test_of_many_that_start_at_once_one_wins(tmp_path):
    """Over a claim whose owner is gone, which all of them find at the same moment."""
    context, ranks, rounds = multiprocessing.get_context("fork"), 4, 30
    gone = replace(lock.Owner.this(), started=0.0)
    for number in range(rounds):
        claim(tmp_path / f"{number}", 1, gone)
    start = context.Barrier(ranks)
    processes = [context.Process(target=_contend, args=(tmp_path, start, rounds)) for _ in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * ranks
    winners = [len(list(tmp_path.glob(f"winner-{number}-*"))) for number in range(rounds)]
    assert winners == [1] * rounds


def test_an_owner_that_was_taken_over_ends(tmp_path):
    """A process that was suspended wakes up and finds another in its place."""
    process = holder(tmp_path)
    process.send_signal(signal.SIGSTOP)
    claim(tmp_path, 2, elsewhere())
    process.send_signal(signal.SIGCONT)
    assert process.wait(20) == lock.EXIT_TAKEN


def test_waiting_says_for_whom_and_ends_with_the_owner(tmp_path, capsys):
    process = holder(tmp_path / "lock")
    threading.Timer(0.3, process.kill).start()
    with lock.hold(tmp_path / "lock", wait=True):
        said = capsys.readouterr().err
    process.wait()
    assert said.startswith(f"Waiting for another training in {tmp_path} to end: process {process.pid} on ")
    assert said.count("Waiting") == 1


def test_waiting_can_be_given_up(tmp_path):
    looks = iter([False, True])
    with lock.hold(tmp_path), pytest.raises(lock.Taken):
        lock.await_free(tmp_path, wait=True, cancelled=lambda: next(looks))
