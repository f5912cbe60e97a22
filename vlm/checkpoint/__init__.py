"""Checkpoints: what one is, where it lies, how it is written whole or not at all, and how a model is loaded from it.

A checkpoint is a folder with a megatron-core distributed checkpoint (`torch_dist`), `manifest.json` and
`huggingface/{language,vision}/` with configuration, tokenizer and image processor, so that it needs nothing else.
Reading manifests and finding checkpoints imports no torch; what needs it is imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vlm.checkpoint.manifest import PARTS, Manifest, Parent, check_settings, read_manifest
from vlm.checkpoint.places import chain, huggingface, latest, resolve
from vlm.files import writing

if TYPE_CHECKING:
    from vlm.checkpoint.model import load_model, save
    from vlm.checkpoint.pending import NotSaved, Pending
    from vlm.checkpoint.stage import Resumed, begin_stage, load_stage, save_stage
    from vlm.checkpoint.tensors import Tensors, write_tensors

_LATER = {
    "load_model": "model",
    "save": "model",
    "NotSaved": "pending",
    "Pending": "pending",
    "Resumed": "stage",
    "begin_stage": "stage",
    "load_stage": "stage",
    "save_stage": "stage",
    "Tensors": "tensors",
    "write_tensors": "tensors",
}

__all__ = [
    "PARTS",
    "Manifest",
    "NotSaved",
    "Parent",
    "Pending",
    "Resumed",
    "Tensors",
    "begin_stage",
    "chain",
    "check_settings",
    "huggingface",
    "latest",
    "load_model",
    "load_stage",
    "read_manifest",
    "resolve",
    "save",
    "save_stage",
    "write_tensors",
    "writing",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"vlm.checkpoint.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
