"""`vlm fetch` against folders, and against a small server on this machine that answers as the Hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vlm.fetch.hub import fetch

MODEL = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
}
COMMIT = "1" * 40


def write(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_local_model_is_linked_without_its_pickles(tmp_path: Path) -> None:
    source = write(tmp_path / "source", MODEL)
    out = tmp_path / "made/here"
    fetch(str(source), out)
    assert names(out) == set(MODEL) - {"pytorch_model.bin"}
    assert (out / "model.safetensors").resolve() == source / "model.safetensors"

    (source / "tokenizer.json").unlink()
    fetch(str(source), out)
    assert not out.is_symlink() and names(out) == set(MODEL) - {"pytorch_model.bin", "tokenizer.json"}


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
def test_archives_of_a_data_set_are_unpacked(tmp_path: Path, prefix: str) -> None:
    source = write(tmp_path / "source", {"annotations.json": b"[]", "val2014/1.jpg": b"a"})
    with zipfile.ZipFile(source / "images.zip", "w") as archive:
        archive.writestr(f"{prefix}00000/1.jpg", b"b")
    fetch(str(source), tmp_path / "out", kind="dataset")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "annotations.json",
        "val2014",
        "images.zip",
        "images",
    }
    assert (tmp_path / "out/images/00000/1.jpg").read_bytes() == b"b"
    assert (tmp_path / "out/val2014/1.jpg").read_bytes() == b"a"
    assert not (source / "images").exists(), "the user's folder was written to"


def test_a_broken_archive_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    source = write(tmp_path / "source", {"images.zip": b"not a zip"})
    with pytest.raises(ValueError, match="images.zip"):
        fetch(str(source), tmp_path / "out", kind="dataset")
    assert not (tmp_path / "out").exists()


class Hub(BaseHTTPRequestHandler):
    """`good/model` exists, `gated/model` asks for terms, everything else is unknown."""

    requests: list[str] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        if "good/model" not in path:
            gated = "gated/" in path
            self._answer(403 if gated else 404, b"{}", {"X-Error-Code": "GatedRepo" if gated else "RepoNotFound"})
        elif "/no-such" in path:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in path:
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in MODEL.items()
            ]
            self._answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in MODEL]
            info = {"id": "good/model", "sha": COMMIT, "siblings": siblings}
            self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        else:
            data = MODEL[path.rsplit("/", 1)[1]]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            self._answer(200, data, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    Hub.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def command(tmp_path: Path, endpoint: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environ |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", **variables}
    line = [sys.executable, "-m", "vlm.cli", "fetch", *arguments]
    return subprocess.run(line, env=environ, capture_output=True, text=True, timeout=120)


def test_a_hub_model_is_fetched_once_and_then_read_from_the_cache(tmp_path: Path, endpoint: str) -> None:
    out = tmp_path / "out"
    first = command(tmp_path, endpoint, "good/model", str(out))
    assert first.returncode == 0, first.stderr
    assert {name: (out / name).read_bytes() for name in names(out)} == {
        name: data for name, data in MODEL.items() if name != "pytorch_model.bin"
    }
    assert not any("pytorch_model.bin" in request for request in Hub.requests if "resolve" in request)

    Hub.requests.clear()
    again = command(tmp_path, endpoint, "good/model", str(out), HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert names(out) and not Hub.requests


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["gated/model"], "accept terms", id="gated"),
        pytest.param(["missing/model"], "no such model", id="missing"),
        pytest.param(["good/model", "--revision", "no-such"], "no such revision", id="no-such-revision"),
        pytest.param(["resources/tiny/language2"], "no such folder", id="neither-folder-nor-repository"),
    ],
)
def test_what_cannot_be_fetched_is_refused_by_name(
    tmp_path: Path, endpoint: str, arguments: list[str], words: str
) -> None:
    source, *options = arguments
    refused = command(tmp_path, endpoint, source, str(tmp_path / "out"), *options)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.count("\n") == 1 and source in refused.stderr and words in refused.stderr
    assert not (tmp_path / "out").exists()


def test_an_unreachable_hub_is_one_message(tmp_path: Path) -> None:
    refused = command(tmp_path, "http://127.0.0.1:9", "good/model", str(tmp_path / "out"))
    assert refused.returncode == 2
    assert "cannot be reached" in refused.stderr and "Traceback" not in refused.stderr
