"""What the pictures of a miniature show and what is said about them, so that one code writes and learns all of them.

Two worlds: shapes that are drawn (`Shapes`, here), and drawings from emoji fonts (`vlm.tiny.emoji`).
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.config import Miniature
from vlm.tiny import scenes, text
from vlm.tiny.scenes import Scene
from vlm.tiny.text import Question


class World(ABC):
    """Scenes of one kind: drawn by chance, rendered, asked about. Captions are `text.captions` in all of them."""

    canvas: int
    """Width and height of a picture in pixels."""
    cell: int
    """Width of one cell of the grid in pixels: the vision model's patch."""
    about: str
    """What the vision model's card says of the pictures."""
    licence: Mapping[str, str]
    """`name` and `url`, as COCO's files give them."""
    subjects: Mapping[str, str]
    """Domain of each subject that is asked about in the test."""
    taught: Sequence[str]
    """The subjects of questions about one picture that training asks too."""
    num_answers: Mapping[str, int]
    """How many answers a subject has. They come equally often in the test, so that the likeliest is no good guess."""
    names: Sequence[str]
    """All things by their whole names."""

    @abstractmethod
    def sample(self, rng: random.Random, held_out: bool = False) -> Scene[Any]:
        """Draw a scene that holds something that no training scene holds, or nothing of it."""

    @abstractmethod
    def names_held_out(self, said: str) -> bool:
        """Whether a text names something that training must not name."""

    @abstractmethod
    def question(
        self, rng: random.Random, subject: str, scene: Scene[Any], second: Scene[Any] | None = None
    ) -> Question | None:
        """Ask about a scene; None where the scene does not allow the question. Comparison needs a second scene."""

    @abstractmethod
    def chat(self, rng: random.Random, scene: Scene[Any]) -> tuple[str, str]:
        """A question asked in passing and its answer in a sentence."""

    @abstractmethod
    def knowledge(self, rng: random.Random) -> tuple[str, str]:
        """A question that needs no picture."""

    @abstractmethod
    def render(self, shown: Sequence[Scene[Any]], seed: int, device: torch.device | str = "cpu") -> Tensor:
        """uint8 [B, 3, canvas, canvas], with a little noise from `seed`."""

    @property
    def phrases(self) -> tuple[str, ...]:
        """What a cell of the grid can show: the things, then the backgrounds."""
        return (*self.names, *(f"{name} background" for name in scenes.BACKGROUNDS))

    def cells(self, scene: Scene[Any]) -> list[str]:
        """The phrase of each cell, in reading order."""
        grid = scene.grid(self.canvas // self.cell, self.cell)
        behind = f"{scene.background} background"
        return [scene.things[index].name if index >= 0 else behind for row in grid for index in row]


class Shapes(World):
    """One to three shapes of a colour and a size. Some pairs of colour and shape are held out."""

    canvas = scenes.CANVAS
    cell = scenes.CELL
    about = "rendered scenes (`vlm/tiny/scenes.py`); the held-out pairs of colour and shape never occur"
    licence = {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}
    subjects = text.DOMAIN_OF_SUBJECT
    taught = tuple(one for one in text.SUBJECTS if one != "Comparison")
    num_answers = {
        "Colour": len(scenes.COLOURS),
        "Shape": len(scenes.SHAPES),
        "Background": len(scenes.BACKGROUNDS),
        "Counting": 3,
        "Position": len(scenes.RELATIONS),
        "Comparison": 4,
    }
    names = tuple(
        f"{size} {colour} {shape}" for size in scenes.SIZES for colour in scenes.COLOURS for shape in scenes.SHAPES
    )

    def sample(self, rng: random.Random, held_out: bool = False) -> Scene[Any]:
        return scenes.sample(rng, held_out)

    def names_held_out(self, said: str) -> bool:
        return any(f"{colour} {shape}" in said for colour, shape in scenes.HELD_OUT)

    def question(
        self, rng: random.Random, subject: str, scene: Scene[Any], second: Scene[Any] | None = None
    ) -> Question | None:
        return text.question(rng, subject, scene, second)

    def chat(self, rng: random.Random, scene: Scene[Any]) -> tuple[str, str]:
        return text.chat(rng, scene)

    def knowledge(self, rng: random.Random) -> tuple[str, str]:
        return text.knowledge(rng)

    def render(self, shown: Sequence[Scene[Any]], seed: int, device: torch.device | str = "cpu") -> Tensor:
        return scenes.render(shown, seed, device)


SHAPES = Shapes()


def of(miniature: Miniature | None) -> World:
    """The world of a miniature: emoji where it has stamps, else shapes.

    Raises:
        ValueError: the file of stamps is missing or is none.
    """
    if miniature is None or miniature.stamps is None:
        return SHAPES
    from vlm.tiny.emoji import Emoji

    return Emoji(Path(miniature.stamps))
