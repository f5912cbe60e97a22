"""Weights in Hugging Face names and layouts: tables that are read both ways, and folders read as a stream."""

from __future__ import annotations

from vlm.weights.exported import Exported, exported_rows, is_exported, load_exported, read_exported
from vlm.weights.folder import Folder, write_sharded
from vlm.weights.tables import OPENAI, Row, Table, language_table, projector_table, vision_naming, vision_table

__all__ = [
    "OPENAI",
    "Exported",
    "Folder",
    "Row",
    "Table",
    "exported_rows",
    "is_exported",
    "language_table",
    "load_exported",
    "projector_table",
    "read_exported",
    "vision_naming",
    "vision_table",
    "write_sharded",
]
