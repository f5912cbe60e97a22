"""A JSON list of samples that is never in memory as a whole: LLaVA's 665,000 conversations are a gigabyte of text.

One pass reads it piece by piece and keeps where each record begins; afterwards any record is read by its position.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PIECE = 1 << 20
"""Bytes read at a time. A record may be longer."""
MAX_RECORD = 1 << 26
"""Characters that a record may have: what goes on longer has lost its end, and would be read to the end of the file."""


class Annotations:
    """Records of the list in `path` by position, after `scan` has gone over them once.

    Safe to use in several processes at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = ""
        """Of the file, once it was scanned."""
        self._starts, self._ends = array("q"), array("q")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        start, end = self._starts[index], self._ends[index]
        with open(self.path, "rb", buffering=0) as stream:
            return json.loads(os.pread(stream.fileno(), end - start, start))

    def num_bytes(self, index: int) -> int:
        return self._ends[index] - self._starts[index]

    def scan(self, progress: Callable[[int], Any]) -> Iterator[Any]:
        """The records in their order.

        Args:
            progress: told of the bytes read.

        Raises:
            ValueError: the file is no JSON list, is empty, or ends too early; with the byte and what was found.
        """
        reader = _Reader(self.path, progress)
        if reader.blank() != "[":
            raise reader.error("a list of {id, image, conversations}")
        reader.take(1)
        while (following := reader.blank()) != "]":
            if self._starts:
                if following != ",":
                    raise reader.error("a comma or the end of the list")
                reader.take(1)
                reader.blank()
            start = reader.byte
            record = reader.value()
            self._starts.append(start)
            self._ends.append(reader.byte)
            yield record
        reader.take(1)
        if reader.blank():
            raise reader.error("nothing after the list")
        if not self._starts:
            raise ValueError(f"{self.path}: expected a list of {{id, image, conversations}}, found an empty one")
        self.sha256 = reader.hash.hexdigest()


class _Reader:
    """JSON text piece by piece. `byte` is the position in the file of what is read next."""

    def __init__(self, path: Path, progress: Callable[[int], Any]) -> None:
        self.hash = hashlib.sha256()
        self.byte = 0
        self._path, self._progress = path, progress
        self._pieces = self._read()
        self._text, self._at = "", 0
        self._decode = json.JSONDecoder().raw_decode
        while not self._text and self._more():  # until the first character is whole
            pass
        if self._text.startswith("\ufeff"):
            self.take(1)

    def blank(self) -> str:
        """Skip white space; the character after it, or nothing at the end of the file."""
        while True:
            rest = self._text[self._at : self._at + 64]
            kept = rest.lstrip(" \t\r\n")
            self.take(len(rest) - len(kept))
            if kept:
                return kept[0]
            if self._at == len(self._text) and not self._more():
                return ""

    def take(self, count: int) -> None:
        self.byte += len(self._text[self._at : self._at + count].encode())
        self._at += count

    def value(self) -> Any:
        while True:
            try:
                value, end = self._decode(self._text, self._at)
                if end < len(self._text) or not self._more():  # a number at the edge may go on in the next piece
                    self.take(end - self._at)
                    return value
            except json.JSONDecodeError:
                if len(self._text) - self._at > MAX_RECORD or not self._more():
                    raise self.error("a whole record") from None

    def error(self, expected: str) -> ValueError:
        found = self._text[self._at : self._at + 60]
        if found[:1] == "<":
            why = f"it is a web page, not JSON ({found!r}): a proxy or a login page answered; fetch it again"
        elif not found:
            why = f"it ends at byte {self.byte}, expected {expected}; fetch it again"
        else:
            why = f"not JSON as expected at byte {self.byte}: expected {expected}, found {found!r}"
        return ValueError(f"{self._path}: {why}")

    def _more(self) -> bool:
        """Append a piece to the text, whose part that is behind goes."""
        for piece in self._pieces:
            self._text, self._at = self._text[self._at :] + piece, 0
            return True
        return False

    def _read(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with open(self._path, "rb") as stream:
            while piece := stream.read(PIECE):
                self.hash.update(piece)
                self._progress(len(piece))
                try:
                    yield decoder.decode(piece)
                except UnicodeDecodeError as error:
                    raise ValueError(f"{self._path}: not UTF-8 text after byte {self.byte}: {error.reason}") from None
