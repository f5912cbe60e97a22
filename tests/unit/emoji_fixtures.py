"""A `node_modules` of drawings that are plain rectangles, so that a test can tell what it sees by its colour."""

from __future__ import annotations

import json
from pathlib import Path

from vlm.tiny import stamps

NOUNS = ("anchor", "banana", "camera", "dog", "engine", "feather", "guitar", "hammer", "iron box", "jacket")
STYLES = tuple(stamps.STYLES)


def colour(noun: str, style: str) -> tuple[int, int, int]:
    """Of a drawing: the noun in red, the style in green."""
    return 20 + 20 * NOUNS.index(noun), 40 + 50 * STYLES.index(style), 128


def write_packages(folder: Path) -> Path:
    """NOUNS in every style, and beside them what no caption can say: each of those is there for one reason."""
    left_out = {
        "grapes": 4,  # a plural
        "large dog": 3,  # a size
        "woman: red hair": 7,
        "cloud with light rain": 5,  # too long
        "grinning face": 0,  # a group that is left out
        "five o’clock": 5,
    }
    groups = {noun: 3 + index % 5 for index, noun in enumerate(NOUNS)} | left_out | {"undrawn": 7, "mirrored": 7}
    data, names = [], {}
    for index, (noun, group) in enumerate(groups.items()):
        data.append({"label": noun, "hexcode": f"1F{index:03X}-FE0F", "group": group, "subgroup": group})
        names[noun] = f"1f{index:03x}"
    emojibase = folder / "emojibase-data/en"
    emojibase.mkdir(parents=True)
    (emojibase / "data.json").write_text(json.dumps(data))
    kinds = [{"order": order, "key": f"kind-{order}"} for order in range(10)]
    (emojibase / "messages.json").write_text(json.dumps({"subgroups": kinds}))
    for style in STYLES:
        package = folder / "@iconify-json" / style
        package.mkdir(parents=True)
        drawn = {noun: code for noun, code in names.items() if noun != "undrawn" or style != "noto"}
        (package / "chars.json").write_text(json.dumps({code: noun for noun, code in drawn.items()}))
        icons = {noun: {"body": _rectangle(noun, style)} for noun in drawn if noun not in ("banana", "mirrored")}
        icons["camera"] |= {"height": 18}  # half as high as it is wide
        aliases = {"banana": {"parent": "yellow fruit"}, "mirrored": {"parent": "anchor", "hFlip": True}}
        icons["yellow fruit"] = {"body": _rectangle("banana", style)}
        tree = {"icons": icons, "aliases": aliases, "width": 36, "height": 36}
        (package / "icons.json").write_text(json.dumps(tree))
    return folder


def _rectangle(noun: str, style: str) -> str:
    red, green, blue = colour(noun, style) if noun in NOUNS else (0, 0, 0)
    height = 18 if noun == "camera" else 36
    return f'<rect width="36" height="{height}" fill="rgb({red},{green},{blue})"/>'


def write_stamps(folder: Path) -> Path:
    """The Parquet file of those packages."""
    stamps.prepare(write_packages(folder / "node_modules"), folder / "stamps.parquet")
    return folder / "stamps.parquet"
