"""`vlm fetch` against folders, and against a small server on this machine that answers as the Hub does."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import World, commit_of, serve
from huggingface_hub import errors

from vlm.config import Source
from vlm.fetch import hub, retry
from vlm.fetch.folder import fetch

MODEL = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same weights once more",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
}
FETCHED = set(MODEL) - {"pytorch_model.bin", "consolidated.safetensors"}
COMMIT = commit_of("main")
PAGE = b"<!doctype html><title>Please log in</title>"


def write(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def names(folder: Path) -> set[str]:
    return {
        os.path.relpath(os.path.join(at, name), folder)
        for at, _, inside in os.walk(folder, followlinks=True)
        for name in inside
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_a_local_model_is_linked_without_pickles_and_twins(tmp_path: Path) -> None:
    source = write(tmp_path / "source", MODEL)
    out = tmp_path / "made/here"
    fetch(str(source), out)
    assert names(out) == FETCHED
    assert (out / "model.safetensors").resolve() == source / "model.safetensors"

    (source / "tokenizer.json").unlink()
    fetch(str(source), out)
    assert not out.is_symlink() and names(out) == FETCHED - {"tokenizer.json"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param({"config.json": b"{}", "pytorch_model.bin": b""}, "only pytorch_model.bin", id="pickles-only"),
        pytest.param({"config.json": b"{}"}, "no safetensors", id="no-weights"),
        pytest.param({"model.safetensors": b""}, "no config.json", id="no-config"),
    ],
)
def test_a_folder_that_is_no_safe_model_is_refused(tmp_path: Path, content: dict[str, bytes], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fetch(str(write(tmp_path / "source", content)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["", "images/"], ids=["bare-members", "members-in-images"])
def test_archives_of_a_data_set_are_unpacked_where_asked(tmp_path: Path, prefix: str) -> None:
    source = write(tmp_path / "source", {"annotations.json": b"[]", "val2014/1.jpg": b"a"})
    zipped(source / "images.zip", {f"{prefix}00000/1.jpg": b"b"})
    fetch(str(source), tmp_path / "packed", kind="dataset")
    assert names(tmp_path / "packed") == {"annotations.json", "val2014/1.jpg", "images.zip"}
    fetch(str(source), tmp_path / "out", kind="dataset", unpack=True)
    assert (tmp_path / "out/images/00000/1.jpg").read_bytes() == b"b"
    assert (tmp_path / "out/val2014/1.jpg").read_bytes() == b"a"
    assert not (source / "images").exists(), "the user's folder was written to"


@pytest.mark.parametrize(
    ("member", "words"),
    [
        pytest.param(None, "broken or not complete", id="no-zip"),
        pytest.param("../outside.jpg", r"member '\.\./outside.jpg' lies outside", id="climbs-out"),
        pytest.param("/etc/passwd", "lies outside", id="absolute"),
    ],
)
def test_a_bad_archive_leaves_nothing_that_looks_complete(tmp_path: Path, member: str | None, words: str) -> None:
    source = tmp_path / "source"
    if member is None:
        write(source, {"images.zip": b"not a zip"})
    else:
        zipped(source / "images.zip", {member: b"x"})
    with pytest.raises(ValueError, match=rf"images.zip: .*{words}"):
        fetch(str(source), tmp_path / "out", kind="dataset", unpack=True)
    assert not (tmp_path / "out").exists() and not (tmp_path / "outside.jpg").exists()


def test_parts_are_joined_in_their_places_without_touching_the_users_folders(tmp_path: Path) -> None:
    main = write(tmp_path / "llava", {"mix.json": b"[]", "images/textvqa/train_images/1.jpg": b"t"})
    coco = zipped(tmp_path / "train2017.zip", {"train2017/1.jpg": b"c"})
    books = write(tmp_path / "books", {"images/1.jpg": b"o"})
    below = [f"images/coco={coco}", f"images/ocr_vqa={books}", "images/textvqa=https://127.0.0.1:9/never.zip"]
    before = names(main)
    fetch(str(main), tmp_path / "out", kind="dataset", below=below)
    assert names(tmp_path / "out") == {
        "mix.json",
        "images/coco/train2017.zip",
        "images/ocr_vqa/images/1.jpg",
        "images/textvqa/train_images/1.jpg",
    }
    assert names(main) == before


@pytest.mark.parametrize(
    ("sources", "below", "words"),
    [
        pytest.param(
            ["here"], ["images/coco=./gone"], "images/coco from ./gone: there is no such folder", id="no-folder"
        ),
        pytest.param(["here"], ["../up=./here"], "inside of the folder", id="place-outside"),
        pytest.param(["here"], ["images"], "expected PLACE=SOURCE", id="no-source"),
        pytest.param(["here", "twin"], [], "a.json is in another part", id="two-of-one-name"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: list[str], below: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("here", "twin"):
        write(tmp_path / name, {"a.json": b"[]"})
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        fetch(sources, Path("out"), kind="dataset", below=below)
    assert not Path("out").exists()


@pytest.fixture
def world() -> World:
    data = {"mix.json": b"[1]", "images.zip": bytes(range(256)) * 400, "other.json": b"[2]"}
    bare = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    pulls = {"refs/pr/2": bare | {"notes.txt": b"hi"}, "refs/pr/5": bare | {"model.safetensors": b"safe"}}
    return World(
        repositories={
            "good/model": {"main": dict(MODEL)},
            "gated/model": {"main": dict(MODEL)},
            "pickled/model": {"main": bare, **pulls},
            "good/data": {"main": data},
        },
        gated={"gated/model"},
        files={"train.zip": bytes(range(256)) * 400},
    )


@pytest.fixture
def endpoint(world: World) -> Iterator[str]:
    with serve(world) as address:
        yield address


def start(tmp_path: Path, endpoint: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environ |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", **variables}
    line = [sys.executable, "-m", "vlm.cli", "fetch", *arguments]
    return subprocess.Popen(line, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def command(tmp_path: Path, endpoint: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    process = start(tmp_path, endpoint, *arguments, **variables)
    output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def complaint(finished: subprocess.CompletedProcess[str]) -> str:
    """The one message of a command that refuses."""
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished.stderr[finished.stderr.index("vlm: ") :]


def test_a_hub_model_is_fetched_once_and_then_read_from_the_cache(tmp_path: Path, world: World, endpoint: str) -> None:
    out = tmp_path / "out"
    first = command(tmp_path, endpoint, "good/model", str(out))
    assert first.returncode == 0, first.stderr
    assert contents(out) == {name: MODEL[name] for name in FETCHED}
    assert not any("pytorch_model" in one or "consolidated" in one for one in world.requests if "resolve" in one)
    part = json.loads((tmp_path / "out.manifest.json").read_text())["parts"][0]
    assert (part["source"], part["revision"], part["commit"]) == ("good/model", "main", COMMIT)
    assert {name: one["size"] for name, one in part["files"].items()} == {name: len(MODEL[name]) for name in FETCHED}

    world.requests.clear()
    again = command(tmp_path, endpoint, "good/model", str(out))
    assert again.returncode == 0, again.stderr
    assert not [one for one in world.requests if one.startswith("GET") and "/resolve/" in one], "fetched again"

    world.requests.clear()
    for variables, option in (({"HF_HUB_OFFLINE": "1"}, ()), ({}, ("--offline",))):
        offline = command(tmp_path, endpoint, "good/model", str(out), *option, **variables)
        assert offline.returncode == 0, offline.stderr
        assert names(out) == FETCHED and not world.requests
    gone = command(tmp_path, "http://127.0.0.1:9", "good/model", str(out))
    assert gone.returncode == 0, gone.stderr
    assert "cannot be reached, looking into the cache" in gone.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["gated/model"], ["accept terms", "/gated/model,", "HF_TOKEN"], id="gated"),
        pytest.param(["missing/model"], ["no such model"], id="missing"),
        pytest.param(["good/model", "--revision", "no-such"], ["no such revision"], id="no-such-revision"),
        pytest.param(["resources/tiny/language2"], ["no such folder"], id="neither-folder-nor-repository"),
        pytest.param(["good/model", "--offline"], ["offline", "cache"], id="offline-and-not-there"),
        pytest.param(
            ["good/data", "--kind", "dataset", "--include", "mux*"], ["has no file like mux*"], id="no-such-file"
        ),
        pytest.param(
            ["pickled/model"], ["only pytorch_model.bin", "`revision: refs/pr/5`"], id="pickles-where-a-request-is-safe"
        ),
    ],
)
def test_what_cannot_be_fetched_is_refused_by_name(
    tmp_path: Path, endpoint: str, arguments: list[str], words: list[str]
) -> None:
    source, *options = arguments
    said = complaint(command(tmp_path, endpoint, source, str(tmp_path / "out"), *options))
    assert said.count("\n") == 1 and source in said
    assert not [word for word in words if word not in said], said
    assert not (tmp_path / "out").exists()


def test_a_token_opens_a_gated_model_and_a_revision_the_safe_weights(tmp_path: Path, endpoint: str) -> None:
    opened = command(tmp_path, endpoint, "gated/model", str(tmp_path / "gated"), HF_TOKEN="hf_good")
    assert opened.returncode == 0, opened.stderr
    assert names(tmp_path / "gated") == FETCHED
    safe = command(tmp_path, endpoint, "pickled/model@refs/pr/5", str(tmp_path / "safe"))
    assert safe.returncode == 0, safe.stderr
    assert names(tmp_path / "safe") == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    "trouble",
    ["busy", "down-at-the-files", "broken-transfers", "wrong-bytes-once"],
)
def test_a_troubled_hub_is_asked_again(tmp_path: Path, world: World, endpoint: str, trouble: str) -> None:
    if trouble == "busy":
        world.answers = {"/revision/main": [(429, b"", {"Retry-After": "1"}), (503, b"", {})]}
    elif trouble == "down-at-the-files":
        world.answers = {"/model.safetensors": [(500, b"", {}), (502, b"", {})]}
    elif trouble == "broken-transfers":
        world.break_at = {"/model.safetensors": [3000, 2000, 0]}
    else:
        world.wrong["/model.safetensors"] = 1
    fetched = command(tmp_path, endpoint, "good/model", str(tmp_path / "out"))
    assert fetched.returncode == 0, fetched.stderr
    assert contents(tmp_path / "out") == {name: MODEL[name] for name in FETCHED}
    if trouble == "busy":
        assert "429; trying again in 1 s" in fetched.stderr


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        pytest.param("wrong-bytes", "model.safetensors came damaged, twice", id="wrong-bytes"),
        pytest.param("page", "not JSON", id="a-login-page-instead-of-json"),
        pytest.param("token", "token is not accepted", id="token-refused"),
    ],
)
def test_a_hub_that_stays_wrong_is_refused(
    tmp_path: Path, world: World, endpoint: str, trouble: str, words: str
) -> None:
    if trouble == "wrong-bytes":
        world.wrong["/model.safetensors"] = 9
    elif trouble == "page":
        world.answers = {"/revision/main": [(200, PAGE, {"Content-Type": "text/html"})] * 9}
    else:
        world.answers = {"/revision/main": [(403, b"", {})] * 9}
    said = complaint(command(tmp_path, endpoint, "good/model", str(tmp_path / "out")))
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unreachable_hub_is_one_message(tmp_path: Path) -> None:
    said = complaint(command(tmp_path, "http://127.0.0.1:9", "good/model", str(tmp_path / "out")))
    assert "cannot be reached" in said


def test_a_hub_that_is_down_for_long_leaves_the_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", pauses.append)

    def answer(status: int) -> list[Any]:
        refused = SimpleNamespace(status_code=status, headers={}, request=None)
        raise errors.HfHubHTTPError("no", response=refused)  # type: ignore[arg-type]

    assert hub._plan("good/model", lambda: answer(503)) is None
    assert len(pauses) == retry.TRIES - 1 and 60 < sum(pauses) < 130
    assert "looking into the cache" in capsys.readouterr().err
    with pytest.raises(errors.HfHubHTTPError):
        hub._plan("good/model", lambda: answer(401))
    assert len(pauses) == retry.TRIES - 1, "asked again although it was refused"


def test_a_branch_that_moved_on_is_told_and_can_be_kept(tmp_path: Path, world: World, endpoint: str) -> None:
    """Also where the folder is gone: Snakemake removes it before it fetches again."""
    model = world.repositories["good/model"]
    model["old"] = model.pop("main")
    out = str(tmp_path / "out")
    assert command(tmp_path, endpoint, "good/model", out, "--revision", "old").returncode == 0
    manifest = tmp_path / "out.manifest.json"
    manifest.write_text(manifest.read_text().replace('"revision": "old"', '"revision": "main"'))
    model["main"] = dict(MODEL) | {"config.json": b'{"new": 1}'}
    (tmp_path / "out").rename(tmp_path / "gone")

    said = complaint(command(tmp_path, endpoint, "good/model", out))
    assert COMMIT in said and f"`revision: {commit_of('old')}` to keep" in said
    kept = command(tmp_path, endpoint, "good/model", out, "--revision", commit_of("old"))
    assert kept.returncode == 0, kept.stderr
    assert (tmp_path / "out/config.json").read_bytes() == b"{}"


def test_all_failures_are_told_at_once_and_what_came_is_kept(tmp_path: Path, world: World, endpoint: str) -> None:
    bad = [f"images/{name}={endpoint}/files/{name}.zip" for name in ("gqa", "vg")]
    options = ["--kind", "dataset", "--include", "mix.json", *(f"--below={one}" for one in bad)]
    said = complaint(command(tmp_path, endpoint, "good/data", str(tmp_path / "out"), *options))
    assert "2 of 3 parts are missing" in said and "gqa.zip: the server refuses it (404" in said and "vg.zip" in said
    world.requests.clear()
    fetched = command(tmp_path, endpoint, "good/data", str(tmp_path / "out"), *options[:4])
    assert fetched.returncode == 0, fetched.stderr
    assert names(tmp_path / "out") == {"mix.json"}
    assert not [one for one in world.requests if one.startswith("GET") and "/resolve/" in one]


def test_a_full_disk_is_told_before_anything_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped(tmp_path / "source/val2014.zip", {"1.jpg": b"x" * 1001})
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"val2014: unpacking val2014.zip needs 1,001 bytes, its disk has 1,000 free"):
        fetch(str(tmp_path / "source"), tmp_path / "out", kind="dataset", unpack=True)


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        pytest.param("owner/LLaVA-v1.5", "LLaVA-v1.5", id="repository"),
        pytest.param("./data/coco", "coco", id="folder"),
        pytest.param("http://host/val2014.zip", "captions", id="url"),
        pytest.param(("owner/a", "owner/b"), "captions", id="several"),
    ],
)
def test_a_folder_is_called_as_its_source_or_as_the_data_set(source: str | tuple[str, ...], folder: str) -> None:
    assert Source(source=source).folder("captions") == folder


def test_a_full_disk_is_told_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    files = [SimpleNamespace(commit_hash="c", file_size=600, will_download=True) for _ in range(2)]
    with pytest.raises(ValueError, match=r"needs 1,200 bytes in .*cache, its disk has 999 free; HF_HOME"):
        hub._check_plan("good/model", files, (), None)
    files[0].will_download = False
    hub._check_plan("good/model", files, (), None)


def test_ten_kills_leave_what_an_undisturbed_run_makes(tmp_path: Path, world: World, endpoint: str) -> None:
    arguments = ["good/data", f"{endpoint}/files/train.zip", "--kind", "dataset", "--include=mix.json", "--include=im*"]
    world.files["train.zip"] = zipped(
        tmp_path / "train.zip", {"a.jpg": random.Random(1).randbytes(200_000)}
    ).read_bytes()
    arguments.insert(2, str(tmp_path / "calm"))
    assert command(tmp_path / "calm_home", endpoint, *arguments).returncode == 0
    world.sent.clear()
    world.pace = 0.02
    arguments[2] = str(tmp_path / "out")
    draw = random.Random(2)
    for _ in range(10):
        process = start(tmp_path, endpoint, *arguments)
        target, end = world.sent["/files/train.zip"] + draw.randrange(1, 30_000), time.monotonic() + 20
        while world.sent["/files/train.zip"] < target and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert not (tmp_path / "out").exists() or names(tmp_path / "out") == names(tmp_path / "calm")
    world.pace = 0.0
    finished = command(tmp_path, endpoint, *arguments)
    assert finished.returncode == 0, finished.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")
    assert names(tmp_path / "out") == {"mix.json", "images.zip", "train.zip"}
    manifests = [json.loads((tmp_path / f"{name}.manifest.json").read_text()) for name in ("calm", "out")]
    for manifest in manifests:
        for entry in manifest["parts"][0]["files"].values():
            del entry["changed"]
    assert manifests[0] == manifests[1]
    size = len(world.files["train.zip"])
    assert world.sent["/files/train.zip"] < 2 * size, "the transfers did not go on where they stopped"
