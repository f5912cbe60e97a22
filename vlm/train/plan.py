"""What a run will do, decided and checked before anything heavy is imported: refusals cost a second, not a minute."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm import checkpoint, files
from vlm.checkpoint import Manifest
from vlm.config import COMBINED, Config, Stage
from vlm.model.sizes import language_sizes, vision_sizes
from vlm.train import identity

_TURN_TOKENS = 5
"""`<s> [INST] ... [/INST] answer </s>`: what the shortest sample needs beside its picture."""


@dataclass(frozen=True)
class Plan:
    config: Config
    stage: str
    out: Path
    parent: Path
    """Checkpoint that training starts from."""
    data: dict[str, Path]
    """Indexed folder of each data set by name."""
    identity: dict[str, Any]

    @property
    def settings(self) -> Stage:
        return self.config.stages[self.stage]

    @property
    def digest(self) -> str:
        return identity.digest(self.identity)

    @property
    def num_micro_batches(self) -> int:
        """Packed sequences per step and data-parallel rank."""
        return self.settings.global_batch // self.config.parallel.data

    def finished(self) -> Path | None:
        """The final checkpoint, where this very run was already trained to its end."""
        if identity.read(self.out / "checkpoints") != self.identity:
            return None
        newest = checkpoint.latest(self.out)
        report = _report(self.out)
        if newest is None or report.get("checkpoint") != str(newest.relative_to(self.out)):
            return None
        return newest if _at_its_end(self.settings, checkpoint.read_manifest(newest).iteration, report) else None


def prepare(config: Config, stage: str, start_from: Path, data: Path, out: Path) -> Plan:
    """Check that the stage can be trained as the settings say.

    Raises:
        ValueError: the stage, its parent checkpoint, the models or the sequence length do not fit; names the key and
            both values.
        FileNotFoundError: a data set is missing or not indexed.
    """
    if stage not in config.stages:
        close = difflib.get_close_matches(stage, config.stages, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"--stage: {stage!r} is not a stage, allowed are {', '.join(config.stages)}{hint}")
    parent = checkpoint.resolve(start_from)
    manifest = checkpoint.read_manifest(parent)
    _check_parent(config, stage, start_from, parent, manifest)
    checkpoint.check_settings(config, parent, manifest.models, manifest.settings.get("image_resize"))
    _check_sizes(config, stage, parent)
    folders = {name: data / name for name in config.stages[stage].data}
    fingerprints = {name: identity.fingerprint(folder) for name, folder in folders.items()}
    described = identity.describe(config, stage, manifest.identity, fingerprints)
    return Plan(config, stage, out, parent, folders, described)


def _check_parent(config: Config, stage: str, start_from: Path, parent: Path, manifest: Manifest) -> None:
    wanted = config.stages[stage].start_from
    found = manifest.stage if manifest.kind == "stage" else manifest.kind
    if found != wanted:
        raise ValueError(f"stages.{stage}.start_from: is {wanted!r}, but --start-from {start_from} holds {found!r}")
    if wanted == COMBINED or parent == start_from:  # a checkpoint named outright is taken at its word
        return
    settings = config.stages[wanted]
    if not _at_its_end(settings, manifest.iteration, _report(parent.parents[1])):
        raise ValueError(
            f"stages.{wanted}.iterations: is {settings.iterations}, but {start_from} stopped at {manifest.iteration}; "
            f"train it to its end, or start from {parent} itself"
        )


def _report(out: Path) -> dict[str, Any]:
    """What the stage in `out` said when it was finished, nothing where it is not."""
    path = out / "finished.json"
    return files.read_json(path) if path.is_file() else {}


def _at_its_end(settings: Stage, iteration: int | None, report: dict[str, Any]) -> bool:
    """Whether a stage that has come to `iteration` trains no further: it was the last one, or it stopped early with no
    less patience than it has now."""
    if iteration == settings.iterations:
        return True
    stale = report.get("stopped_early")
    if settings.early_stop is None or stale is None or report.get("iterations") != iteration:
        return False
    return bool(stale >= settings.early_stop)


def _check_sizes(config: Config, stage: str, parent: Path) -> None:
    read = {
        part: files.read_json(checkpoint.huggingface(parent, part) / "config.json") for part in ("language", "vision")
    }
    language_sizes(read["language"], config.parallel.tensor, config.parallel.pipeline)
    vision = vision_sizes(read["vision"], config.parallel.tensor)
    needed = vision.num_image_tokens + _TURN_TOKENS
    length = config.stages[stage].sequence_length
    if length < needed:
        raise ValueError(
            f"stages.{stage}.sequence_length: {length} cannot hold one picture of {vision.num_image_tokens} tokens "
            f"and a turn of text; at least {needed} are needed"
        )
