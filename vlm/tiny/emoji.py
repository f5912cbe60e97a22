"""Scenes of real drawings: one to three emoji, small or large, turned a little, on the miniature's backgrounds.

Two things are kept from training. Some pairs of things are never in one picture (half of the test pictures show one),
and one style of drawing is in no picture but those of the subject `Unseen art`.
"""

from __future__ import annotations

import dataclasses
import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlm.tiny import scenes, stamps, text
from vlm.tiny.scenes import Scene
from vlm.tiny.text import Question
from vlm.tiny.world import World

UNSEEN_STYLE = "openmoji"
HELD_OUT_SHARE = 8
"""One pair of things in so many is held out."""
SIZES = {"small": (18.0, 23.0), "large": (32.0, 40.0)}
"""Half the width of a stamp in pixels, drawn uniformly."""
TURN = math.radians(12)
"""Largest angle by which a stamp is turned, either way."""
RELATIONS = scenes.RELATIONS[:4]
"""None of the drawings is inside of another."""
OPEN_SHARE = 1 / 3
"""Of the questions about things, backgrounds and numbers, so many are open."""


@dataclass(frozen=True)
class Sticker:
    """One stamp in a picture: what it shows, its place in `Stamps.pixels`, centre, half width and angle."""

    noun: str
    concept: int
    style: int
    size: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def name(self) -> str:
        return f"{self.size} {self.noun}"


StickerScene = Scene[Sticker]


