"""What is said about scenes: captions, questions, and a picture spelt out in words.

The spelt picture is how the miniature language model learns, in text alone, to answer from a description: one word per
cell of the grid in reading order, each an attribute of the thing in that cell. A projector that turns each image token
into something like such a word gives the frozen language model a picture that it can read.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm.tiny import scenes
from vlm.tiny.scenes import AnyThing, Placed, Scene, Thing

INSTRUCTIONS = (
    "Describe the picture.",
    "What is shown here?",
    "Write a short caption.",
    "Say what you see.",
    "What does this picture show?",
)
"""Human turns of the captioning set."""
CAPTION_PROMPT = "Give a brief description of this image in one sentence."
"""The recipe's own caption prompt, as in config/config.yaml."""
CHOICE_PROMPT = "{question}\n{options}\nAnswer with the letter."
OPEN_PROMPT = "{question}\nAnswer with one word."
"""Prompts of the miniature's questions, as in config/tiny.yaml."""
LETTERS = "ABCD"

DOMAIN_OF_SUBJECT = {
    "Colour": "Attributes",
    "Shape": "Attributes",
    "Background": "Attributes",
    "Counting": "Structure",
    "Position": "Structure",
    "Objects": "Structure",
    "Comparison": "Structure",
}
SUBJECTS = tuple(DOMAIN_OF_SUBJECT)


@dataclass(frozen=True)
class Question:
    """One question about one or two scenes. `options` is empty for an open question; `answer` is always the text."""

    subject: str
    scenes: tuple[Scene[Any], ...]
    text: str
    answer: str
    options: tuple[str, ...] = field(default=())

    @property
    def letter(self) -> str:
        return LETTERS[self.options.index(self.answer)]

    def prompt(self, choice: str = CHOICE_PROMPT, open_: str = OPEN_PROMPT) -> str:
        """The user turn, without image tags."""
        if not self.options:
            return open_.format(question=self.text)
        lines = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, self.options, strict=False))
        return choice.format(question=self.text, options=lines)

    @property
    def reply(self) -> str:
        return self.letter if self.options else self.answer


def _of(scene: Scene[AnyThing], index: int) -> str:
    return f"a {scene.things[index].name}"


def captions(scene: Scene[AnyThing]) -> list[str]:
    """Five descriptions, the first of them the plain one that the instruction data teaches."""
    ground = f"on a {scene.background} background"
    if len(scene.things) == 1:
        it = _of(scene, 0)
        return [
            f"{it} {ground}",
            f"there is {it} {ground}",
            f"the picture shows {it}",
            f"{it} is alone {ground}",
            f"{ground}, there is {it}",
        ]
    if len(scene.things) == 2:
        a, b = _of(scene, 0), _of(scene, 1)
        relation, inverse = scene.relation(0, 1), scene.relation(1, 0)
        return [
            f"{a} {relation} {b} {ground}",
            f"there is {a} {relation} {b} {ground}",
            f"the picture shows {a} {relation} {b}",
            f"{b} {inverse} {a} {ground}",
            f"{ground}, {a} is {relation} {b}",
        ]
    a, b, c = (_of(scene, i) for i in range(3))
    return [
        f"{a}, {b} and {c} {ground}",
        f"there is {a}, {b} and {c} {ground}",
        f"the picture shows {a}, {b} and {c}",
        f"three things {ground}: {a}, {b} and {c}",
        f"{ground}, there is {a}, {b} and {c}",
    ]


def cells(scene: Scene[Thing]) -> list[tuple[str, ...]]:
    """For each cell of the grid, in reading order, the words that are true of it: three of a thing, or a background."""
    named: list[tuple[str, ...]] = []
    for row in scene.grid():
        for index in row:
            if index < 0:
                named.append((scene.background,))
            else:
                thing = scene.things[index]
                named.append((thing.size, thing.colour, thing.shape))
    return named


