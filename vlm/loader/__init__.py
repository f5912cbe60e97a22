"""The packed sequences of a stage: those of training without end, the same for the same seed and going on exactly where
they stopped; those of validation the same each time.

Energon reads the training shards, draws from the data sets by weight and shuffles; `encoder` tokenises, packs and
decodes for it. `validation` needs none of that.
"""

from __future__ import annotations

import json
import pickle
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from megatron import energon

from vlm.batch import PackedBatch
from vlm.config import Config
from vlm.loader import blend
from vlm.loader.encoder import Encoder, Packed, TooManyRejected, stop
from vlm.loader.preparation import Preparation
from vlm.loader.rejection import Rejection
from vlm.loader.validation import Validation
from vlm.prompt import Prompter

__all__ = ["Loader", "Validation", "build"]

_STATE_VERSION = 2
_CHECKPOINT_SECONDS = 10
"""A loader process can only be restored at its own checkpoints, and reads on from there to where it was."""

_COUNTS = ("num_sequences", "num_samples", "num_tokens")
_Dirs = Mapping[str, Path]


def build(
    config: Config,
    stage: str,
    data_dirs: _Dirs,
    language_dir: Path,
    vision_dir: Path,
    rank: int = 0,
    world: int = 1,
    *,
    split: Literal["train", "val"] = "train",
) -> Loader | Validation:
    """Open the training or the validation data of a stage.

    Args:
        config: settings of the run.
        stage: name under `stages`.
        data_dirs: indexed folder of each data set of the stage.
        language_dir: Hugging Face folder of the tokenizer.
        vision_dir: Hugging Face folder whose config.json gives image and patch size.
        rank, world: this data-parallel rank and their number.
        split: `train`, drawn by weight and without end, or `val`, each sample once.

    Raises:
        ValueError: a data set is missing, not indexed or truncated, or has fewer samples than there are loader
            processes; none has validation samples; the tokenizer does not know the image token; a sample of one
            picture fills the whole sequence.
    """
    settings = config.stages[stage]
    if missing := [name for name in settings.data if name not in data_dirs]:
        raise ValueError(f"stages.{stage}.data: no folder is given for {', '.join(missing)}")
    dirs = {name: data_dirs[name] for name in settings.data}
    totals = {name: blend.count(directory) for name, directory in dirs.items()}
    image_size, num_image_tokens = _vision_sizes(vision_dir)
    if num_image_tokens >= settings.sequence_length:
        raise ValueError(
            f"stages.{stage}.sequence_length: {settings.sequence_length} leaves no room for text beside the "
            f"{num_image_tokens} tokens of a picture"
        )
    preparation = Preparation(
        prompter=Prompter(language_dir, config.models.language.image_token, num_image_tokens),
        image_size=image_size,
        image_resize=config.data.image_resize,
        plain=settings.prompt == "plain",
        sequence_length=settings.sequence_length,
    )
    if split == "val":
        return _validation(config, stage, dirs, preparation, rank, world)
    return _training(config, stage, dirs, totals, preparation, rank, world)


def _validation(config: Config, stage: str, dirs: _Dirs, preparation: Preparation, rank: int, world: int) -> Validation:
    entries = {name: blend.validation(name, directory) for name, directory in dirs.items()}
    without = [name for name, several in entries.items() if not several]
    if without:
        message = f"stages.{stage}: no validation samples in {', '.join(without)}; data.sets.<name>.validation_share"
        if len(without) == len(entries):
            raise ValueError(f"{message} sets them apart when `vlm data shard` runs")
        if rank == 0:
            print(f"{message} would set some apart. The validation loss is that of the others.", file=sys.stderr)
    totals = {name: len(several) for name, several in entries.items() if several}
    return Validation(
        preparation,
        {name: entries[name] for name in totals},
        Rejection(totals, config.data.max_rejected_share),
        rank,
        world,
        max(config.data.workers, 1),
    )


