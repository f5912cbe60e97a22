"""Pictures of a data set, in folders or still inside the zip archives that they were published in.

A zip archive counts as the folder that it would unpack to: `D/name.zip` holds the picture `D/p` as its member `p`, and
`D/name/p` as its member `p` too, since some archives are meant to be unpacked where they lie and others into a folder
of their own name. So half a million files need not be unpacked. Standard library only.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # APPNOTE.TXT 4.3.7: a member's name and extra field follow it
_SIGNATURE = b"PK\x03\x04"
_EXTRA = 64  # bytes read beyond a member's name, so that its extra field seldom costs a second read
_ENCRYPTED = 0x1  # APPNOTE.TXT 4.4.4, bit 0


class Place(NamedTuple):
    """Where a picture's bytes are: numbers only, so that millions of them fit in arrays."""

    archive: int
    """Index into `Pictures.archives`, or -1 for a file of its own."""
    offset: int
    """Of the member's local header; of a file the nanosecond in which it was last changed."""
    packed: int
    """Bytes in the archive."""
    size: int
    """Bytes of the picture."""
    crc: int
    method: int
    """0 stored, 8 deflate; others are refused when read. Encrypted members have ENCRYPTED added."""


ENCRYPTED = 1 << 16
Entry = tuple[int, int, int, int, int]


@dataclass
class Pictures:
    """Finds and reads pictures below a folder.

    Args:
        folder: files, folders and archives; an archive is opened when a picture is looked for beside it.
    """

    folder: Path
    archives: list[Path] = field(default_factory=list)
    """The archives opened so far."""
    _members: dict[int, dict[str, Entry]] = field(default_factory=dict)
    _in: dict[str, list[int]] = field(default_factory=dict)
    _is_folder: dict[str, bool] = field(default_factory=dict)

    def find(self, path: str) -> Place | None:
        """Where a picture is, or None. A file goes before a member of an archive of the same name.

        Raises:
            ValueError: an archive on the way is broken, or names members outside of its folder.
        """
        parent = path.rpartition("/")[0]
        if parent not in self._is_folder:
            self._is_folder[parent] = (self.folder / parent).is_dir()
        if self._is_folder[parent]:
            try:
                about = os.stat(self.folder / path)
                return Place(-1, about.st_mtime_ns, 0, about.st_size, 0, 0)
            except (FileNotFoundError, NotADirectoryError):
                pass
        parts = path.split("/")
        for depth in range(len(parts)):
            below = "/".join(parts[depth:])
            for number in self._archives_in("/".join(parts[:depth])):
                members, stem = self._members[number], f"{self.archives[number].stem}/"
                entry = members.get(below) or (
                    members.get(below.removeprefix(stem)) if below.startswith(stem) else None
                )
                if entry:
                    return Place(number, *entry)
        return None

    def read(self, path: str, place: Place | None = None) -> bytes:
        """The bytes of a picture.

        Args:
            path: as for `find`.
            place: what `find` said, where it was asked already.

        Raises:
            ValueError: no such picture, or a member that is encrypted, damaged or packed in a way that is not known.
        """
        place = place or self.find(path)
        if place is None:
            raise ValueError(f"{self.folder / path} does not exist")
        if place.archive < 0:
            return (self.folder / path).read_bytes()
        return read_member(self.archives[place.archive], place, path)

    def forget(self) -> None:
        """Let go of the archives' lists of members, hundreds of megabytes; places that were found stay valid."""
        self._members.clear()
        self._in.clear()

    def _archives_in(self, folder: str) -> list[int]:
        if folder not in self._in:
            self._in[folder] = []
            for archive in sorted((self.folder / folder).glob("*.zip")):
                self._members[len(self.archives)] = dict(_members(archive))
                self._in[folder].append(len(self.archives))
                self.archives.append(archive)
        return self._in[folder]


def read_member(archive: Path, place: Place, path: str) -> bytes:
    """A member's bytes, by one or two reads of the archive; safe in several processes and threads at once.

    Raises:
        ValueError: as `Pictures.read`, naming the archive and the picture.
    """
    where = f"{path} in {archive}"
    if place.method & ENCRYPTED:
        raise ValueError(f"{where}: is encrypted")
    with open(archive, "rb", buffering=0) as stream:
        guess = _LOCAL_HEADER.size + len(path.encode()) + _EXTRA + place.packed
        data = os.pread(stream.fileno(), guess, place.offset)
        if len(data) < _LOCAL_HEADER.size or data[:4] != _SIGNATURE:
            raise ValueError(f"{where}: the archive is damaged, no member begins at byte {place.offset}")
        fields = _LOCAL_HEADER.unpack_from(data)
        start = _LOCAL_HEADER.size + fields[-2] + fields[-1]
        if len(data) < start + place.packed:
            data = os.pread(stream.fileno(), start + place.packed, place.offset)
    packed = data[start : start + place.packed]
    if place.method == zipfile.ZIP_STORED:
        content = packed
    elif place.method == zipfile.ZIP_DEFLATED:
        try:  # never more than was promised, whatever the member would unfold to
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, place.size + 1)
        except zlib.error as error:
            raise ValueError(f"{where}: is damaged ({error})") from None
    else:
        raise ValueError(
            f"{where}: compression method {place.method} is not known; pack the archive again with deflate"
        )
    if len(content) != place.size or zlib.crc32(content) != place.crc:
        raise ValueError(f"{where}: is damaged, its checksum is not the one that the archive lists")
    return content


def check_members(archive: Path) -> list[zipfile.ZipInfo]:
    """The members of an archive that are files.

    Raises:
        ValueError: it is broken, or a member lies outside of the folder that it would be unpacked in.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            members = [member for member in content.infolist() if not member.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{archive}: is broken or not complete, fetch it again ({error})") from None
    for member in members:
        name = PurePosixPath(member.filename)
        if ".." in name.parts or name.is_absolute() or "\\" in member.orig_filename or "\0" in member.orig_filename:
            raise ValueError(
                f"{archive}: its member {member.orig_filename!r} lies outside of it; do not use this archive"
            )
    return members


def _members(archive: Path) -> Iterator[tuple[str, Entry]]:
    for member in check_members(archive):
        method = member.compress_type | (ENCRYPTED if member.flag_bits & _ENCRYPTED else 0)
        yield member.filename, (member.header_offset, member.compress_size, member.file_size, member.CRC, method)