def spell(scene: Scene[Thing], rng: random.Random) -> list[str]:
    """One word per cell. The cells of a thing take turns through its attributes, so that none is missing."""
    turns: dict[tuple[str, ...], list[str]] = {}
    words = []
    for names in cells(scene):
        queue = turns.setdefault(names, [])
        if not queue:
            queue.extend(rng.sample(names, len(names)))
        words.append(queue.pop())
    return words


def choices(rng: random.Random, answer: str, likely: list[str], others: list[str]) -> tuple[str, ...]:
    """Four options: the answer, first the wrong ones that the picture suggests, then others."""
    wrong = [option for option in dict.fromkeys(likely) if option != answer]
    rest = [option for option in others if option != answer and option not in wrong]
    options = [answer, *wrong, *rng.sample(rest, len(rest))][:4]
    rng.shuffle(options)
    return tuple(options)


def _unique(scene: Scene[Thing], attribute: str) -> list[Thing]:
    values = [getattr(thing, attribute) for thing in scene.things]
    return [thing for thing in scene.things if values.count(getattr(thing, attribute)) == 1]


def _attribute(rng: random.Random, scene: Scene[Thing]) -> Question:
    thing = rng.choice(scene.things)  # shapes differ within a scene
    options = choices(rng, thing.colour, [t.colour for t in scene.things], list(scenes.COLOURS))
    return Question("Colour", (scene,), f"What colour is the {thing.shape}?", thing.colour, options)


def _shape(rng: random.Random, scene: Scene[Thing]) -> Question | None:
    candidates = _unique(scene, "colour")
    if not candidates:
        return None
    thing = rng.choice(candidates)
    options = choices(rng, thing.shape, [t.shape for t in scene.things], list(scenes.SHAPES))
    return Question("Shape", (scene,), f"What shape is the {thing.colour} thing?", thing.shape, options)


def about_background(rng: random.Random, scene: Scene[AnyThing]) -> Question:
    options = choices(rng, scene.background, [], list(scenes.BACKGROUNDS))
    return Question("Background", (scene,), "What is the background?", scene.background, options)


def about_number(rng: random.Random, scene: Scene[AnyThing]) -> Question:
    answer = str(len(scene.things))
    return Question("Counting", (scene,), "How many things are there?", answer, choices(rng, answer, [], list("1234")))


def about_position(
    rng: random.Random, scene: Scene[AnyThing], relations: Sequence[str] = scenes.RELATIONS
) -> Question | None:
    if len(scene.things) != 2:
        return None
    a, b = rng.sample(range(2), 2)
    answer = scene.relation(a, b)
    axes = [(one, scenes.INVERSE[one]) for one in relations if answer not in (one, scenes.INVERSE[one])]
    options = [answer, scenes.INVERSE[answer], *rng.choice(axes)]  # two whole pairs: neither can be told from the other
    rng.shuffle(options)
    text = f"Where is the {scene.things[a].noun}, seen from the {scene.things[b].noun}?"
    return Question("Position", (scene,), text, answer, tuple(options))


def _objects(rng: random.Random, scene: Scene[Thing]) -> Question:
    """Two attributes of a thing, each as it is and otherwise: four options of which the words favour none."""
    values = {"size": list(scenes.SIZES), "colour": list(scenes.COLOURS), "shape": list(scenes.SHAPES)}
    thing = rng.choice(scene.things)
    shown = {one.name for one in scene.things}
    while True:
        kept = {name: [getattr(thing, name)] for name in values}
        for name in rng.sample(list(values), 2):
            near = [getattr(one, name) for one in scene.things]  # attributes of one thing on another: a test of binding
            others = [one for one in (near if rng.random() < 0.7 else values[name]) if one not in kept[name]]
            kept[name].append(rng.choice(others or [one for one in values[name] if one not in kept[name]]))
        options = [f"{size} {colour} {shape}" for size, colour, shape in itertools.product(*kept.values())]
        if shown.intersection(options) == {thing.name}:
            rng.shuffle(options)
            return Question("Objects", (scene,), "Which thing is in the picture?", thing.name, tuple(options))


