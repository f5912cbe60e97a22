"""`vlm checkpoint diff`: which weights of two checkpoints differ, and by how much."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vlm.describe.contents import Contents, group, in_order, open_contents
from vlm.describe.show import describe_manifests, is_checkpoint
from vlm.describe.text import aligned
from vlm.weights.tables import num_bytes

_BLOCK = 1 << 24
"""Values compared at a time, so that a large embedding needs no copies of itself in double precision."""
_SHOWN = 20


@dataclass
class Difference:
    """How far the values of some weights are apart."""

    tensors: int = 0
    values: int = 0
    """That are not equal."""
    largest: float = 0.0
    """Absolute difference; NaN where one of two values is."""
    squares: float = 0.0
    """Of the differences, summed."""
    reference: float = 0.0
    """Squares of the first checkpoint's values in the same weights, summed."""

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm of the first."""
        return (self.squares / self.reference) ** 0.5 if self.reference else float("inf")

    def __add__(self, other: Difference) -> Difference:
        return Difference(
            self.tensors + other.tensors,
            self.values + other.values,
            max(self.largest, other.largest, key=lambda value: (value != value, value)),  # NaN is the largest
            self.squares + other.squares,
            self.reference + other.reference,
        )


def diff(first: Path, second: Path) -> int:
    """Print in what two checkpoints differ, or folders of weights in another format.

    Args:
        first, second: each a checkpoint, a stage's folder, a Hugging Face folder or Megatron-LM's rank files.

    Returns:
        0 where names, types, shapes and bits of all weights are equal, else 1. What the manifests say is listed and
        does not count: the same weights may have come about in two ways.

    Raises:
        ValueError: one of them is no such folder, or is not complete.
    """
    first, second = Path(first), Path(second)
    ours, theirs = open_contents(first), open_contents(second)
    if is_checkpoint(first) and is_checkpoint(second):
        _print_manifests(describe_manifests(first), describe_manifests(second))
    odd = list(_unlike(ours, theirs, first, second))
    differences = _values(ours, theirs)
    if odd:
        rest = [f"and {len(odd) - _SHOWN} more"] if len(odd) > _SHOWN else []
        print("\n".join(["weights of another name, shape or type", *(f"  {line}" for line in odd[:_SHOWN] + rest), ""]))
    if differences:
        _print_values(differences, ours)
    if not odd and not differences:
        print(f"all {len(ours.specs)} weights are equal")
        return 0
    return 1


def _unlike(first: Contents, second: Contents, here: Path, there: Path) -> Iterator[str]:
    for one, other, place in ((first, second, here), (second, first, there)):
        parts = Counter(group(key, layers=False) for key in one.specs)
        for part in parts.keys() - {group(key, layers=False) for key in other.specs}:
            yield f"{part}: all {parts.pop(part)} only in {place}"
        yield from (
            f"{key}: only in {place}"
            for key in in_order(one.specs.keys() - other.specs.keys())
            if group(key, layers=False) in parts
        )
    for key in in_order(first.specs.keys() & second.specs.keys()):
        (dtype, shape), (other_dtype, other_shape) = first.specs[key], second.specs[key]
        if shape != other_shape:
            yield f"{key}: shape {list(shape)} and {list(other_shape)}"
        if dtype != other_dtype:
            yield f"{key}: {dtype} and {other_dtype}".replace("torch.", "")


def _values(first: Contents, second: Contents) -> dict[str, Difference]:
    """Differences by layer or module, of weights that both have in one shape."""
    both = [key for key in in_order(first.specs) if key in second.specs and first.specs[key][1] == second.specs[key][1]]
    found: dict[str, Difference] = defaultdict(Difference)
    total = sum(num_bytes(first.specs[key][1], first.specs[key][0]) for key in both)
    with tqdm(total=total, desc="compare", unit="B", unit_scale=True) as bar:
        for key in both:
            if difference := compare(first.read(key), second.read(key)):
                found[group(key, layers=True)] += difference
            bar.update(num_bytes(first.specs[key][1], first.specs[key][0]))
    return dict(found)


def compare(first: Tensor, second: Tensor) -> Difference | None:
    """The difference of two tensors of one shape, None where there is none. Equal bits are equal, NaN or not."""
    found = Difference(tensors=1)
    for a, b in zip(first.flatten().split(_BLOCK), second.flatten().split(_BLOCK), strict=True):
        if a.dtype == b.dtype:
            apart = (a.view(torch.uint8) != b.view(torch.uint8)).view(len(a), -1).any(1)
        else:
            apart = a.double() != b.double()
        difference = (a[apart].double() - b[apart].double()).abs()
        largest = float(difference.max()) if len(difference) else 0.0
        squares, reference = float(difference.square().sum()), float(a.double().square().sum())
        found += Difference(0, len(difference), largest, squares, reference)
    return found if found.values else None


def _print_manifests(first: dict[str, Any], second: dict[str, Any]) -> None:
    one, two = dict(_leaves(first)), dict(_leaves(second))
    rows = [
        (f"  {key}", one.get(key, "-"), two.get(key, "-"))
        for key in dict.fromkeys([*one, *two])
        if one.get(key) != two.get(key) and key != "path"
    ]
    if rows:
        print("manifests\n" + aligned(rows) + "\n")


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values; parents are counted from the newest."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield path, str(tree)
        return
    for name, value in items:
        yield from _leaves(value, f"{path}.{name}" if path else str(name))


def _print_values(differences: dict[str, Difference], contents: Contents) -> None:
    """A line per part of the model, and below it one per layer or module."""
    counts = Counter(name for key in contents.specs for name in (group(key, layers=False), group(key, layers=True)))
    rows = [("values differ in", "tensors", "values", "largest", "relative")]
    for part in dict.fromkeys(name.split(".")[0] for name in differences):
        inside = {name: difference for name, difference in differences.items() if name.split(".")[0] == part}
        rows.append(_row(part, sum(inside.values(), Difference()), counts[part]))
        rows += [_row(f"  {name.partition('.')[2]}", item, counts[name]) for name, item in inside.items()]
    print(aligned(rows, " rrrr"))


def _row(name: str, difference: Difference, count: int) -> tuple[str, str, str, str, str]:
    return (
        name,
        f"{difference.tensors} of {count}",
        f"{difference.values:,}",
        f"{difference.largest:.3g}",
        f"{difference.relative:.3g}",
    )
