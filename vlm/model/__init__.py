"""The vision-language model on megatron-core.

Names are imported when they are used: `vlm.model.sizes` reads configurations without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.model.builder import Settings, build, build_from_checkpoint
    from vlm.model.llava import Llava

_HOMES = {
    "Llava": "vlm.model.llava",
    "Settings": "vlm.model.builder",
    "build": "vlm.model.builder",
    "build_from_checkpoint": "vlm.model.builder",
}
__all__ = ["Llava", "Settings", "build", "build_from_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
