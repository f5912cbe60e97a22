"""`vlm convert combine`: both base models and a fresh projector in one checkpoint, where training starts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from vlm import checkpoint
from vlm import config as settings
from vlm.checkpoint import PARTS, Manifest, Tensors
from vlm.checkpoint.manifest import NAME, Kind
from vlm.checkpoint.tensors import Spec
from vlm.convert.source import read_config, sha256
from vlm.model.sizes import language_sizes, vision_sizes
from vlm.weights import language_table, projector_table, vision_table
from vlm.weights.tables import num_bytes


def combine(config: Path, language: Path, vision: Path, out: Path) -> None:
    """Join two converted models and a projector drawn from `models.projector` and `seed`.

    Args:
        config: resolved settings of the run.
        language, vision: checkpoints that `vlm convert` wrote.
        out: the checkpoint. Complete or absent; what was there before is replaced at the end.

    Raises:
        ValueError: a checkpoint of another kind or with other weights than its config.json describes, an image token
            that is not one token of the vocabulary, a feature layer that the vision model does not have, or a projector
            that cannot be exported though the run is to be.
    """
    run = settings.load(config)
    parents = {
        "language": Tensors(_of_kind(Path(language), "language")),
        "vision": Tensors(_of_kind(Path(vision), "vision")),
    }
    folders = {kind: tensors.links[0][0] for kind, tensors in parents.items()}
    manifests = {kind: tensors.links[0][1] for kind, tensors in parents.items()}
    for kind, tensors in parents.items():
        _check_weights(kind, tensors)
    projector = _projector(run, folders)
    image_token_id(folders["language"], run.models.language.image_token)

    specs: dict[str, Spec] = {}
    for tensors in parents.values():
        specs.update(tensors.specs)
    specs.update({key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in projector.items()})
    total = sum(num_bytes(shape, dtype) for dtype, shape in specs.values())
    reads = folders.values()
    with checkpoint.writing(Path(out), reads=reads, needed_bytes=total, replaces=NAME) as folder:
        with tqdm(total=total, desc="combine", unit="B", unit_scale=True) as bar:

            def make(key: str) -> Tensor:
                bar.update(num_bytes(specs[key][1], specs[key][0]))
                if key in projector:
                    return projector[key]
                return next(tensors for tensors in parents.values() if key in tensors.specs).read(key)

            checkpoint.write_tensors(folder, specs, make)
        for kind, place in folders.items():
            shutil.copytree(checkpoint.huggingface(place, kind), checkpoint.huggingface(folder, kind))
        Manifest(
            kind="combined",
            parts=tuple(PARTS.values()),
            sources={name: digest for manifest in manifests.values() for name, digest in manifest.sources.items()},
            models=run.models.model_dump(mode="json"),
            settings={"seed": run.seed, "dtype": run.dtype, "image_resize": run.data.image_resize},
            configuration=sha256(Path(config)),
        ).write(folder)


def image_token_id(language: Path, image_token: str) -> int:
    """The id of the image token in a checkpoint's language model; errors are those of `token_id`."""
    folder = checkpoint.huggingface(language, "language")
    return token_id(folder, read_config(folder), image_token)


def token_id(folder: Path, language: Mapping[str, Any], image_token: str) -> int:
    """The id of the image token.

    Args:
        folder: holds the tokenizer.
        language: the language model's configuration.

    Raises:
        ValueError: the tokenizer does not read it as one token, or the model has no embedding for it.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(image_token, add_special_tokens=False).ids
    token = tokenizer.token_to_id(image_token)
    if token is None or ids != [token]:
        raise ValueError(
            f"models.language.image_token: {image_token!r} is {len(ids)} tokens in {folder / 'tokenizer.json'}, "
            "it must be one; choose a reserved token of the vocabulary"
        )
    vocabulary = language_sizes(language).vocab_size
    if token >= vocabulary:
        raise ValueError(
            f"models.language.image_token: {image_token!r} has id {token}, the model's vocab_size is {vocabulary}; "
            "choose a reserved token inside the vocabulary"
        )
    return int(token)


def _of_kind(path: Path, kind: Kind) -> Path:
    found = checkpoint.resolve(path)
    if (other := checkpoint.read_manifest(found).kind) != kind:
        raise ValueError(f"{path}: is a {other} checkpoint, expected one of `vlm convert {kind}`")
    return found


def _check_weights(kind: str, tensors: Tensors) -> None:
    """Refuse a converted model whose weights are not those that its config.json describes."""
    folder = tensors.links[0][0]
    config = read_config(checkpoint.huggingface(folder, kind))
    table = language_table(config) if kind == "language" else vision_table(config)
    wanted = {row.ours: row.shape for row in table.rows}
    found = {key: tuple(shape) for key, (_, shape) in tensors.specs.items()}
    for key in {**wanted, **found}:
        if wanted.get(key) != found.get(key):
            raise ValueError(
                f"{folder}: {key} has shape {found.get(key)}, its config.json gives {wanted.get(key)}; convert it again"
            )


def _projector(run: settings.Config, folders: dict[str, Path]) -> dict[str, Tensor]:
    """A projector whose weights are N(0, init_std) and whose biases are zero, in an order that never changes."""
    configs: dict[str, dict[str, Any]] = {
        kind: read_config(checkpoint.huggingface(folder, kind)) for kind, folder in folders.items()
    }
    language, vision = language_sizes(configs["language"]), vision_sizes(configs["vision"])
    vision.num_built_layers(run.models.vision.feature_layer)
    wanted = run.models.projector
    if run.export and wanted.hidden_size != language.hidden_size:
        raise ValueError(
            f"models.projector.hidden_size: {wanted.hidden_size} cannot be exported to transformers, whose projector "
            f"has the language model's hidden size {language.hidden_size} in the middle; use that, or set export: false"
        )
    table = projector_table(vision.hidden_size, wanted.hidden_size, language.hidden_size, bias=wanted.bias)
    generator = torch.Generator().manual_seed(run.seed)
    tensors = {}
    for row in table.rows:
        tensor = torch.zeros(row.shape)
        if row.ours.endswith("weight"):
            tensor.normal_(0.0, wanted.init_std, generator=generator)
        tensors[row.ours] = tensor.to(getattr(torch, run.dtype))
    return tensors