class Emoji(World):
    """The world of a file of stamps."""

    canvas = 168
    cell = 14
    about = "scenes of emoji drawings (`vlm/tiny/emoji.py`); the held-out pairs and the held-out style never occur"
    licence = {"name": ", ".join(sorted(stamps.STYLES.values())), "url": "https://github.com/iconify/icon-sets"}
    taught = ("Objects", "Neighbours", "Size", "Background", "Counting", "Position")
    subjects = {
        "Objects": "Seen art",
        "Neighbours": "Seen art",
        "Size": "Seen art",
        "Background": "Seen art",
        "Counting": "Seen art",
        "Position": "Seen art",
        "Comparison": "Seen art",
        "Unseen art": "Unseen art",
    }
    num_answers = {"Size": 2, "Background": len(scenes.BACKGROUNDS), "Counting": 3, "Position": 4, "Comparison": 3}

    def __init__(self, path: Path) -> None:
        """Errors are those of `stamps.load`."""
        self.stamps = stamps.load(path)
        if UNSEEN_STYLE not in self.stamps.styles or len(self.stamps.styles) < 2:
            raise ValueError(f"miniature.stamps: {path} has no style {UNSEEN_STYLE} beside others")
        self.unseen_style = self.stamps.styles.index(UNSEEN_STYLE)
        self.seen_styles = [index for index in range(len(self.stamps.styles)) if index != self.unseen_style]
        self.names = tuple(f"{size} {noun}" for size in SIZES for noun in self.stamps.nouns)
        self._similar: dict[str, list[str]] = {}
        for noun, subgroup in zip(self.stamps.nouns, self.stamps.subgroups, strict=True):
            self._similar.setdefault(subgroup, []).append(noun)
        self._levels: dict[str, Tensor] = {}

    def sample(self, rng: random.Random, held_out: bool = False) -> StickerScene:
        count = rng.choices((1, 2, 3), weights=(0 if held_out else 2, 6, 2))[0]
        while True:
            chosen = rng.sample(range(len(self.stamps.nouns)), count)
            nouns = [self.stamps.nouns[index] for index in chosen]
            if any(is_held_out(a, b) for i, a in enumerate(nouns) for b in nouns[:i]) != held_out:
                continue
            placed = self._spread(rng, chosen)
            if placed is not None:
                return Scene(placed, rng.choice(scenes.BACKGROUNDS))

    def _spread(self, rng: random.Random, chosen: Sequence[int]) -> tuple[Sticker, ...] | None:
        placed: list[Sticker] = []
        for concept in chosen:
            size = rng.choice(list(SIZES))
            radius = rng.uniform(*SIZES[size])
            x, y = (rng.uniform(radius + 2, self.canvas - radius - 2) for _ in range(2))
            if scenes.collides(x, y, radius, placed, in_line=len(chosen) == 2):
                return None
            style, angle = rng.choice(self.seen_styles), rng.uniform(-TURN, TURN)
            placed.append(Sticker(self.stamps.nouns[concept], concept, style, size, x, y, radius, angle))
        return tuple(sorted(placed, key=lambda one: one.x))

    def names_held_out(self, said: str) -> bool:
        """What is held out are pairs in one picture; that two words occur in one text teaches nothing about it."""
        return False

    def question(
        self, rng: random.Random, subject: str, scene: Scene[Any], second: Scene[Any] | None = None
    ) -> Question | None:
        if subject == "Comparison":
            if second is None:
                raise ValueError("a question of comparison needs a second scene")
            return self._comparison(rng, scene, second)
        makers: dict[str, Callable[[random.Random, StickerScene], Question | None]] = {
            "Objects": self._objects,
            "Neighbours": self._neighbours,
            "Size": _size,
            "Background": text.about_background,
            "Counting": text.about_number,
            "Position": lambda rng, scene: text.about_position(rng, scene, RELATIONS),
            "Unseen art": self._unseen_art,
        }
        asked = makers[subject](rng, scene)
        if asked and subject in ("Neighbours", "Background", "Counting") and rng.random() < OPEN_SHARE:
            return dataclasses.replace(asked, options=())
        return asked

    def chat(self, rng: random.Random, scene: Scene[Any]) -> tuple[str, str]:
        return text.chat(rng, scene, self.stamps.nouns)

    def knowledge(self, rng: random.Random) -> tuple[str, str]:
        concept = rng.randrange(len(self.stamps.nouns))
        noun, group = self.stamps.nouns[concept], self.stamps.groups[concept]
        relation = rng.choice(RELATIONS)
        kinds = list(stamps.GROUPS.values())
        return rng.choice(
            [
                (f"To which kind belongs a {noun}: {', '.join(kinds[:-1])} or {kinds[-1]}?", group),
                (f"What is the opposite of {relation}?", f"the opposite of {relation} is {scenes.INVERSE[relation]}"),
            ]
        )

    def _like(self, rng: random.Random, noun: str) -> list[str]:
        """Other things of the same kind, in random order: what a drawing is most easily taken for."""
        kind = self.stamps.subgroups[self.stamps.nouns.index(noun)]
        return rng.sample(self._similar[kind], len(self._similar[kind]))

    def _objects(self, rng: random.Random, scene: StickerScene) -> Question:
        """Two of the wrong options are of the answer's kind; none is in the picture."""
        shown = {thing.noun for thing in scene.things}
        noun = rng.choice(scene.things).noun
        likely = [one for one in self._like(rng, noun) if one not in shown][:2]
        others = [one for one in rng.sample(self.stamps.nouns, 8) if one not in shown]
        options = text.choices(rng, noun, likely, others)
        return Question("Objects", (scene,), "Which thing is in the picture?", noun, options)

    def _unseen_art(self, rng: random.Random, scene: StickerScene) -> Question:
        """As `_objects`, in the style that is in no other picture."""
        drawn = tuple(dataclasses.replace(thing, style=self.unseen_style) for thing in scene.things)
        asked = self._objects(rng, dataclasses.replace(scene, things=drawn))
        return dataclasses.replace(asked, subject="Unseen art")

    def _neighbours(self, rng: random.Random, scene: StickerScene) -> Question | None:
        """A wrong option is the thing that the question names: telling both apart is what is asked."""
        if len(scene.things) != 2:
            return None
        a, b = rng.sample(range(2), 2)
        noun, other = scene.things[a].noun, scene.things[b].noun
        likely = [other, *(one for one in self._like(rng, noun) if one != other)][:3]
        options = text.choices(rng, noun, likely, rng.sample(self.stamps.nouns, 8))
        return Question("Neighbours", (scene,), f"What is {scene.relation(a, b)} the {other}?", noun, options)

    def _comparison(self, rng: random.Random, first: StickerScene, second: StickerScene) -> Question:
        """Never both: of so many things hardly any is drawn twice."""
        nouns = [[thing.noun for thing in scene.things] for scene in (first, second)]
        wanted = rng.choice(nouns[0] + nouns[1])
        if rng.random() < 0.3:
            wanted = rng.choice(self._like(rng, wanted))
        return text.which_picture(rng, (first, second), wanted, wanted in nouns[0], wanted in nouns[1], both=False)

    def render(self, shown: Sequence[Scene[Any]], seed: int, device: torch.device | str = "cpu") -> Tensor:
        """Stamps over the background, each a little brighter or darker, and noise."""
        generator = torch.Generator(device=device).manual_seed(seed)
        grounds = {name: scenes.background(name, self.canvas, device) for name in scenes.BACKGROUNDS}
        picture_BCHW = torch.stack([grounds[scene.background] for scene in shown])
        for layer in range(max(len(scene.things) for scene in shown)):
            for size in SIZES:
                rows = [i for i, s in enumerate(shown) if layer < len(s.things) and s.things[layer].size == size]
                if not rows:
                    continue
                ink_NCHW = self._place([shown[row].things[layer] for row in rows], size, device)
                colour, cover = ink_NCHW[:, :3], ink_NCHW[:, 3:]
                light = 1 + 0.08 * torch.randn(len(rows), 1, 1, 1, generator=generator, device=device)
                index = torch.tensor(rows, device=device)
                picture_BCHW[index] = picture_BCHW[index] * (1 - cover) + (colour * light).clamp(0, 255)
        noise = torch.randn(picture_BCHW.shape, generator=generator, device=device) * 3
        return (picture_BCHW + noise).round().clamp(0, 255).to(torch.uint8)

    def _place(self, things: Sequence[Sticker], size: str, device: torch.device | str) -> Tensor:
        """[N, 4, canvas, canvas]: a stamp in an empty picture each, colours (0 to 255) times opacity, and opacity."""
        x, y, radius, angle = (
            torch.tensor([getattr(one, name) for one in things], device=device).view(-1, 1, 1)
            for name in ("x", "y", "radius", "angle")
        )
        axis = torch.arange(self.canvas, device=device) + 0.5
        dx, dy = (axis.view(1, 1, -1) - x) / radius, (axis.view(1, -1, 1) - y) / radius
        turned = torch.stack([dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()], dim=-1)
        pixels = self._level(size, device)[[one.concept for one in things], [one.style for one in things]].float()
        cover = pixels[:, 3:] / 255
        return functional.grid_sample(torch.cat([pixels[:, :3] * cover, cover], 1), turned, align_corners=False)

    def _level(self, size: str, device: torch.device | str) -> Tensor:
        """uint8 [K, styles, 4, S, S] near the size at which it is drawn, so that no pixel of a drawing is skipped."""
        key = f"{size} {device}"
        if key not in self._levels:
            pixels = self.stamps.pixels.to(device)
            if size == "small":
                pixels = _halve(pixels)
            self._levels[key] = pixels
        return self._levels[key]


def _halve(pixels: Tensor) -> Tensor:
    """uint8 [K, styles, 4, S, S] at half the width; colours count by their opacity."""
    halves = []
    for some in pixels.split(64):
        flat = some.flatten(0, 1)
        cover = flat[:, 3:].float()
        mean = functional.avg_pool2d(torch.cat([flat[:, :3] * cover, cover], 1), 2)
        small = torch.cat([mean[:, :3] / mean[:, 3:].clamp(min=1e-3), mean[:, 3:]], 1).round().to(torch.uint8)
        halves.append(small.unflatten(0, some.shape[:2]))
    return torch.cat(halves)


def is_held_out(first: str, second: str) -> bool:
    """Whether two things are in no training picture together: the same pairs in every run and on every machine."""
    return zlib.crc32("|".join(sorted((first, second))).encode()) % HELD_OUT_SHARE == 0


def _size(rng: random.Random, scene: StickerScene) -> Question:
    thing = rng.choice(scene.things)
    return Question("Size", (scene,), f"Is the {thing.noun} small or large?", thing.size, tuple(SIZES))
