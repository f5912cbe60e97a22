"""Convert, combine and export models of full size, and measure it: `python tests/full_size/run.py --out DIR`.

Each step is the command that a user runs, in a process of its own, from a cold page cache; beside it stands `cp` of the
language model in the same run. At the end the exported language model is compared with its source, to the bit. Needs
47 GB below DIR at its peak, and leaves nothing there, also where it fails.

The goal is at most 6 GB of memory per step and at least half the speed of `cp`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import models  # without torch: a process starts with the peak memory of the one that starts it

ROOT = Path(__file__).resolve().parents[2]
PEAK_BYTES = 47.5e9
"""Of the source, both converted models and the combined one, all there at once."""


@dataclass(frozen=True)
class Measured:
    name: str
    num_bytes: int
    """Written."""
    seconds: float
    cpu_seconds: float
    """User and system, of all threads; above `seconds` the step used more than one core."""
    peak_bytes: int

    @property
    def bytes_per_second(self) -> float:
        return self.num_bytes / self.seconds


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def forget(path: Path) -> None:
    """Take the files of a folder out of the page cache, so that every step reads from the disk."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(name: str, command: list[str], reads: Iterable[Path], out: Path) -> Measured:
    """Run one command to its end.

    Raises:
        RuntimeError: it failed; what it said is in the message.
    """
    for path in reads:
        forget(path)
    log = out.parent / f"{out.name}.log"
    with open(log, "wb") as stream:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {process.returncode}:\n{log.read_text()[-4000:]}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    found = Measured(name, size(out), seconds, cpu_seconds, usage.ru_maxrss * 1024)
    print(f"{name}: {seconds:.0f} s, {found.num_bytes / 1e9:.1f} GB", file=sys.stderr)
    return found


def apart(function: Callable[..., None], *arguments: object) -> None:
    """Call a function in a process of its own.

    Raises:
        RuntimeError: it failed; the message is on stderr.
    """
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments, daemon=True)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} failed with {process.exitcode}")


def vlm(name: str, out: Path, *arguments: object, reads: Iterable[Path]) -> Measured:
    return measure(name, [sys.executable, "-m", "vlm.cli", *map(str, arguments)], reads, out)


def steps(out: Path, scale: float, legacy: bool) -> list[Measured]:
    """All steps; what no later one needs goes at once."""
    hub = {part: out / "hub" / part for part in ("language", "vision")}
    apart(models.write_language, hub["language"], max(2, round(models.MISTRAL["num_hidden_layers"] * scale)))
    apart(models.write_vision, hub["vision"], max(2, round(models.CLIP["num_hidden_layers"] * scale)))
    source, config = hub["language"], ROOT / "config/config.yaml"

    copy = out / "copy"
    results = [measure("cp", ["cp", "-r", str(source), str(copy)], [source], copy)]
    shutil.rmtree(copy)
    copied = ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(source), str(copy)]
    results.append(measure("cp, flushed to disk", copied, [source], copy))
    shutil.rmtree(copy)

    made = {part: out / part for part in hub}
    for part, place in made.items():
        results.append(vlm(f"convert {part}", place, "convert", part, hub[part], place, reads=[hub[part]]))
    combined = out / "combined"
    sides = ("--language", made["language"], "--vision", made["vision"])
    joining = ("convert", "combine", "--config", config, *sides, "--out", combined)
    results.append(vlm("combine", combined, *joining, reads=made.values()))
    for place in made.values():
        shutil.rmtree(place)

    if legacy:
        ranks, back = out / "ranks", out / "back"
        writing = ("export", combined, ranks, "--format", "megatron", "--tensor", 4)
        results.append(vlm("export megatron, 4 ranks", ranks, *writing, reads=[combined]))
        shutil.rmtree(combined)
        sides = ("--language", hub["language"], "--vision", hub["vision"], "--config", config)
        results.append(vlm("convert legacy", back, "convert", "legacy", ranks, back, *sides, reads=[ranks]))
        shutil.rmtree(ranks)
        combined = back

    exported = out / "exported"
    results.append(vlm("export", exported, "export", combined, exported, reads=[combined]))
    shutil.rmtree(combined)
    apart(models.compare, source, exported)
    return results


def table(results: list[Measured]) -> str:
    copied = results[0].bytes_per_second
    lines = [f"{'step':<26}{'GB':>7}{'seconds':>9}{'CPU':>7}{'MB/s':>7}{'of cp':>7}{'peak GB':>9}"]
    for step in results:
        rate, peak = step.bytes_per_second, step.peak_bytes / 1e9
        lines.append(
            f"{step.name:<26}{step.num_bytes / 1e9:>7.2f}{step.seconds:>9.1f}{step.cpu_seconds:>7.1f}"
            f"{rate / 1e6:>7.0f}{rate / copied:>7.2f}{peak:>9.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder on the disk to be measured")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the layers, for trying it out")
    parser.add_argument("--legacy", action="store_true", help="through Megatron-LM's rank files and back on the way")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if out.exists():
        parser.error(f"--out {out}: exists; name a new folder, which is removed at the end")
    out.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        needed, free = PEAK_BYTES * min(1.0, arguments.scale + 0.15), shutil.disk_usage(out).free
        if free < needed:
            parser.error(f"--out {out}: needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free")
        print(table(steps(out, arguments.scale, arguments.legacy)))
    finally:
        shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
