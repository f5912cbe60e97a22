"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny_language_dir() -> Path:
    """The miniature language model as a Hugging Face folder."""
    return ROOT / "resources/tiny/language"


@pytest.fixture(scope="session")
def tiny_vision_dir() -> Path:
    """The miniature vision model as a Hugging Face folder."""
    return ROOT / "resources/tiny/vision"
