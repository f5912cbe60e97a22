"""Stands in for `vlm`: the real parser reads the arguments, and the files that they promise are made, all but empty.

Every call is noted in `calls.txt` of the working directory. A file `hold` makes training wait until it is gone, a file
`stop` makes it end as one that was asked to.
"""

from __future__ import annotations

import base64
import sys
import time
from pathlib import Path

from vlm.checkpoint.lock import hold
from vlm.cli import parser

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


def make(path: Path, content: bytes = b"{}\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def make_folder(path: Path) -> None:
    path.mkdir(parents=True)
    make(path / "content")


def train(out: Path, wait: bool) -> None:
    with hold(out / "lock", wait=wait):
        with open(out / "started", "a") as starts:
            starts.write("started\n")
        while Path("hold").exists():
            time.sleep(0.05)
        if Path("stop").exists():
            print("stopped by SIGTERM; the same command goes on", file=sys.stderr)
            sys.exit(75)
        make(out / "finished.json")


def main() -> None:
    with open("calls.txt", "a") as calls:
        calls.write(" ".join(sys.argv[1:]) + "\n")
    arguments = vars(parser().parse_args())
    if "config" in arguments and not arguments["config"].is_file():
        sys.exit(f"{arguments['config']}: there is no such file")
    verb = arguments.get(f"{arguments['command']}_command") or arguments["command"]
    out = arguments.get("out") or arguments.get("output")
    match verb:
        case "fetch" | "gguf" | "language" | "vision" | "combine" | "export":
            make_folder(out)
        case "data" if arguments["command"] == "tiny":
            for name in ("LLaVA-Pretrain", "LLaVA-Instruct-150K", "coco", "MMMU"):
                make_folder(out / name)
        case "shard":
            make(
                out / "shards.json", b'{"train": 100, "validation": 1}\n'
            )  # what the resources of a training come from
        case "index":
            make(arguments["directory"] / ".nv-meta/dataset.yaml")
        case "train":
            train(out, arguments["wait"])
        case "controls":
            make(out)
            if arguments["annotations_out"]:
                make(arguments["annotations_out"])
        case "curves" | "scores":
            make(out, PIXEL)
        case "gallery":
            make(out, b"<!doctype html><title>Gallery</title>")
        case "table":
            make(out, b"model,CIDEr\nsft,2.5\n")
        case "summary":
            print("summary of", arguments["table"])
        case _:
            make(out)


if __name__ == "__main__":
    main()
