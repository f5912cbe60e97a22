"""Bytes on disk: base models, checkpoints and data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlm import files
from vlm.config import Config
from vlm.resources import parameters
from vlm.resources.bases import Bases
from vlm.resources.memory import FP32

GB = 10**9
FETCHED = {
    "liuhaotian/LLaVA-Pretrain": 27 * GB,
    "liuhaotian/LLaVA-Instruct-150K": 1 * GB,
    "http://images.cocodataset.org/zips/train2017.zip": 19 * GB,
    "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip": 20 * GB,
    "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip": 7 * GB,
    "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip": 9 * GB,
    "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip": 6 * GB,
    "http://images.cocodataset.org/zips/val2014.zip": 13 * GB,
    "https://storage.googleapis.com/sfr-vision-language-research/datasets/coco_karpathy_test_gt.json": 10**7,
    "MMMU/MMMU": 400 * 10**6,
}
"""What is fetched, by source, as docs/data.md has it; val2014 twice, since its pictures are read unpacked."""
SHARDS = {"blip_laion_cc_sbu_558k.json": 27 * GB, "llava_v1_5_mix665k.json": 90 * GB}
"""By annotations file, as docs/data.md has it: a picture is stored with every conversation about it."""


@dataclass(frozen=True)
class Checkpoints:
    """Those of a stage."""

    each: int
    """Bytes of one."""
    number: int
    """At most at once: those that are kept, the best one beside them, and the one that is being written."""

    @property
    def total(self) -> int:
        return self.each * self.number


def base_models(bases: Bases, config: Config) -> dict[str, int]:
    """Weights of the base models, by part, in the type that they are stored in. Of CLIP the vision tower alone; a
    repository may hold its text tower too."""
    language = parameters.of_parts(bases, config)["language"].total * bases.stored_bytes("language")
    tower = parameters.vision(bases, -1).total + 2 * bases.vision.hidden_size  # the norm after it, for the export
    return {"language": language, "vision": tower * bases.stored_bytes("vision")}


def combined(bases: Bases, config: Config) -> int:
    """Weights of the combined checkpoint: both models as they were converted, and the projector."""
    size = 2 if config.dtype == "bfloat16" else 4
    return sum(base_models(bases, config).values()) + parameters.projector(bases, config).total * size


def of_stage(config: Config, stage: str, bases: Bases) -> Checkpoints:
    """Checkpoints of a stage: what learns, Adam's two moments, and a master in fp32 where the weights are bfloat16 or
    the distributed optimizer keeps them apart."""
    settings = config.stages[stage]
    counts = parameters.of_parts(bases, config)
    trained = sum(counts[part].total for part in settings.trainable)
    master = config.dtype == "bfloat16" or config.parallel.distributed_optimizer
    each = trained * ((2 if config.dtype == "bfloat16" else 4) + (2 + master) * FP32)
    return Checkpoints(each, settings.keep + settings.keep_best + 1)


def fetched(origins: str | tuple[str, ...]) -> int | None:
    """Bytes of what the origins of a data set take; None where one of them is not known."""
    several = (origins,) if isinstance(origins, str) else origins
    sizes = [_of_origin(origin.split("#")[0]) for origin in several]
    return None if None in sizes else sum(size for size in sizes if size)


def _of_origin(origin: str) -> int | None:
    path = Path(origin).expanduser()
    if path.exists():  # it is where it is, and linked to
        return 0
    return FETCHED.get(origin.split("@")[0])


def shards(config: Config, name: str, results: Path = Path("results")) -> int | None:
    """Bytes of a data set's shards: as they are, as the table has them, or as much as what they are made from."""
    written = results / config.run / "data" / name / "shards.json"
    if written.is_file():
        return sum(files.read_json(written)["sizes"].values())
    settings = config.data.sets[name]
    return SHARDS.get(Path(settings.annotations).name) if config.miniature is None else None
