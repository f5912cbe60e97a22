"""From a folder on disk to something that answers: the model, its tokenizer and how it wants its pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from vlm import checkpoint, images, parallel, weights
from vlm.checkpoint import Manifest
from vlm.config import Config, Kernels
from vlm.generate.decode import Decoder, Prompt
from vlm.prompt import Prompter

if TYPE_CHECKING:
    from vlm.model import Llava

Backend = Literal["torch", "triton", "transformer_engine"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Speaker:
    model: Llava
    prompter: Prompter
    resize: images.Resize

    def prompt(self, asked: str | Sequence[Mapping[str, str]], pictures: Sequence[bytes | Path], name: str) -> Prompt:
        """A prompt about pictures, each decoded and brought to the model's size.

        Args:
            asked: the user's turn, or the conversation that ends with it, with one `<image>` per picture.
            pictures: files or their bytes.
            name: what to call the prompt in a message.

        Raises:
            ValueError: a picture that does not decode, or not as many pictures as places.
        """
        tokens = self.prompter.generation(asked, len(pictures), key=name)
        return Prompt(tokens, [self._pixels(picture, name) for picture in pictures], name)

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Greedy answers as text, without the blank that begins and the token that ends them."""
        answers = self._decoder(prompts, max_new_tokens)
        return [self.prompter.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]

    @cached_property
    def _decoder(self) -> Decoder:
        end = self.prompter.tokenizer.eos_token_id
        return Decoder(self.model, image_token_id=self.prompter.image_token_id, end=end)

    def _pixels(self, picture: bytes | Path, name: str) -> np.ndarray:
        decoded = images.load(picture, name=name if isinstance(picture, bytes) else None)
        return images.resize(decoded, self.model.vision_model.img_h, self.resize)


def identity(folder: Path) -> str:
    """Hash of the weights a folder stands for: of the manifest, or of an exported folder's files.

    Raises:
        ValueError: neither.
    """
    if not weights.is_exported(folder):
        return checkpoint.read_manifest(checkpoint.resolve(folder)).identity
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with open(path, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def check(config: Config, folder: Path) -> None:
    """Refuse a model that the configuration does not describe; the prompts are asked as it was trained.

    Raises:
        ValueError: naming the key and both values, or that the folder is no model.
    """
    if weights.is_exported(folder):
        exported = weights.read_exported(folder)
        checkpoint.check_settings(config, folder, exported.models.model_dump(), exported.image_resize)
    else:
        manifest = checkpoint.read_manifest(checkpoint.resolve(folder))
        _whole(folder, manifest)
        checkpoint.check_settings(config, folder, manifest.models, manifest.settings["image_resize"])


def _own_dtype(stored: str) -> Dtype:
    """The type to compute in where none is named: what the weights were made in, or for float16 one that holds it."""
    return "float32" if stored == "float16" else cast(Dtype, stored)


def _whole(folder: Path, manifest: Manifest) -> None:
    if manifest.kind not in ("combined", "stage"):
        raise ValueError(f"{folder}: holds a {manifest.kind} model alone, which cannot answer about pictures")


def load(folder: Path, *, backend: Backend = "torch", dtype: Dtype | None = None) -> Speaker:
    """Load a model into this process, ready to answer.

    Args:
        folder: checkpoint, folder of a stage, or exported folder.
        backend: kernels to run on.
        dtype: of weights and activations; None for the one it was made with.

    Raises:
        ValueError: the folder is neither, or incomplete.
    """
    parallel.initialize(None, seed=0)
    if weights.is_exported(folder):
        return _load_exported(folder, backend, dtype)
    found = checkpoint.resolve(folder)
    manifest = checkpoint.read_manifest(found)
    _whole(found, manifest)
    from vlm.model import build_from_checkpoint

    model = build_from_checkpoint(found, backend=backend, dtype=dtype or _own_dtype(manifest.settings["dtype"]))
    token = manifest.models["language"]["image_token"]
    prompter = Prompter(checkpoint.huggingface(found, "language"), token, model.num_image_tokens)
    return Speaker(model, prompter, manifest.settings["image_resize"])


def _load_exported(folder: Path, backend: Backend, dtype: Dtype | None) -> Speaker:
    from vlm.model import Settings, build
    from vlm.model.builder import read_pixel_statistics

    exported = weights.read_exported(folder)
    settings = Settings(
        exported.models, Kernels(backend=backend), dtype or _own_dtype(exported.dtype), parallel.single()
    )
    mean, std = read_pixel_statistics(folder)
    configs = exported.language_config, exported.vision_config
    model = build(*configs, settings, image_mean=mean, image_std=std, initialise=False)
    weights.load_exported(model, folder)
    prompter = Prompter(folder, exported.models.language.image_token, model.num_image_tokens)
    return Speaker(model.eval(), prompter, cast(images.Resize, exported.image_resize))
