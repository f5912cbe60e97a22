"""Megatron-LM's per-rank files: their names, how tensors are divided over tensor-parallel ranks, and both as a stream.

A folder holds `latest_checkpointed_iteration.txt` and `iter_0000001/mp_rank_00/model_optim_rng.pt`, one `torch.save`
archive per rank (Megatron-LM, megatron/training/checkpointing.py: `get_checkpoint_name`). Names under `model` are those
of its `LLaVAModel`, or of `GPTModel` and `CLIPViTModel` where a part is alone. Norms before a linear layer are part of
it with Transformer Engine (`linear_qkv.layer_norm_weight`) and modules of their own without (`input_layernorm.weight`).

Archives are read and written at the offsets of their tensors, as safetensors are in `vlm.weights.folder`, so that
neither a rank nor the model is ever in memory as a whole.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals, skip_data

from vlm.weights.folder import read_bytes
from vlm.weights.tables import Shape

Spec = tuple[torch.dtype, Shape]
TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
LEFT_OUT = "left_out"
"""Beside `model` in files of ours: weights of the base models that no module of Megatron-LM's model takes."""
PARTS = ("vision_model.", "vision_projection.", "language_model.")
PADDED = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")
"""Tensors whose rows are the vocabulary, which Megatron-LM pads."""
_FUSED = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
_LINEAR = re.compile(r"(.*\.linear_(?:qkv|proj|fc1|fc2)\.)weight")
_ROWS = re.compile(r".*\b(linear_qkv|linear_fc1|word_embeddings|output_layer)\.(weight|bias)")
_COLUMNS = re.compile(r".*\b(linear_proj|linear_fc2)\.weight")
_GATED = re.compile(r"language_model\..*\.linear_fc1\.weight")


def fused(key: str) -> str:
    """Our name as Transformer Engine's layers have it."""
    for plain, inside in _FUSED.items():
        key = key.replace(plain, inside)
    return key


def plain(key: str) -> str:
    """The inverse of `fused`; leaves other names as they are."""
    for name, inside in _FUSED.items():
        key = key.replace(inside, name)
    return key


def extra_state(key: str) -> str | None:
    """Name of the state that Transformer Engine keeps beside a linear layer's weight; empty without 8-bit training."""
    found = _LINEAR.fullmatch(key)
    return f"{found[1]}_extra_state" if found else None


def is_taken(key: str, built: int) -> bool:
    """Whether Megatron-LM's model with `built` vision blocks has a module for a tensor of ours."""
    block = re.match(r"vision_model\.decoder\.layers\.(\d+)\.", key)
    return int(block[1]) < built if block else not key.startswith("vision_model.ln_post.")


def _dim(key: str) -> int | None:
    """The dimension that tensor-parallel ranks share; None for tensors that every rank holds whole."""
    return 0 if _ROWS.fullmatch(key) else 1 if _COLUMNS.fullmatch(key) else None


