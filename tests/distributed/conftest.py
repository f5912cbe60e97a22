"""Puts the fixture modules within reach: pytest's importlib mode leaves folders off the path."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("distributed", "unit", "end_to_end"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))
