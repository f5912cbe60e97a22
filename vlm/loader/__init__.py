"""The endless stream of packed sequences of a stage: the same for the same seed, going on exactly where it stopped.

Energon reads the shards, draws from the data sets by weight and shuffles; `encoder` tokenises and packs.
"""

from __future__ import annotations

import json
import pickle
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron import energon

from vlm.batch import PackedBatch
from vlm.config import Config
from vlm.loader import blend
from vlm.loader.encoder import Encoder, Packed, TooManyRejected, stop
from vlm.prompt import Prompter

__all__ = ["Loader", "build"]

_STATE_VERSION = 1
_CHECKPOINT_SECONDS = 10
"""A loader process can only be restored at its own checkpoints, and reads on from there to where it was."""


def build(
    config: Config,
    stage: str,
    data_dirs: Mapping[str, Path],
    language_dir: Path,
    vision_dir: Path,
    rank: int = 0,
    world: int = 1,
    *,
    blend_path: Path | None = None,
) -> Loader:
    """Open the training data of a stage.

    Args:
        config: settings of the run.
        stage: name under `stages`.
        data_dirs: indexed folder of each data set of the stage.
        language_dir: Hugging Face folder of the tokenizer.
        vision_dir: Hugging Face folder whose config.json gives image and patch size.
        rank, world: this data-parallel rank and their number.
        blend_path: where to write the MetadatasetV2 file (default: a temporary file).

    Raises:
        ValueError: a data set is missing, not indexed or truncated, or has fewer samples than there are loader
            processes; the tokenizer does not know the image token; a sample of one picture fills the whole sequence.
    """
    settings = config.stages[stage]
    if missing := [name for name in settings.data if name not in data_dirs]:
        raise ValueError(f"stages.{stage}.data: no folder is given for {', '.join(missing)}")
    totals = {name: blend.count(data_dirs[name]) for name in settings.data}
    processes = max(config.data.workers, 1) * world
    for name, total in totals.items():
        if total < processes:
            raise ValueError(
                f"data set {name} has {total} training samples for {processes} loader processes "
                f"(data.workers = {config.data.workers} x {world} data-parallel ranks)"
            )
    allowed = {name: config.data.max_rejected_share * total / world for name, total in totals.items()}
    image_size, num_image_tokens = _vision_sizes(vision_dir)
    if num_image_tokens >= settings.sequence_length:
        raise ValueError(
            f"stages.{stage}.sequence_length: {settings.sequence_length} leaves no room for text beside the "
            f"{num_image_tokens} tokens of a picture"
        )
    encoder = Encoder(
        prompter=Prompter(language_dir, config.models.language.image_token, num_image_tokens),
        image_size=image_size,
        image_resize=config.data.image_resize,
        plain=settings.prompt == "plain",
        sequence_length=settings.sequence_length,
        max_rejected=sum(allowed.values()),
    )
    workers = energon.WorkerConfig(
        rank=rank,
        world_size=world,
        num_workers=config.data.workers,
        seed_offset=config.seed,
        global_error_handler=stop,
    )
    with tempfile.TemporaryDirectory() as folder:
        dataset = energon.get_train_dataset(
            blend.write(blend_path or Path(folder) / "blend.yaml", settings.data, data_dirs),
            worker_config=workers,
            batch_size=None,
            shuffle_buffer_size=config.data.shuffle_buffer,
            max_samples_per_sequence=100,
            packing_buffer_size=config.data.packing_buffer,
            task_encoder=encoder,
        )
    stream = energon.get_savable_loader(
        dataset,
        checkpoint_every_sec=_CHECKPOINT_SECONDS,
        # Freezing the garbage collector is for loader processes; in the main one the model lives.
        **({} if config.data.workers else {"gc_collect_every_n_steps": 0}),
    )
    return Loader(stream, settings.sequence_length, allowed, config.data.max_rejected_share)


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

    def __init__(
        self, stream: Any, sequence_length: int, allowed: Mapping[str, float], max_rejected_share: float
    ) -> None:
        self._stream = stream
        self._iterator: Iterator[Packed] | None = None
        self._sequence_length = sequence_length
        self._allowed = allowed
        self._max_rejected_share = max_rejected_share
        self.num_sequences = 0
        self.num_samples = 0
        self.num_tokens = 0
        """Without padding."""
        self.rejected: dict[str, str] = {}
        """Samples that could not be used, as `<data set>/<key>` -> reason; one that returns every epoch counts once."""

    @property
    def packing_efficiency(self) -> float:
        """Share of the tokens so far that are not padding."""
        return self.num_tokens / max(self.num_sequences * self._sequence_length, 1)

    def __next__(self) -> PackedBatch:
        """The next sequence.

        Raises:
            ValueError: more than `data.max_rejected_share` of a data set's samples could not be used.
        """
        if self._iterator is None:
            self._iterator = iter(self._stream)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*'pin_memory' argument is set as true")
                packed = next(self._iterator)
        except TooManyRejected as error:
            raise ValueError(
                f"{_last_line(error)}. data.max_rejected_share allows {self._max_rejected_share:.2%}"
            ) from None
        self.num_sequences += 1
        self.num_samples += len(packed.batch.sample_keys)
        self.num_tokens += packed.batch.num_tokens
        if packed.rejected:
            self.rejected |= packed.rejected
            self._check_rejected()
        return packed.batch

    def _check_rejected(self) -> None:
        for name, allowed in self._allowed.items():
            reasons = [reason for key, reason in self.rejected.items() if key.startswith(f"{name}/")]
            if len(reasons) > allowed:
                raise ValueError(
                    f"{len(reasons)} samples of data set {name} cannot be used, more than data.max_rejected_share = "
                    f"{self._max_rejected_share:.2%} of it. The first: {reasons[0]}"
                )

    def state(self) -> bytes:
        """Everything that is needed to go on with the sequence after the last one that was taken."""
        counts = {name: getattr(self, name) for name in ("num_sequences", "num_samples", "num_tokens", "rejected")}
        return pickle.dumps({"version": _STATE_VERSION, "stream": self._stream.save_state_rank(), "counts": counts})

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
