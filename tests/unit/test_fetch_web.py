"""Downloads of URLs from a server on this machine: what is sent twice, what is refused, and when it is given up."""

from __future__ import annotations

import email.utils
import io
import json
import random
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import World, serve, sha256

from vlm.fetch import retry, web
from vlm.fetch.folder import fetch

DATA = random.Random(0).randbytes(100_000)


@pytest.fixture
def world() -> World:
    return World(files={"data.bin": DATA})


@pytest.fixture
def url(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(web, "cache_folder", lambda: tmp_path / "downloads")
    with serve(world) as address:
        yield f"{address}/files/data.bin"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been slept."""
    slept: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    return slept


def test_a_file_is_fetched_once_and_known_by_its_hash(world: World, url: str) -> None:
    path, known = web.download(url)
    assert path.name == "data.bin" and path.read_bytes() == DATA
    assert (known["url"], known["size"], known["sha256"]) == (url, len(DATA), sha256(DATA))
    assert web.download(url, offline=True) == (path, known) == web.download(f"{url}#sha256={sha256(DATA)}")
    assert len(world.requests) == 1
    assert {one.name for one in path.parent.iterdir()} == {"data.bin", "data.bin.json", ".lock"}


def test_a_broken_transfer_goes_on_where_it_stopped(world: World, url: str, pauses: list[float]) -> None:
    world.break_at["data.bin"] = [30_000, 0, 50_000]
    assert web.download(url)[0].read_bytes() == DATA
    assert [one.split()[2:] for one in world.requests] == [[], ["bytes=30000-"], ["bytes=30000-"], ["bytes=80000-"]]
    assert sum(world.sent.values()) == len(DATA)
    assert len(pauses) == 3


@pytest.mark.parametrize("trouble", ["no-ranges", "another-version", "shorter-version"])
def test_parts_of_two_versions_are_never_joined(world: World, url: str, pauses: list[float], trouble: str) -> None:
    world.break_at["data.bin"] = [30_000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "TRIES", 1)
        with pytest.raises(FileNotFoundError, match="the transfer broke off at byte 30,000 of 100,000"):
            web.download(url)
    world.ignores_ranges = trouble == "no-ranges"
    if trouble != "no-ranges":
        world.versions["data.bin"] += 1
        world.files["data.bin"] = DATA[::-1] if trouble == "another-version" else DATA[::-1][:20_000]
    assert web.download(url)[0].read_bytes() == world.files["data.bin"]


def test_a_part_that_was_complete_is_only_checked(world: World, url: str, tmp_path: Path) -> None:
    """As after a kill between the last byte and the renaming."""
    path, known = web.download(url)
    path.rename(f"{path}.part")
    path.with_name("data.bin.json").unlink()
    path.with_name("data.bin.part.entity").write_text(json.dumps({"etag": known["etag"]}))
    world.sent.clear()
    assert web.download(url) == (path, known)
    assert not sum(world.sent.values())


def test_a_busy_server_is_given_the_time_that_it_asks_for(world: World, url: str, pauses: list[float]) -> None:
    later = email.utils.format_datetime(email.utils.localtime(), usegmt=False)
    soon = email.utils.formatdate(time.time() + 90, usegmt=True)
    waits = [{"Retry-After": "7"}, {"Retry-After": soon}, {"Retry-After": "9999"}, {"Retry-After": later}, {}]
    world.answers["data.bin"] = [(429 if number else 503, b"", wait) for number, wait in enumerate(waits)]
    assert web.download(url)[0].read_bytes() == DATA
    assert pauses[0] == 7 and 80 < pauses[1] <= 90 and pauses[2] == 300
    assert 4 <= pauses[3] <= 8 and 8 <= pauses[4] <= 16, "not twice as long each time"


def test_it_is_given_up_when_nothing_comes_any_more(world: World, url: str, pauses: list[float]) -> None:
    world.break_at["data.bin"] = [10_000, 10_000] + [0] * 20
    with pytest.raises(FileNotFoundError, match=r"data.bin: cannot be fetched \(.*\); run the command again to go on"):
        web.download(url)
    assert len(pauses) == 2 + retry.TRIES - 2, "progress starts the count anew"
    world.break_at.clear()
    world.sent.clear()
    assert web.download(url)[0].read_bytes() == DATA
    assert sum(world.sent.values()) == 80_000


def test_the_same_bytes_again_are_no_progress(world: World, url: str, pauses: list[float]) -> None:
    world.ignores_ranges = True
    world.break_at["data.bin"] = [15_000, 5_000] * 20
    with pytest.raises(FileNotFoundError, match="cannot be fetched"):
        web.download(url)
    assert len(pauses) == retry.TRIES - 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param((404, b"", {}), r"refuses it \(404", id="not-there"),
        pytest.param((403, b"", {}), r"refuses it \(403", id="forbidden"),
        pytest.param((200, b"\n <!DOCTYPE html><p>Log in", {}), "a proxy or a login page answered", id="login-page"),
    ],
)
def test_a_wrong_answer_is_refused_and_not_kept(
    world: World, url: str, answer: tuple[int, bytes, dict[str, str]], words: str
) -> None:
    world.answers["data.bin"] = [answer]
    with pytest.raises(ValueError, match=words):
        web.download(url)
    assert len(world.requests) == 1
    assert web.download(url)[0].read_bytes() == DATA


def test_what_is_no_archive_is_refused(world: World, url: str) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a", b"a" * 1000)
    world.files = {"whole.zip": stream.getvalue(), "half.zip": stream.getvalue()[:600]}
    web.download(url.replace("data.bin", "whole.zip"))
    with pytest.raises(ValueError, match="half.zip: what came is not a zip archive"):
        web.download(url.replace("data.bin", "half.zip"))


def test_a_wrong_hash_is_refused_with_both(url: str) -> None:
    with pytest.raises(ValueError, match=f"its sha256 is {sha256(DATA)}, not {'0' * 64} as the configuration says"):
        web.download(f"{url}#sha256={'0' * 64}")
    with pytest.raises(ValueError, match="after `#` there can only be sha256="):
        web.download(f"{url}#md5=1")


def test_offline_names_what_is_missing(world: World, url: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"data.bin: is not in the cache .*offline"):
        web.download(url, offline=True)
    assert not world.requests


def test_a_full_disk_is_told_before_the_transfer(world: World, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.shutil, "disk_usage", lambda _: SimpleNamespace(free=99_999))
    with pytest.raises(ValueError, match="needs 100,000 bytes, its disk has 99,999 free; HF_HOME"):
        web.download(url)


def test_a_changed_file_in_the_cache_is_refused(url: str) -> None:
    path, _ = web.download(url)
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="was changed after it was downloaded"):
        web.download(url)


def test_another_file_behind_a_url_is_told(world: World, url: str, tmp_path: Path) -> None:
    """Also when the cache and the folder are gone: the manifest stays."""
    fetch(url, tmp_path / "out", kind="dataset")
    fetch(url, tmp_path / "out", kind="dataset")
    assert (tmp_path / "out/data.bin").read_bytes() == DATA
    for name in ("out", "downloads"):
        shutil.rmtree(tmp_path / name)
    world.files["data.bin"] = DATA[::-1]
    with pytest.raises(ValueError, match=f"data.bin: is another file now .sha256 {sha256(DATA[::-1])}.*{sha256(DATA)}"):
        fetch(url, tmp_path / "out", kind="dataset")
    assert not (tmp_path / "out").exists()
