"""Pictures inside zip archives are found where unpacking would put them, and damaged ones are refused by name."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import pytest

from vlm.pictures import Pictures

BYTES = random.Random(0).randbytes(5000) + b"\0" * 5000


def write(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("archive", "member", "path"),
    [
        pytest.param("images.zip", "00000/1.jpg", "images/00000/1.jpg", id="llava-pretrain"),
        pytest.param("images.zip", "images/00000/1.jpg", "images/00000/1.jpg", id="members-in-the-archives-name"),
        pytest.param("images/coco/train2017.zip", "train2017/1.jpg", "images/coco/train2017/1.jpg", id="coco"),
        pytest.param("images/gqa/images.zip", "images/1.jpg", "images/gqa/images/1.jpg", id="gqa"),
        pytest.param(
            "images/textvqa/train_val_images.zip",
            "train_images/1.jpg",
            "images/textvqa/train_images/1.jpg",
            id="textvqa",
        ),
        pytest.param("images/vg/images2.zip", "VG_100K_2/1.jpg", "images/vg/VG_100K_2/1.jpg", id="visual-genome"),
    ],
)
def test_an_archive_counts_as_the_folder_that_it_would_unpack_to(
    tmp_path: Path, archive: str, member: str, path: str
) -> None:
    write(tmp_path / archive, {member: BYTES, "other.jpg": b"other"}, zipfile.ZIP_DEFLATED)
    pictures = Pictures(tmp_path)
    place = pictures.find(path)
    assert place is not None and place.size == len(BYTES) > place.packed
    pictures.forget()
    assert pictures.read(path, place) == BYTES == Pictures(tmp_path).read(path)
    assert pictures.find(f"{path}.jpg") is None and pictures.find("images/nowhere/1.jpg") is None


def test_files_go_before_members_and_are_read_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "images.zip", {"a/1.jpg": b"packed", "a/2.jpg": b"packed too"})
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/1.jpg").write_bytes(b"plain")
    pictures = Pictures(tmp_path)
    assert (pictures.read("images/a/1.jpg"), pictures.read("images/a/2.jpg")) == (b"plain", b"packed too")
    with pytest.raises(ValueError, match="images/a/3.jpg does not exist"):
        pictures.read("images/a/3.jpg")


def test_a_long_extra_field_is_stepped_over(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        member = zipfile.ZipInfo("1.jpg")
        member.extra = b"\x99\x99" + (500).to_bytes(2, "little") + b"x" * 500
        archive.writestr(member, BYTES)
    assert Pictures(tmp_path).read("images/1.jpg") == BYTES


@pytest.mark.parametrize("what", ["checksum", "stream", "header", "encrypted", "method", "longer-than-listed"])
def test_a_damaged_member_is_refused_by_name(tmp_path: Path, what: str) -> None:
    method = {"method": zipfile.ZIP_BZIP2, "checksum": zipfile.ZIP_STORED}.get(what, zipfile.ZIP_DEFLATED)
    archive = write(tmp_path / "images.zip", {"1.jpg": BYTES, "2.jpg": BYTES}, method)
    data = bytearray(archive.read_bytes())
    directory = data.index(b"PK\x01\x02")
    if what in ("checksum", "stream"):
        data[100] ^= 0xFF
        data[5] ^= what == "stream"
    elif what == "header":
        data[0] ^= 0xFF
    elif what == "encrypted":
        data[directory + 8] |= 1
    elif what == "longer-than-listed":
        data[directory + 24 : directory + 28] = (100).to_bytes(4, "little")
    archive.write_bytes(data)
    words = {
        "header": "no member begins at byte 0",
        "encrypted": "is encrypted",
        "method": "compression method 12 is not known",
    }
    pictures = Pictures(tmp_path)
    with pytest.raises(ValueError, match=f"^images/1.jpg in .*images.zip: .*{words.get(what, 'is damaged')}"):
        pictures.read("images/1.jpg")
    if what != "method":
        assert pictures.read("images/2.jpg") == BYTES


@pytest.mark.parametrize(
    ("members", "cut", "words"),
    [
        pytest.param({"../1.jpg": b"x"}, None, r"its member '\.\./1.jpg' lies outside of it", id="climbs-out"),
        pytest.param({"a/../../1.jpg": b"x"}, None, "lies outside of it", id="climbs-out-later"),
        pytest.param({"/1.jpg": b"x"}, None, "lies outside of it", id="absolute"),
        pytest.param({"..\\1.jpg": b"x"}, None, "lies outside of it", id="backslash"),
        pytest.param({"1.jpg": BYTES}, 3000, "broken or not complete, fetch it again", id="half-fetched"),
    ],
)
def test_an_archive_that_cannot_be_trusted_is_refused(
    tmp_path: Path, members: dict[str, bytes], cut: int | None, words: str
) -> None:
    archive = write(tmp_path / "images.zip", members)
    archive.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(ValueError, match=f"images.zip: .*{words}"):
        Pictures(tmp_path).find("images/1.jpg")
