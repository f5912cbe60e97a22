"""What a training step goes over: samples, pictures and tokens of a packed sequence, and how many samples there are.

Text lengths are no settings, and known only once the data are read. For the recipe's own annotation files a table has
what its settings were chosen for; for others a sample is taken as a picture and the text beside it in LLaVA's mixture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlm import files
from vlm.config import Config
from vlm.resources.bases import Bases

FILLED = 0.977
"""Share of a sequence's slots that packing fills: sixteen captions of about 610 tokens in 9984, see
`vlm.loader.packing`. Conversations of many lengths fill more."""


@dataclass(frozen=True)
class Text:
    """Means over the samples of a data set."""

    tokens: float
    """Beside the picture."""
    trained_tokens: float
    pictures: float = 1.0
    num_samples: int | None = None


KNOWN = {
    # Captions of about 34 tokens with the question before them: 610 with the picture (config/config.yaml).
    "blip_laion_cc_sbu_558k.json": Text(34, 20, 1.0, 558_128),
    # 40,688 of its conversations have no picture. Eight of them in 8192 tokens (config/config.yaml): 1024 each.
    "llava_v1_5_mix665k.json": Text(483, 290, 624_610 / 665_298, 665_298),
}
UNKNOWN = Text(480, 290)


@dataclass(frozen=True)
class Samples:
    """Training samples of a data set."""

    name: str
    num_samples: int | None
    """None where nobody knows before it is fetched."""
    text: Text
    found: str
    """Where the number comes from, in words."""


def of_set(config: Config, name: str, results: Path = Path("results")) -> Samples:
    """What is known of a data set: its shards where they are written, else the tables."""
    settings = config.data.sets[name]
    text = KNOWN.get(Path(settings.annotations).name, UNKNOWN)
    if config.miniature is not None:
        text = UNKNOWN
    written = results / config.run / "data" / name / "shards.json"
    if written.is_file():
        return Samples(name, files.read_json(written)["train"], text, str(written))
    if config.miniature is not None:
        number = getattr(config.miniature, f"{name}_samples", None)
        where = f"miniature.{name}_samples"
    else:
        number, where = text.num_samples, f"table of known data sets, {settings.annotations}"
    if number is None:
        return Samples(name, None, text, "unknown before it is fetched")
    return Samples(name, round(number * (1 - settings.validation_share)), text, where)


@dataclass(frozen=True)
class Workload:
    """A packed sequence, in means over the blend."""

    slots: int
    """Padding included: memory is needed for these."""
    tokens: float
    samples: float
    pictures: float
    trained_tokens: float
    pairs: float
    """Of queries and keys that see each other: L (L + 1) / 2 in a sample of L tokens."""


def of_sequence(config: Config, stage: str, bases: Bases) -> Workload:
    """What a packed sequence of a stage holds.

    The blend's weights are shares of the samples. Samples count with their mean length; the pairs of samples of unequal
    lengths are more.
    """
    settings = config.stages[stage]
    texts = {name: of_set(config, name).text for name in settings.data}
    total = sum(settings.data.values())
    shares = {name: weight / total for name, weight in settings.data.items()}
    patches = bases.vision.num_image_tokens

    def mean(value: str) -> float:
        return sum(share * getattr(texts[name], value) for name, share in shares.items())

    length = mean("tokens") + patches * mean("pictures")
    tokens = settings.sequence_length * FILLED
    samples = tokens / length
    return Workload(
        slots=settings.sequence_length,
        tokens=tokens,
        samples=samples,
        pictures=samples * mean("pictures"),
        trained_tokens=samples * mean("trained_tokens"),
        pairs=samples * length * (length + 1) / 2,
    )
