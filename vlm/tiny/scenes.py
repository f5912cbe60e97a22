"""Scenes of a few shapes: small enough to be learnt in minutes, rich enough that attributes must be bound to objects.

A scene is sampled, described (`vlm.tiny.text`) and rendered. Some colour-shape pairs are in no training picture,
neither of the vision model nor of the recipe, and appear only in test scenes, so that a good score cannot come from
memory. The language model knows them as words.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

CANVAS = 64
"""Width and height of a picture in pixels."""
CELL = 8
"""Width of one cell of the grid in pixels: the vision model's patch."""
GRID = CANVAS // CELL

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 220),
    "yellow": (245, 215, 30),
    "purple": (130, 50, 170),
    "orange": (255, 127, 14),
}
SIZES = {"small": (6.0, 7.2), "large": (11.5, 13.5)}
"""Radius in pixels, drawn uniformly."""
BACKGROUNDS = ("white", "grey", "black", "striped", "dotted")
RELATIONS = ("left of", "right of", "above", "below", "inside", "around")
INVERSE = dict(zip(RELATIONS, ("right of", "left of", "below", "above", "around", "inside"), strict=True))

HELD_OUT = frozenset(
    {("red", "star"), ("green", "circle"), ("blue", "cross"), ("yellow", "ring"), ("purple", "square")}
    | {("orange", "triangle")}
)
"""Pairs of colour and shape that no training picture shows. Every colour and every shape occurs in other pairs."""

_OUTER_RADIUS = (15.5, 17.5)
_ROOMY_SHAPES = ("circle", "square")  # of the six, those with space for a small object in their middle


class Placed(Protocol):
    """What a scene needs to know of a thing: its size in words, and its centre and radius in pixels."""

    @property
    def noun(self) -> str:
        """What a question calls it."""

    @property
    def name(self) -> str:
        """All that can be said of it, after `a`."""

    @property
    def size(self) -> str: ...
    @property
    def x(self) -> float: ...
    @property
    def y(self) -> float: ...
    @property
    def radius(self) -> float: ...


AnyThing = TypeVar("AnyThing", bound=Placed)


