"""`vlm checkpoint show`: what a checkpoint is, where it comes from, and what is in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm import checkpoint
from vlm.checkpoint.manifest import NAME
from vlm.describe.text import aligned

if TYPE_CHECKING:
    from vlm.describe.contents import Contents

_SHORT = 12
"""Characters of a hash in the table; `as_json` has all of it."""


def show(
    directory: Path, *, layers: bool = False, hashes: bool = False, only_manifest: bool = False, as_json: bool = False
) -> None:
    """Print a description of a checkpoint, or of the weights in a Hugging Face folder or Megatron-LM's rank files.

    Args:
        directory: a checkpoint, a stage's folder, or a folder of weights in another format.
        layers: a line per layer instead of one per part.
        hashes: SHA-256 of the weights on each line, which reads them all. It covers names, types, shapes and values in
            the order of the names, so it is the same for every layout that the checkpoint was written in.
        only_manifest: leave the weights alone; needs no torch and no time.
        as_json: one JSON object instead of tables.

    Raises:
        ValueError: there is no checkpoint, it or a parent is incomplete, or options that contradict each other.
    """
    if only_manifest and (layers or hashes):
        raise ValueError("--only-manifest: has no weights to go with --layers or --hash")
    directory = Path(directory)
    description: dict[str, Any] = {"path": str(directory)}
    if only_manifest or is_checkpoint(directory):
        description |= describe_manifests(directory)
    if not only_manifest:
        from vlm.describe.contents import open_contents

        description["weights"] = _weights(open_contents(directory), layers=layers, hashes=hashes)
    if as_json:
        print(json.dumps(description, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(_tables(description)))


def is_checkpoint(directory: Path) -> bool:
    """Whether a folder is one of ours rather than weights in another format."""
    return (directory / NAME).is_file() or checkpoint.latest(directory) is not None


def describe_manifests(directory: Path) -> dict[str, Any]:
    """What the manifests of a checkpoint and its parents say."""
    links = checkpoint.chain(directory)
    folder, manifest = links[0]
    return {
        "path": str(folder),
        "kind": manifest.kind,
        "stage": manifest.stage,
        "iteration": manifest.iteration,
        "identity": manifest.identity,
        "parts": list(manifest.parts),
        "training": manifest.training,
        "settings": manifest.settings,
        "models": manifest.models,
        "sources": manifest.sources,
        "versions": manifest.versions,
        "parents": [
            {
                "path": str(path),
                "kind": parent.kind,
                "stage": parent.stage,
                "iteration": parent.iteration,
                "identity": parent.identity,
                "parts": list(parent.parts),
            }
            for path, parent in links[1:]
        ],
    }


def _weights(contents: Contents, *, layers: bool, hashes: bool) -> list[dict[str, Any]]:
    """Number, size, types and hash of the weights in each group."""
    from vlm.describe.contents import group, in_order
    from vlm.weights.tables import num_bytes

    total = sum(num_bytes(shape, dtype) for dtype, shape in contents.specs.values())
    found: dict[str, dict[str, Any]] = {}
    digests: dict[str, Any] = {}
    with _progress(total if hashes else None) as advance:
        for key in in_order(contents.specs):
            dtype, shape = contents.specs[key]
            name = group(key, layers=layers)
            line = found.setdefault(name, {"name": name, "tensors": 0, "parameters": 0, "bytes": 0, "dtypes": []})
            line["tensors"] += 1
            line["parameters"] += num_bytes(shape, dtype) // dtype.itemsize
            line["bytes"] += num_bytes(shape, dtype)
            if (short := str(dtype).removeprefix("torch.")) not in line["dtypes"]:
                line["dtypes"].append(short)
            if hashes:
                digest = digests.setdefault(name, hashlib.sha256())
                digest.update(f"{key} {short} {list(shape)}\n".encode())
                digest.update(_bytes(contents.read(key)))
                advance(num_bytes(shape, dtype))
    for name, digest in digests.items():
        found[name]["sha256"] = digest.hexdigest()
    return list(found.values())


def _bytes(tensor: Any) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


class _progress:
    """A bar of bytes on stderr, or nothing where there is nothing to wait for."""

    def __init__(self, total: int | None) -> None:
        self._total = total

    def __enter__(self) -> Callable[[int], object]:
        from tqdm import tqdm

        self._bar = tqdm(total=self._total, desc="read", unit="B", unit_scale=True, disable=self._total is None)
        return self._bar.update

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _tables(description: dict[str, Any]) -> list[str]:
    tables = [aligned(_facts(description))]
    if description.get("sources"):
        tables.append(
            "made from\n" + aligned([("", name, sha256[:_SHORT]) for name, sha256 in description["sources"].items()])
        )
    if description.get("parents"):
        lines = [
            ("", _what(parent), parent["identity"][:_SHORT], ", ".join(parent["parts"]), parent["path"])
            for parent in description["parents"]
        ]
        tables.append("trained from\n" + aligned(lines))
    if "weights" in description:
        tables.append(_weights_table(description["weights"]))
    return tables


def _facts(description: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("path", description["path"])]
    if "kind" not in description:
        return facts
    facts += [
        ("is", _what(description)),
        ("identity", description["identity"]),
        ("holds", ", ".join(description["parts"])),
    ]
    for name, tree in (("settings", description["settings"]), *description["models"].items()):
        if tree:
            facts.append((name, ", ".join(f"{key} {value}" for key, value in tree.items())))
    facts.append(("written by", ", ".join(f"{name} {version}" for name, version in description["versions"].items())))
    return facts


def _what(description: dict[str, Any]) -> str:
    if description["kind"] != "stage":
        return str(description["kind"])
    return f"stage {description['stage']}, iteration {description['iteration']}"


def _weights_table(lines: list[dict[str, Any]]) -> str:
    rows = [["weights", "tensors", "parameters", "bytes", "type"]]
    total = {key: sum(line[key] for line in lines) for key in ("tensors", "parameters", "bytes")}
    dtypes = sorted({dtype for line in lines for dtype in line["dtypes"]})
    for line in [*lines, {"name": "all", **total, "dtypes": dtypes}]:
        numbers = [f"{line[key]:,}" for key in ("tensors", "parameters", "bytes")]
        rows.append([line["name"], *numbers, ", ".join(line["dtypes"])])
    if lines and "sha256" in lines[0]:
        rows[0].append("sha256")
        for row, line in zip(rows[1:], lines, strict=False):
            row.append(line["sha256"][:_SHORT])
        rows[-1].append("")
    return aligned(rows, " rrr")