def _comparison(rng: random.Random, first: Scene[Thing], second: Scene[Thing]) -> Question:
    pairs = [{(t.colour, t.shape) for t in scene.things} for scene in (first, second)]
    wanted = rng.choice(sorted(pairs[0] | pairs[1]))
    if rng.random() < 0.3:
        wanted = (rng.choice(list(scenes.COLOURS)), rng.choice(scenes.SHAPES))
    return which_picture(rng, (first, second), " ".join(wanted), wanted in pairs[0], wanted in pairs[1])


def which_picture(
    rng: random.Random,
    shown: tuple[Scene[AnyThing], Scene[AnyThing]],
    what: str,
    in_first: bool,
    in_second: bool,
    *,
    both: bool = True,
) -> Question:
    """Ask which of two pictures has something. `both`: whether that is an option."""
    answers = {(True, False): "only 1", (False, True): "only 2", (True, True): "both", (False, False): "none"}
    answer = answers[in_first, in_second]
    options = choices(rng, answer, [], [one for one in answers.values() if both or one != "both"])
    return Question("Comparison", shown, f"Which picture has a {what}?", answer, options)


def question(
    rng: random.Random, subject: str, scene: Scene[Thing], second: Scene[Thing] | None = None
) -> Question | None:
    """Ask about a scene; None where the scene does not allow the question. Comparison needs a second scene.

    A third of the questions about colours, shapes, backgrounds and numbers are open.
    """
    if subject == "Comparison":
        if second is None:
            raise ValueError("a question of comparison needs a second scene")
        return _comparison(rng, scene, second)
    makers: dict[str, Callable[[random.Random, Scene[Thing]], Question | None]] = {
        "Colour": _attribute,
        "Shape": _shape,
        "Background": about_background,
        "Counting": about_number,
        "Position": about_position,
        "Objects": _objects,
    }
    asked = makers[subject](rng, scene)
    if asked and subject in ("Colour", "Shape", "Background", "Counting") and rng.random() < 1 / 3:
        return Question(asked.subject, asked.scenes, asked.text, asked.answer)
    return asked


def chat(rng: random.Random, scene: Scene[AnyThing], nouns: Sequence[str] = scenes.SHAPES) -> tuple[str, str]:
    """A question asked in passing and its answer in a sentence. `nouns`: what could be there."""
    thing: Placed = rng.choice(scene.things)
    asked = [
        (f"Is the {thing.noun} small or large?", f"the {thing.noun} is {thing.size}"),
        ("What is behind it all?", f"a {scene.background} background"),
    ]
    if isinstance(thing, Thing):
        asked.insert(0, (f"What colour is the {thing.shape}?", f"the {thing.shape} is {thing.colour}"))
    if len(scene.things) == 2:
        a, b = rng.sample(range(2), 2)
        noun, other = scene.things[a].noun, scene.things[b].noun
        asked.append((f"Where is the {noun}?", f"the {noun} is {scene.relation(a, b)} the {other}"))
    shown = {one.noun for one in scene.things}
    missing = rng.choice([noun for noun in nouns if noun not in shown])
    wanted = rng.choice([thing.noun, missing])
    there = f"yes, a {thing.name}" if wanted == thing.noun else f"no, there is no {wanted}"
    asked.append((f"Is there a {wanted}?", there))
    return rng.choice(asked)


def knowledge(rng: random.Random) -> tuple[str, str]:
    """A question that needs no picture."""
    kinds = {"colour": list(scenes.COLOURS), "shape": list(scenes.SHAPES), "size": list(scenes.SIZES)}
    kind = rng.choice(list(kinds))
    word = rng.choice(kinds[kind])
    relation = rng.choice(scenes.RELATIONS)
    thing = f"{rng.choice(kinds['size'])} {rng.choice(kinds['colour'])} {rng.choice(kinds['shape'])}"
    return rng.choice(
        [
            (f"Is {word} a colour, a shape or a size?", f"{word} is a {kind}"),
            (f"What is the opposite of {relation}?", f"the opposite of {relation} is {scenes.INVERSE[relation]}"),
            (f"Name the colour of a {thing}.", thing.split()[1]),
            (f"Name the shape of a {thing}.", thing.split()[2]),
        ]
    )
