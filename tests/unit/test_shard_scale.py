"""Shards out of archives, by several processes, through kills, and without image sets that are not there."""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import data_fixtures as fixtures
import psutil
import pytest

from vlm.data import annotations as annotation_list
from vlm.data.annotations import Annotations
from vlm.data.shard import shard

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
GOLDEN = {
    "shard-000000.tar": "c2935ea78e9125ef",
    "shard-000001.tar": "19160454d981a6fa",
    "shard-000002.tar": "e34c4a5ad7b0974e",
    "validation-000000.tar": "6bb6bb1c809d85b7",
}
SETS = ("coco/train2017", "gqa/images", "vg/VG_100K")


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def write_source(folder: Path, number: int = 120) -> list[dict[str, Any]]:
    """Conversations about pictures of three sets, and some about none."""
    records = []
    for index in range(number):
        turns = [{"from": "human", "value": f"Was ist {index}?"}, {"from": "gpt", "value": "☃" * (index % 5 + 1)}]
        record: dict[str, Any] = {"id": f"é{index // 2}", "conversations": turns}
        if index % 4:
            record["image"] = f"{SETS[index % 4 - 1]}/{index}.png"
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            path = folder / "images" / record["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PIXEL)
        records.append(record)
    (folder / "annotations.json").write_text(json.dumps(records))
    return records


def pack(folder: Path) -> None:
    """Every image set as the archive that its host offers, in place of the folder."""
    for part in SETS:
        place, _, inside = part.partition("/")
        shutil.make_archive(str(folder / "images" / place / inside), "zip", folder / "images" / place, inside)
        shutil.rmtree(folder / "images" / part)


def works(process: psutil.Process) -> bool:
    """Whether a process still runs; what is dead and not yet buried does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_source(tmp_path / "captions")
    return tmp_path / "captions"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return fixtures.write_config(tmp_path / "config.yaml")


def configured(path: Path, **changes: Any) -> Path:
    return fixtures.write_config(path, **{f"data__sets__captions__{key}": value for key, value in changes.items()})


def test_the_bytes_stay_what_they_were(tmp_path: Path, source: Path, config: Path) -> None:
    """The scores that the README shows come from these bytes; a change of them is a change of the data."""
    shard(config, "captions", source, tmp_path / "out")
    assert {name: digest[:16] for name, digest in hashes(tmp_path / "out").items()} == GOLDEN


@pytest.mark.parametrize("workers", [2, 5], ids=["two", "more-than-shards"])
def test_processes_and_archives_change_no_byte(tmp_path: Path, source: Path, config: Path, workers: int) -> None:
    shard(config, "captions", source, tmp_path / "alone")
    pack(source)
    shard(config, "captions", source, tmp_path / "together", workers=workers)
    assert hashes(tmp_path / "together") == hashes(tmp_path / "alone")
    assert len(hashes(tmp_path / "alone")) == 4
    report = json.loads((tmp_path / "together/rejected.json").read_text())
    assert (report["num_repeated_ids"], report["first_repeated_ids"][:2]) == (60, ["é0", "é1"])


def test_what_is_complete_is_not_written_again(
    tmp_path: Path, source: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def written() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}

    shard(config, "captions", source, tmp_path / "out")
    before = written()
    shard(config, "captions", source, tmp_path / "out")
    assert written() == before
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("captions: 108 training and 12 validation samples, 0 rejected (")
    (tmp_path / "out/shard-000001.tar").write_bytes(b"half")
    shard(config, "captions", source, tmp_path / "out")
    assert not before.items() & written().items()


def test_ten_kills_leave_what_an_undisturbed_run_writes(tmp_path: Path) -> None:
    """Finished shards are kept, half ones are never seen, and no process outlives its parent."""
    records = write_source(tmp_path / "captions", 4000)
    pack(tmp_path / "captions")
    config = configured(tmp_path / "config.yaml", samples_per_shard=40)
    shard(config, "captions", tmp_path / "captions", tmp_path / "calm", workers=2)
    arguments = (config, "captions", tmp_path / "captions", tmp_path / "out", 2)
    draw, kept = random.Random(3), 0
    waiting = tmp_path / ".out.writing"
    for _ in range(10):
        process = multiprocessing.get_context("fork").Process(target=shard, args=arguments)
        process.start()
        aim = kept + draw.randrange(1, 4)
        while len(list(waiting.glob("*.tar"))) < aim and process.is_alive():
            time.sleep(0.002)
        children = psutil.Process(process.pid).children()
        process.kill()
        process.join()
        end = time.monotonic() + 10
        while any(map(works, children)):
            assert time.monotonic() < end, "a process goes on without its parent"
            time.sleep(0.01)
        if (tmp_path / "out").exists():
            break
        now = len(list(waiting.glob("*.tar")))
        assert now >= kept, "finished shards were lost"
        kept = now
    inodes = {path.name: path.stat().st_ino for path in waiting.glob("*.tar")}
    assert kept > 10 and len(inodes) < len(hashes(tmp_path / "calm"))
    shard(*arguments[:4], workers=3)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "calm")
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in inodes} == inodes, "not kept but written again"
    assert sum(json.loads((tmp_path / "out/shards.json").read_text())[key] for key in ("train", "validation")) == len(
        records
    )
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_other_settings_start_anew(tmp_path: Path, source: Path, config: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlm.data.shard._finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shard(config, "captions", source, tmp_path / "out")
    assert len(list((tmp_path / ".out.writing").glob("*.tar"))) == 4
    other = fixtures.write_config(tmp_path / "other.yaml", seed=5)
    shard(other, "captions", source, tmp_path / "out")
    shard(other, "captions", source, tmp_path / "undisturbed")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "undisturbed")


def test_a_missing_image_set_stops_it_or_leaves_its_samples_out(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(source / "images/gqa")
    (source / "images/vg/VG_100K/3.png").unlink()
    sets = {name: [] for name in ("coco", "gqa", "vg")}
    stop = configured(tmp_path / "stop.yaml", image_sets=sets)
    message = (
        "whole image sets are missing: .*images/gqa has none of 30 pictures, the first of them gqa/images/2.png.*"
        r"data.sets.captions.image_sets.*missing_images: drop"
    )
    with pytest.raises(ValueError, match=message):
        shard(stop, "captions", source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.writing").exists()

    drop = configured(tmp_path / "drop.yaml", image_sets=sets, missing_images="drop")
    shard(drop, "captions", source, tmp_path / "out")
    report = json.loads((tmp_path / "out/rejected.json").read_text())
    assert (report["num_rejected"], report["num_left_out"]) == (0, 31)
    assert report["missing_images"] == {
        "gqa": {"num": 30, "first": "gqa/images/2.png"},
        "vg": {"num": 1, "first": "vg/VG_100K/3.png"},
    }
    counts = json.loads((tmp_path / "out/shards.json").read_text())
    assert (counts["train"] + counts["validation"], counts["left_out"]) == (89, 31)
    assert "31 left out without their pictures" in capsys.readouterr().err


def test_all_pictures_missing_is_told_as_such(tmp_path: Path, source: Path, config: Path) -> None:
    (source / "images").rename(source / "pictures")
    with pytest.raises(ValueError, match="whole image sets are missing: .*captions/images has none of 90 pictures"):
        shard(config, "captions", source, tmp_path / "out")


def test_damaged_members_are_counted_by_name(tmp_path: Path, source: Path) -> None:
    pack(source)
    archive = source / "images/coco/train2017.zip"
    data = bytearray(archive.read_bytes())
    place = data.index(b"train2017/5.png") + len("train2017/5.png")
    data[place + 20] ^= 0xFF
    archive.write_bytes(data)
    config = configured(tmp_path / "config.yaml", samples_per_shard=50)
    shard(config, "captions", source, tmp_path / "out", workers=2)
    report = json.loads((tmp_path / "out/rejected.json").read_text())
    assert [(one["index"], one["id"]) for one in report["rejected"]] == [(5, "é2")]
    assert (
        "coco/train2017/5.png in " in report["rejected"][0]["reason"] and "damaged" in report["rejected"][0]["reason"]
    )
    assert sorted(json.loads((tmp_path / "out/shards.json").read_text())["sizes"]) == sorted(hashes(tmp_path / "out"))


def test_half_a_character_is_rejected_and_not_a_crash(tmp_path: Path, source: Path, config: Path) -> None:
    path = source / "annotations.json"
    path.write_text(path.read_text().replace("Was ist 8?", "Was ist \\ud83d?"))
    shard(config, "captions", source, tmp_path / "out")
    report = json.loads((tmp_path / "out/rejected.json").read_text())
    assert [one["index"] for one in report["rejected"]] == [8] and "Unicode" in report["rejected"][0]["reason"]


def test_a_small_disk_is_told_before_writing(
    tmp_path: Path, source: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("vlm.data.shard.shutil.disk_usage", lambda _: usage._replace(free=50_000))
    with pytest.raises(ValueError, match=r"the shards of captions need \d+,\d+ bytes, its disk has 50,000 free"):
        shard(config, "captions", source, tmp_path / "out")


def test_a_killed_writer_is_an_error_of_the_environment(
    tmp_path: Path, source: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm.images.verify", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match=r"a writing process ended with -9 .* finished shards are kept"):
        shard(config, "captions", source, tmp_path / "out", workers=2)


def test_no_worker_is_refused(tmp_path: Path, source: Path, config: Path) -> None:
    with pytest.raises(ValueError, match="--workers: 0"):
        shard(config, "captions", source, tmp_path / "out", workers=0)


@pytest.mark.parametrize("piece", [1, 7, 1 << 20], ids=["byte-by-byte", "inside-characters", "at-once"])
@pytest.mark.parametrize("written", ["plain", "indented", "unescaped", "with-a-mark"])
def test_annotations_are_read_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, written: str
) -> None:
    monkeypatch.setattr(annotation_list, "PIECE", piece)
    records = [{"id": "é☃", "n": [1, 2.5e3]}, {"text": '}],{" \\ ' + "\U0001f600" * 9}, 12, "[", {}]
    text = json.dumps(records, indent=2 if written == "indented" else None, ensure_ascii=written != "unescaped")
    path = tmp_path / "annotations.json"
    path.write_text(f"\n{text} \n", encoding="utf-8-sig" if written == "with-a-mark" else "utf-8")
    read: list[int] = []
    content = Annotations(path)
    assert list(content.scan(read.append)) == records
    assert [content[index] for index in range(len(content))] == records
    assert sum(read) == path.stat().st_size
    assert content.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_record_without_an_end_is_not_searched_for_it_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotation_list, "PIECE", 100)
    monkeypatch.setattr(annotation_list, "MAX_RECORD", 1000)
    path = tmp_path / "annotations.json"
    path.write_text('[{"id": 1}, {"id": "' + "x" * 100_000)
    read: list[int] = []
    with pytest.raises(ValueError, match="not JSON as expected at byte 12: expected a whole record, found '{\"id"):
        list(Annotations(path).scan(read.append))
    assert sum(read) < 2000
