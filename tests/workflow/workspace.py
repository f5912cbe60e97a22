"""A working copy of the workflow whose commands are stand-ins, so that Snakemake's part is tested in seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).with_name("stand_in.py")

Snakemake = Callable[..., subprocess.CompletedProcess[str]]


def lay_out(folder: Path) -> Path:
    """Fill a folder with the real workflow, configuration and profiles, and a `vlm` that only makes the files promised.

    The workflow takes its commands from beside the running interpreter, so the interpreter is linked to beside them.
    """
    for name in ("workflow", "config", "profiles", "resources", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    commands = folder / ".venv/bin"
    commands.mkdir(parents=True)
    (commands / "python").symlink_to(sys.executable)
    for name, body in {"vlm": f'"{STAND_IN}"', "snakemake": "-m snakemake"}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec "{commands}/python" {body} "$@"\n')
        (commands / name).chmod(0o755)
    return folder


def environment(workspace: Path) -> dict[str, str]:
    """Variables that let the linked interpreter find what is installed beside the real one."""
    installed = [path for path in sys.path if path.endswith("site-packages")]
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("SNAKEMAKE", "PYTEST"))}
    return keep | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *installed]),
        "PATH": f"{workspace}/.venv/bin{os.pathsep}{os.environ['PATH']}",
    }


def jobs(output: str) -> set[str]:
    """What the jobs of a run or dry run say they do."""
    return set(re.findall(r"^Job \d+: (.*)$", output, flags=re.MULTILINE))