def local_shape(key: str, shape: Shape, size: int) -> Shape:
    """Shape of a tensor of ours on each of `size` ranks.

    Raises:
        ValueError: it does not divide.
    """
    dim = _dim(key)
    if dim is None:
        return shape
    pieces = size * (2 if _GATED.fullmatch(key) else 1)
    if shape[dim] % pieces:
        raise ValueError(f"{key}: {shape[dim]} of shape {list(shape)} do not divide over {size} tensor-parallel ranks")
    return (*shape[:dim], shape[dim] // size, *shape[dim + 1 :])


def divide(key: str, tensor: Tensor, size: int) -> list[Tensor]:
    """One tensor of ours as its ranks hold it; of [gate; up] each rank holds its own gate before its own up."""
    dim = _dim(key)
    if dim is None:
        return [tensor] * size
    if _GATED.fullmatch(key):
        return [torch.cat(pair) for pair in zip(*(half.chunk(size) for half in tensor.chunk(2)), strict=True)]
    return list(tensor.chunk(size, dim))


def join(key: str, pieces: list[Tensor]) -> Tensor:
    """The inverse of `divide`.

    Raises:
        ValueError: ranks disagree about a tensor that each of them holds whole.
    """
    dim = _dim(key)
    if dim is None:
        first = pieces[0].reshape(-1).view(torch.uint8)
        for rank, piece in enumerate(pieces):
            if not torch.equal(first, piece.reshape(-1).view(torch.uint8)):
                raise ValueError(f"{key}: mp_rank_00 and mp_rank_{rank:02d} hold different values of what they share")
        return pieces[0]
    if _GATED.fullmatch(key):
        halves = [piece.chunk(2) for piece in pieces]
        return torch.cat([half for side in zip(*halves, strict=True) for half in side])
    return torch.cat(pieces, dim)


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies in an archive."""

    dtype: torch.dtype
    shape: Shape
    strides: tuple[int, ...]
    start: int
    """Offset in the file in bytes."""


class _Archive:
    """One rank's file: its plain content, and the places of its weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path}: is truncated, or no archive of torch.save (PyTorch 1.6 and later)")
        content = _load(path)
        model = content.get("model") if isinstance(content, dict) else None
        if not isinstance(model, dict):
            raise ValueError(f"{path}: holds no 'model'; files of several model chunks ('model0') are not supported")
        self.args: Any = content.get("args", argparse.Namespace())
        self.weights: dict[str, _Entry] = {}
        for name, value in {**model, **content.get(LEFT_OUT, {})}.items():
            if name.endswith("_extra_state"):
                continue
            if not isinstance(value, Tensor):
                raise ValueError(f"{path}: {name} is {type(value).__name__}, expected a tensor")
            start = value.untyped_storage()._checkpoint_offset + value.storage_offset() * value.dtype.itemsize
            self.weights[name] = _Entry(value.dtype, tuple(value.shape), tuple(value.stride()), start)

    def read(self, name: str) -> Tensor:
        entry = self.weights[name]
        last = sum((size - 1) * stride for size, stride in zip(entry.shape, entry.strides, strict=True))
        count = 0 if 0 in entry.shape else last + 1
        data = read_bytes(self.path, entry.start, count * entry.dtype.itemsize, name)
        return data.view(entry.dtype).as_strided(entry.shape, entry.strides)


def _load(path: Path) -> Any:
    """The content of an archive with tensors that know their place and hold no data.

    Raises:
        ValueError: naming what it refers to that could run code.
    """
    with safe_globals([argparse.Namespace]):
        if get_unsafe_globals_in_checkpoint(str(path)):
            import megatron.core  # noqa: F401  declares the enumerations in Megatron-LM's `args` as harmless
        if refused := get_unsafe_globals_in_checkpoint(str(path)):
            raise ValueError(
                f"{path}: refers to {', '.join(sorted(refused))}, refused because loading it can run any code; save "
                "the checkpoint again with 'args' of plain values"
            )
        with FakeTensorMode():
            return torch.load(path, map_location="cpu", weights_only=True)


def find(path: Path) -> Path | None:
    """The folder of the `mp_rank_*` folders that `path` means, None if it holds none.

    Raises:
        ValueError: the tracker names an iteration that is not there, or several are there and no tracker.
    """
    if any(path.glob("mp_rank_*")):
        return path
    tracker = path / TRACKER
    if tracker.is_file():
        iteration = tracker.read_text().strip()
        folder = path / (f"iter_{int(iteration):07d}" if iteration.isdigit() else iteration)
        if not any(folder.glob("mp_rank_*")):
            raise ValueError(f"{tracker}: names {iteration}, but {folder.name} holds no mp_rank_00")
        return folder
    folders = sorted({rank.parent for rank in path.glob("*/mp_rank_*")})
    if len(folders) > 1:
        raise ValueError(f"{path}: holds {', '.join(f.name for f in folders)} and no {TRACKER}; name one of them")
    return folders[0] if folders else None


class Legacy:
    """Weights of Megatron-LM's per-rank files, whole and in our names."""

    def __init__(self, path: Path) -> None:
        """Read the names and shapes of all ranks.

        Raises:
            ValueError: no such files, pipeline or expert parallelism, a missing rank, ranks that differ, content that
                could run code, a tensor that is not of a known model.
        """
        folder = find(Path(path))
        if folder is None:
            raise ValueError(f"{path}: holds no iter_*/mp_rank_00/{FILE}")
        ranks = sorted(rank.name for rank in folder.glob("mp_rank_*"))
        expected = [f"mp_rank_{rank:02d}" for rank in range(len(ranks))]
        if any(re.fullmatch(r"mp_rank_\d+_\d+.*", rank) for rank in ranks):
            raise ValueError(
                f"{folder}: {ranks[-1]} is a file of a pipeline or of experts; only tensor parallelism is supported"
            )
        if ranks != expected:
            raise ValueError(f"{folder}: holds {', '.join(ranks)}, expected {', '.join(expected)}")
        self.folder = folder
        self.files = [folder / rank / FILE for rank in ranks]
        if missing := [str(file) for file in self.files if not file.is_file()]:
            raise ValueError(f"{missing[0]}: is missing")
        self._archives = [_Archive(file) for file in self.files]
        self.args: Any = self._archives[0].args
        self._check_ranks()
        prefix = _prefix(folder, self._archives[0].weights)
        self._names = {plain(prefix + name): name for name in self._archives[0].weights}
        self.specs: dict[str, Spec] = {key: self._spec(key) for key in self._names}

    def _check_ranks(self) -> None:
        first, size = self._archives[0], len(self._archives)
        for archive in self._archives:
            stated = getattr(archive.args, "tensor_model_parallel_size", size)
            if stated != size:
                raise ValueError(f"{archive.path}: is of {stated} tensor-parallel ranks, {size} are there")
            if odd := first.weights.keys() ^ archive.weights.keys():
                raise ValueError(f"{archive.path}: {min(odd)} is not in the files of all ranks")
            for name, entry in archive.weights.items():
                known = first.weights[name]
                if (entry.dtype, entry.shape) != (known.dtype, known.shape):
                    raise ValueError(
                        f"{archive.path}: {name} is {entry.dtype} {list(entry.shape)}, and {known.dtype} "
                        f"{list(known.shape)} in {first.path.parent.name}"
                    )

    def _spec(self, key: str) -> Spec:
        entry = self._archives[0].weights[self._names[key]]
        dim, shape = _dim(key), list(entry.shape)
        if dim is not None:
            shape[dim] *= len(self._archives)
        vocabulary = getattr(self.args, "vocab_size", None)
        if key in PADDED and isinstance(vocabulary, int) and vocabulary < shape[0]:
            shape[0] = vocabulary
        return entry.dtype, tuple(shape)

    def read(self, key: str) -> Tensor:
        """One whole tensor in its stored type, without the rows of padding where `args.vocab_size` names them.

        Raises:
            ValueError: ranks disagree about its values, or a file is truncated.
        """
        pieces = [archive.read(self._names[key]) for archive in self._archives]
        return join(key, pieces)[: self.specs[key][1][0]].contiguous()


def _prefix(folder: Path, names: Mapping[str, Any]) -> str:
    """What to put before the names of a model that is one part alone."""
    if any(name.startswith(PARTS) for name in names):
        return ""
    if "embedding.word_embeddings.weight" in names:
        return "language_model."
    if "class_token" in names:
        return "vision_model."
    raise ValueError(f"{folder}: its weights are neither those of a LLaVAModel nor of a GPTModel or CLIPViTModel")


def write(
    folder: Path,
    sections: Mapping[str, Mapping[str, str | None]],
    specs: Mapping[str, Spec],
    make: Callable[[str], Tensor],
    size: int,
    others: Mapping[str, Any],
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Write the files of all ranks into the folder of one iteration, each tensor being made once.

    Args:
        sections: by name (`model`, LEFT_OUT), names in the files and ours; None for an entry that holds nothing.
        specs: type and whole shape of each tensor of ours that is named, padding included.
        make: returns the tensor of a key.
        size: tensor-parallel ranks.
        others: what stands beside the sections in every file.
        progress: told the bytes made.
    """
    files = [folder / f"mp_rank_{rank:02d}" / FILE for rank in range(size)]
    with FakeTensorMode():
        empty = {
            section: {
                name: None if key is None else torch.empty(local_shape(key, specs[key][1], size), dtype=specs[key][0])
                for name, key in names.items()
            }
            for section, names in sections.items()
        }
    for file in files:
        file.parent.mkdir(parents=True)
        with skip_data(materialize_fake_tensors=True):
            torch.save({**others, **empty}, file)
    archives = [_Archive(file) for file in files]
    with ExitStack() as stack:
        streams = [stack.enter_context(open(file, "r+b")) for file in files]
        for names in sections.values():
            for name, key in names.items():
                if key is None:
                    continue
                tensor = make(key)
                assert (tensor.dtype, tuple(tensor.shape)) == specs[key], (key, tensor.dtype, tensor.shape)
                for stream, archive, piece in zip(streams, archives, divide(key, tensor, size), strict=True):
                    stream.seek(archive.weights[name].start)
                    stream.write(memoryview(piece.contiguous().view(-1).view(torch.uint8).numpy()))
                progress(tensor.nbytes)
