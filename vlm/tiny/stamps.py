"""Emoji drawings as stamps: `vlm tiny stamps` renders them from npm packages into one Parquet file.

Iconify publishes the fonts as SVG, Emojibase the names of Unicode's CLDR. A name is kept where every style has drawn it
and a caption can say it: one or two plain words that take the article `a` with a size before them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vlm import files
from vlm.tiny import scenes

STYLES = {
    "twemoji": "CC-BY-4.0",
    "noto": "Apache-2.0",
    "fluent-emoji-flat": "MIT",
    "openmoji": "CC-BY-SA-4.0",
}
"""Packages `@iconify-json/<style>` and the licence that each states for its drawings."""
GROUPS = {
    3: "animals and nature",
    4: "food and drink",
    5: "travel and places",
    6: "activities",
    7: "objects",
}
"""Emojibase's groups of things. Faces, people, symbols and flags are left out: too much alike at this size."""
CLOCKS = "time"
"""A subgroup of dials that differ in their hands alone."""
SIZE = 112
"""Pixels along each side of a stamp: more than the largest thing of a scene has."""
_PLAIN = re.compile(r"[a-z]+( [a-z]+)?")
_COLUMNS = ("name", "group", "subgroup", "style", "licence", "png")


@dataclass(frozen=True)
class Stamps:
    """All drawings. K concepts, each in every style."""

    nouns: tuple[str, ...]
    """[K] names, sorted."""
    groups: tuple[str, ...]
    """[K] what each is, in words."""
    subgroups: tuple[str, ...]
    """[K] what each is like; the drawings most easily taken for one another share it."""
    styles: tuple[str, ...]
    pixels: Tensor
    """uint8 [K, styles, 4, SIZE, SIZE], the colours not yet multiplied with the opacity."""


def prepare(packages: Path, out: Path, limit: int | None = None) -> None:
    """Render the stamps.

    Args:
        packages: `node_modules` with `@iconify-json/<style>` for each of STYLES, and `emojibase-data`.
        out: Parquet file, a row per name and style.
        limit: only so many names, for a try.

    Raises:
        ValueError: a package is missing.
        RuntimeError: the renderer is not installed.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise RuntimeError("rendering SVG needs resvg_py; pip install 'vlm[small]'") from None

    icons = {style: _Icons(packages / "@iconify-json" / style) for style in STYLES}
    named = [one for one in _named(packages / "emojibase-data/en") if all(_key(one, icons[s]) for s in STYLES)]
    rows = []
    for one in tqdm(named[:limit], desc="stamps", unit="name"):
        for style, licence in STYLES.items():
            png = svg_to_bytes(svg_string=icons[style].svg(_key(one, icons[style])), width=SIZE, height=SIZE)
            kind = (one["label"], GROUPS[one["group"]], one["kind"])
            rows.append(dict(zip(_COLUMNS, (*kind, style, licence, bytes(png)), strict=True)))
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.writing")
    parquet.write_table(pyarrow.Table.from_pylist(rows), beside)
    beside.replace(out)
    print(f"{out}: {len(rows) // len(STYLES)} names in {len(STYLES)} styles, {out.stat().st_size:,} bytes")


def load(path: Path) -> Stamps:
    """Read what `prepare` wrote.

    Raises:
        ValueError: there is no such file, it has other columns, or a name is not in every style.
    """
    from pyarrow import parquet

    if not path.is_file():
        raise ValueError(f"miniature.stamps: there is no {path}; `vlm tiny stamps` makes it")
    table = parquet.read_table(path)
    if set(table.column_names) != set(_COLUMNS):
        raise ValueError(f"miniature.stamps: {path} has the columns {', '.join(table.column_names)}, not of stamps")
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in table.to_pylist():
        rows.setdefault(row["name"], {})[row["style"]] = row
    styles = tuple(sorted({style for drawn in rows.values() for style in drawn}))
    if bare := [name for name, drawn in rows.items() if len(drawn) < len(styles)]:
        raise ValueError(f"miniature.stamps: {path}: {bare[0]!r} is not drawn in all of {', '.join(styles)}")
    nouns = tuple(sorted(rows))
    first = [rows[noun][styles[0]] for noun in nouns]
    pixels = np.stack([np.stack([_decode(rows[noun][style]["png"]) for style in styles]) for noun in nouns])
    groups, subgroups = (tuple(one[key] for one in first) for key in ("group", "subgroup"))
    return Stamps(nouns, groups, subgroups, styles, torch.from_numpy(pixels))


def _decode(png: bytes) -> NDArray[np.uint8]:
    """[4, H, W]."""
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGBA")).transpose(2, 0, 1)


class _Icons:
    """One style: what each code point is called, and how it is drawn."""

    def __init__(self, package: Path) -> None:
        self.names: dict[str, str] = files.read_json(package / "chars.json")
        self.set = files.read_json(package / "icons.json")

    def icon(self, name: str) -> Mapping[str, Any] | None:
        """None for what is only another icon turned around."""
        alias = self.set["aliases"].get(name)
        if alias is not None:
            return self.icon(alias["parent"]) if set(alias) == {"parent"} else None
        icon: Mapping[str, Any] | None = self.set["icons"].get(name)
        return icon

    def svg(self, key: str) -> str:
        """Square, the drawing as large as fits and in the middle, as SVG does by itself."""
        icon = self.icon(self.names[key])
        assert icon is not None, key
        width, height = (icon.get(side, self.set[side]) for side in ("width", "height"))
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{SIZE}" height="{SIZE}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )


def _key(entry: Mapping[str, Any], icons: _Icons) -> str:
    """The code points under which a style has an emoji, empty where it has none."""
    code = entry["hexcode"].lower()
    for key in (code, code.replace("-fe0f", "")):
        if key in icons.names and icons.icon(icons.names[key]):
            return key
    return ""


def _named(package: Path) -> Iterator[dict[str, Any]]:
    """The things that captions can name, in Unicode's order, each with the key of its subgroup as `kind`."""
    subgroups = {one["order"]: one["key"] for one in files.read_json(package / "messages.json")["subgroups"]}
    for entry in files.read_json(package / "data.json"):
        name, kind = entry["label"], subgroups.get(entry.get("subgroup"))
        words = name.split()
        if entry.get("group") not in GROUPS or kind == CLOCKS or not _PLAIN.fullmatch(name):
            continue
        plural = words[-1].endswith("s") and not words[-1].endswith(("ss", "us"))
        if not plural and not set(words) & {*scenes.SIZES, *scenes.BACKGROUNDS}:
            yield entry | {"kind": kind}
