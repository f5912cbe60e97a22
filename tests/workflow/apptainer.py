"""Stands in for Apptainer: notes what it is called with, and runs on this machine what is meant for the image."""

from __future__ import annotations

import json
import sys
from pathlib import Path

SCRIPT = """\
#!{python}
import json, os, sys

if sys.argv[1:] == ["--version"]:
    print("apptainer version 1.3.4")
    sys.exit()
call = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "node": os.environ.get("SLURM_NODEID")}}
with open({notes!r}, "a") as notes:
    notes.write(json.dumps(call) + "\\n")
command = sys.argv[sys.argv.index("vlm.sif") + 1 :]
os.environ["PATH"] = {inside!r} + os.pathsep + os.environ["PATH"]  # as the image sets it
os.execvp(command[0], command)
"""


def install(folder: Path, inside: Path) -> None:
    """Make `folder/apptainer`, and an image below the working directory `folder.parent`.

    Args:
        inside: holds the commands that are in the image.
    """
    folder.mkdir(exist_ok=True)
    program = folder / "apptainer"
    program.write_text(SCRIPT.format(python=sys.executable, notes=f"{folder}/calls", inside=str(inside)))
    program.chmod(0o755)
    (folder.parent / "vlm.sif").touch()


def calls(folder: Path) -> list[dict[str, object]]:
    """What it was called with, in order: `arguments`, the working directory and the number of SLURM's node."""
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
