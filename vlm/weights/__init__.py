"""Weights in Hugging Face names and layouts: tables that are read both ways, and folders read as a stream."""

from __future__ import annotations

from vlm.weights.folder import Folder, write_sharded
from vlm.weights.tables import Row, Table, language_table, projector_table, vision_table

__all__ = ["Folder", "Row", "Table", "language_table", "projector_table", "vision_table", "write_sharded"]