@dataclass(frozen=True)
class Thing:
    """One shape: what it is, and its centre and radius in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def noun(self) -> str:
        return self.shape

    @property
    def name(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene(Generic[AnyThing]):
    """One to three things with different nouns. With `inside`, the second thing is drawn within the first."""

    things: tuple[AnyThing, ...]
    background: str
    inside: bool = False

    def relation(self, first: int, second: int) -> str:
        """How thing `first` stands to thing `second`, one of RELATIONS."""
        if self.inside:
            return "around" if first == 0 else "inside"
        a, b = self.things[first], self.things[second]
        dx, dy = a.x - b.x, a.y - b.y
        if abs(dx) >= abs(dy):
            return "left of" if dx < 0 else "right of"
        return "above" if dy < 0 else "below"

    def grid(self, size: int = GRID, cell: int = CELL) -> list[list[int]]:
        """[size, size] index of the thing in each cell of so many pixels, -1 where there is background.

        A thing owns every cell that its bounding box covers by at least a third, and at least four cells.
        """
        cells = [[-1] * size for _ in range(size)]
        for index, thing in enumerate(self.things):
            left, right = thing.x - thing.radius, thing.x + thing.radius
            top, bottom = thing.y - thing.radius, thing.y + thing.radius
            cover = []
            for row in range(max(int(top // cell), 0), min(math.ceil(bottom / cell), size)):
                for column in range(max(int(left // cell), 0), min(math.ceil(right / cell), size)):
                    wide = min((column + 1) * cell, right) - max(column * cell, left)
                    high = min((row + 1) * cell, bottom) - max(row * cell, top)
                    cover.append((wide * high / cell**2, row, column))
            cover.sort(reverse=True)
            for rank, (share, row, column) in enumerate(cover):
                if share >= 1 / 3 or (rank < 4 and share > 0):
                    cells[row][column] = index
        return cells


def held_out(scene: Scene[Thing]) -> bool:
    """Whether a thing of the scene is one of the HELD_OUT pairs."""
    return any((thing.colour, thing.shape) in HELD_OUT for thing in scene.things)


def sample(rng: random.Random, held_out: bool = False) -> Scene[Thing]:
    """Draw a scene. With `held_out` its first thing is one of the HELD_OUT pairs, otherwise none of them occurs."""
    count = rng.choices((1, 2, 3), weights=(2, 6, 2))[0]
    inside = count == 2 and rng.random() < 0.2
    while True:
        shapes = rng.sample(SHAPES, count)
        colours = [rng.choice(list(COLOURS)) for _ in range(count)]
        if held_out:
            colours[0], shapes[0] = rng.choice(sorted(HELD_OUT))
        pairs = list(zip(colours, shapes, strict=True))
        if len(set(shapes)) < count or len(set(colours)) < count - (rng.random() < 0.15):
            continue
        if sum(pair in HELD_OUT for pair in pairs) != int(held_out):
            continue
        things = _nested(rng, pairs) if inside else _spread(rng, pairs)
        if things is not None:
            return Scene(things, rng.choice(BACKGROUNDS), inside)


def _nested(rng: random.Random, pairs: list[tuple[str, str]]) -> tuple[Thing, ...] | None:
    if rng.random() < 0.5:
        pairs = pairs[::-1]
    (outer_colour, outer_shape), (inner_colour, inner_shape) = pairs
    if outer_shape not in _ROOMY_SHAPES or outer_colour == inner_colour:
        return None
    radius = rng.uniform(*_OUTER_RADIUS)
    x, y = (rng.uniform(radius + 1, CANVAS - radius - 1) for _ in range(2))
    inner = Thing(inner_shape, inner_colour, "small", x, y, rng.uniform(*SIZES["small"]))
    return Thing(outer_shape, outer_colour, "large", x, y, radius), inner


def _spread(rng: random.Random, pairs: list[tuple[str, str]]) -> tuple[Thing, ...] | None:
    """Place things apart from each other, clearly left, right, above or below of one another; None if they collide."""
    things: list[Thing] = []
    for colour, shape in pairs:
        size = rng.choice(list(SIZES))
        radius = rng.uniform(*SIZES[size])
        x, y = (rng.uniform(radius + 1, CANVAS - radius - 1) for _ in range(2))
        if collides(x, y, radius, things, in_line=len(pairs) == 2):
            return None
        things.append(Thing(shape, colour, size, x, y, radius))
    things.sort(key=lambda thing: thing.x)
    return tuple(things)


def collides(x: float, y: float, radius: float, others: Sequence[Placed], *, in_line: bool) -> bool:
    """Whether a thing would touch another or, `in_line`, stand askew of it: neither beside it nor above or below."""
    for other in others:
        dx, dy = abs(x - other.x), abs(y - other.y)
        if max(dx, dy) < radius + other.radius + 1.5 or (in_line and max(dx, dy) < 1.4 * min(dx, dy)):
            return True
    return False


def _distance(shape: str, dx: Tensor, dy: Tensor) -> Tensor:
    """Signed distance to the outline of a shape of radius one; negative inside. dx, dy: [B, H, W] from the centre."""
    across, down = dx.abs(), dy.abs()
    if shape == "circle":
        return torch.hypot(dx, dy) - 1
    if shape == "square":
        return torch.maximum(across, down) - 0.88
    if shape == "triangle":
        return torch.maximum(dy - 0.85, (2 * across - dy - 1) / math.sqrt(5))
    if shape == "star":
        angle = torch.remainder(torch.atan2(dx, -dy), 2 * math.pi / 5) - math.pi / 5
        return (
            torch.hypot(dx, dy) * (torch.cos(angle.abs() - math.pi / 5) + 1.55 * torch.sin(math.pi / 5 - angle.abs()))
            - 1
        )
    if shape == "cross":
        return torch.minimum(torch.maximum(across - 1, down - 0.33), torch.maximum(across - 0.33, down - 1))
    return (torch.hypot(dx, dy) - 0.75).abs() - 0.25  # ring


def background(name: str, size: int, device: torch.device | str) -> Tensor:
    """[3, H, W] values from 0 to 255."""
    plain = {"white": 250.0, "grey": 150.0, "black": 12.0}
    y, x = torch.meshgrid(torch.arange(size, device=device), torch.arange(size, device=device), indexing="ij")
    if name in plain:
        level = torch.full((size, size), plain[name], device=device)
    elif name == "striped":
        level = torch.where(((x + y) // 4) % 2 == 0, 225.0, 175.0)
    else:
        level = torch.where((x % 8 - 3.5) ** 2 + (y % 8 - 3.5) ** 2 < 5, 95.0, 215.0)
    return level.expand(3, size, size)


def render(scenes: Sequence[Scene[Thing]], seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw scenes with soft edges, a little colour jitter and noise, both from `seed`.

    Returns:
        uint8 [B, 3, CANVAS, CANVAS].
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    backgrounds = {name: background(name, CANVAS, device) for name in BACKGROUNDS}
    picture_BCHW = torch.stack([backgrounds[scene.background] for scene in scenes])
    axis = torch.arange(CANVAS, device=device) + 0.5
    for layer in range(max(len(scene.things) for scene in scenes)):
        for shape in SHAPES:
            rows = [i for i, s in enumerate(scenes) if layer < len(s.things) and s.things[layer].shape == shape]
            if not rows:
                continue
            things = [scenes[i].things[layer] for i in rows]
            x, y, radius = (
                torch.tensor([getattr(t, name) for t in things], device=device).view(-1, 1, 1)
                for name in ("x", "y", "radius")
            )
            dx, dy = torch.broadcast_tensors((axis.view(1, 1, -1) - x) / radius, (axis.view(1, -1, 1) - y) / radius)
            cover = (0.5 - _distance(shape, dx, dy) * radius).clamp(0, 1).unsqueeze(1)
            colour = torch.tensor([COLOURS[t.colour] for t in things], device=device, dtype=torch.float32)
            jitter = torch.randn(colour.shape, generator=generator, device=device) * 8
            index = torch.tensor(rows, device=device)
            ink = (colour + jitter).clamp(0, 255).view(-1, 3, 1, 1)
            picture_BCHW[index] = picture_BCHW[index] * (1 - cover) + ink * cover
    noise = torch.randn(picture_BCHW.shape, generator=generator, device=device) * 3
    return (picture_BCHW + noise).round().clamp(0, 255).to(torch.uint8)