def _training(
    config: Config,
    stage: str,
    dirs: _Dirs,
    totals: Mapping[str, int],
    preparation: Preparation,
    rank: int,
    world: int,
) -> Loader:
    settings = config.data
    processes = max(settings.workers, 1) * world
    for name, total in totals.items():
        if total < processes:
            raise ValueError(
                f"data set {name} has {total} training samples for {processes} loader processes "
                f"(data.workers = {settings.workers} x {world} data-parallel ranks)"
            )
    rejection = Rejection({name: total / world for name, total in totals.items()}, settings.max_rejected_share)
    workers = energon.WorkerConfig(
        rank=rank,
        world_size=world,
        num_workers=settings.workers,
        seed_offset=config.seed,
        global_error_handler=stop,
    )
    with tempfile.TemporaryDirectory() as folder:
        dataset = energon.get_train_dataset(
            blend.write(Path(folder) / "blend.yaml", config.stages[stage].data, dirs),
            worker_config=workers,
            batch_size=None,
            shuffle_buffer_size=settings.shuffle_buffer,
            max_samples_per_sequence=settings.shuffle_run,
            packing_buffer_size=settings.packing_buffer,
            task_encoder=Encoder(preparation, rejection.allowed),
        )
    stream = energon.get_savable_loader(
        dataset,
        checkpoint_every_sec=_CHECKPOINT_SECONDS,
        # Freezing the garbage collector is for loader processes; in the main one the model lives.
        **({} if settings.workers else {"gc_collect_every_n_steps": 0}),
    )
    return Loader(stream, dirs.values(), preparation.sequence_length, rejection)


def _vision_sizes(folder: Path) -> tuple[int, int]:
    """Image edge in pixels and image tokens per picture."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    tree = json.loads(path.read_text())
    tree = tree.get("vision_config", tree)
    return tree["image_size"], (tree["image_size"] // tree["patch_size"]) ** 2


class Loader(Iterator[PackedBatch]):
    """Packed sequences without end, and what became of the samples so far."""

    def __init__(self, stream: Any, dirs: Iterable[Path], sequence_length: int, rejection: Rejection) -> None:
        self._stream = stream
        self._iterator: Iterator[Packed] | None = None
        self._dirs = tuple(dirs)
        self._sequence_length = sequence_length
        self._rejection = rejection
        self.num_sequences = 0
        self.num_samples = 0
        self.num_tokens = 0
        """Without padding."""

    @property
    def rejected(self) -> dict[str, str]:
        """Samples that could not be used, as `<data set>/<key>` -> reason; one that returns every epoch counts once."""
        return self._rejection.reasons

    @property
    def packing_efficiency(self) -> float:
        """Share of the tokens so far that are not padding."""
        return self.num_tokens / max(self.num_sequences * self._sequence_length, 1)

    def __next__(self) -> PackedBatch:
        """The next sequence.

        Raises:
            ValueError: more than `data.max_rejected_share` of a data set's samples could not be used, or a shard was
                damaged or has vanished since the loader was opened.
        """
        if self._iterator is None:
            self._iterator = iter(self._stream)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*'pin_memory' argument is set as true")
                packed = next(self._iterator)
        except TooManyRejected as error:
            share = f"{self._rejection.max_share:.2%}"
            raise ValueError(f"{_last_line(error)}. data.max_rejected_share allows {share}") from None
        except (OSError, ValueError, tarfile.TarError):
            for directory in self._dirs:  # says which shard it is, if one was damaged meanwhile
                blend.count(directory)
            raise
        self.num_sequences += 1
        self.num_samples += len(packed.batch.sample_keys)
        self.num_tokens += packed.batch.num_tokens
        self._rejection.add(packed.rejected)
        return packed.batch

    def state(self) -> bytes:
        """Everything that is needed to go on with the sequence after the last one that was taken."""
        state = {
            "version": _STATE_VERSION,
            "stream": self._stream.save_state_rank(),
            "counts": {name: getattr(self, name) for name in _COUNTS},
            "rejected": self.rejected,
        }
        return pickle.dumps(state)

    def restore(self, state: bytes) -> None:
        """Go on where `state` was taken. Only before the first sequence, with as many loader processes and ranks.

        Raises:
            ValueError: the state comes from another number of loader processes.
        """
        if self._iterator is not None:
            raise RuntimeError("restore() must come before the first sequence is taken")
        saved = pickle.loads(state)
        if saved["version"] != _STATE_VERSION:
            raise ValueError(f"loader state of version {saved['version']}, this program reads {_STATE_VERSION}")
        stream = saved["stream"]
        processes = self._stream.num_workers
        if stream is not None and len(stream.worker_states) != max(processes, 1):
            raise ValueError(
                f"data.workers: {processes}, but the checkpoint was made with {len(stream.worker_states)} loader "
                "processes; resume with the same number"
            )
        self._stream.restore_state_rank(stream)
        for name, value in saved["counts"].items():
            setattr(self, name, value)
        self._rejection.add(saved["rejected"])

    def close(self) -> None:
        """End the loader's processes. When the garbage collector does it, torch waits five seconds for each of them."""
        processes = getattr(self._stream, "_iterator", None)
        if processes is not None:
            processes._shutdown_workers()

    def __del__(self) -> None:
        self.close()


def _last_line(error: Exception) -> str:
    """The message alone: from a loader process it comes with a traceback before it."""
    return str(error).strip().splitlines()[-1].split("TooManyRejected: ")[-1]
