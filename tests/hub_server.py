"""A server on this machine that answers as the Hugging Face Hub does, and as plain hosts of files do, good and bad.

Paths below `/files/` are plain files. Repositories are `owner/name` with a folder of files for each revision.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = 100
"""Bytes from which a file is stored as a large one, named by its sha256; smaller ones are named by git's hash."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def commit_of(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


@dataclass
class World:
    """What the server serves and how it misbehaves; the tests change it while it runs."""

    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """owner/name -> revision -> path -> content."""
    gated: set[str] = field(default_factory=set)
    """Repositories that are listed, but give their files only to the token `hf_good`."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Plain files by name."""
    answers: dict[str, list[tuple[int, bytes, dict[str, str]]]] = field(default_factory=dict)
    """What the next requests for a path (its end) get instead: status, body, headers."""
    break_at: dict[str, list[int]] = field(default_factory=dict)
    """After how many bytes the next transfers of a path (its end) break off."""
    wrong: Counter[str] = field(default_factory=Counter)
    """How many of the next transfers of a path (its end) bring other bytes of the same number."""
    ignores_ranges: bool = False
    versions: Counter[str] = field(default_factory=Counter)
    """Counted up to give a plain file another ETag."""
    pace: float = 0.0
    """Seconds between the pieces of a body."""
    requests: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of bodies by path."""


class _Handler(BaseHTTPRequestHandler):
    world: World
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        self.world.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        for end, planned in self.world.answers.items():
            if path.endswith(end) and planned and (self.command == "GET" or planned[0][0] >= 400):
                self._send(*planned.pop(0))
                return
        if path.startswith("/files/"):
            self._plain(path)
        elif path.startswith("/api/"):
            self._api(path)
        else:
            self._resolve(path)

    def _plain(self, path: str) -> None:
        data = self.world.files.get(path.removeprefix("/files/"))
        if data is None:
            self._send(404, b"not here", {})
        else:
            tag = f'"{sha256(data)[:8]}-{self.world.versions[path.removeprefix("/files/")]}"'
            self._content(path, data, {"ETag": tag})

    def _api(self, path: str) -> None:
        found = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|refs)(?:/(.*))?)?", path)
        if not found:
            self._send(404, b"{}", {})
            return
        _, repository, what, revision = found.groups()
        revisions = self.world.repositories.get(repository)
        if revisions is None:
            self._fail(404, "RepoNotFound")
            return
        if what == "refs":
            pulls = [{"name": one, "ref": one, "targetCommit": commit_of(one)} for one in revisions if "refs/pr" in one]
            self._json({"branches": [], "converts": [], "tags": [], "pullRequests": pulls})
            return
        files = self._files(repository, (revision or "main").replace("%2F", "/"))
        if files is None:
            self._fail(404, "RevisionNotFound")
        elif what == "tree":
            self._json([_entry(name, data) for name, data in files[1].items()])
        else:
            self._json({"id": repository, "sha": files[0], "siblings": [{"rfilename": name} for name in files[1]]})

    def _resolve(self, path: str) -> None:
        found = re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/(.+)", path)
        assert found, f"the stand-in does not know {path}"
        repository, rest = found[1], found[2].replace("%2F", "/")
        for name in sorted(self.world.repositories.get(repository, {}), key=len, reverse=True):
            for revision in (name, commit_of(name)):
                files = self._files(repository, revision)
                if rest.startswith(f"{revision}/") and files:
                    self._repository_file(path, repository, files[0], files[1].get(rest.removeprefix(f"{revision}/")))
                    return
        self._fail(404, "RepoNotFound")

    def _repository_file(self, path: str, repository: str, commit: str, data: bytes | None) -> None:
        if repository in self.world.gated and self.headers.get("Authorization") != "Bearer hf_good":
            self._fail(403, "GatedRepo")
        elif data is None:
            self._fail(404, "EntryNotFound")
        else:
            headers = {"X-Repo-Commit": commit, "ETag": f'"{git_hash(data)}"'}
            if len(data) >= LARGE:
                headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
            self._content(path, data, headers)

    def _files(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for name, files in self.world.repositories[repository].items():
            if revision in (name, commit_of(name)):
                return commit_of(name), files
        return None

    def _content(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        """A file, or the end of it that is asked for; broken off or with other bytes where that is planned."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") in (None, headers["ETag"])
        status, start = 200, 0
        if asked and same and not self.world.ignores_ranges:
            status, start = 206, int(asked[1])
            if start >= len(data):
                self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        body = data[start:]
        if self.command == "GET":
            for end in [one for one in self.world.wrong if path.endswith(one) and self.world.wrong[one]]:
                self.world.wrong[end] -= 1
                body = bytes(byte ^ 1 for byte in body)
        self._send(status, body, {"Accept-Ranges": "bytes", **headers}, path)

    def _send(self, status: int, body: bytes, headers: dict[str, str], path: str = "") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = next(
            (planned.pop(0) for end, planned in self.world.break_at.items() if path.endswith(end) and planned), None
        )
        try:
            for place in range(0, len(body[:stop]), 4096):
                piece = body[:stop][place : place + 4096]
                self.wfile.write(piece)
                self.world.sent[path] += len(piece)
                if self.world.pace:
                    threading.Event().wait(self.world.pace)
        except (BrokenPipeError, ConnectionResetError):
            stop = 0
        if stop is not None:
            self.close_connection = True

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code})

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
    return entry | ({"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 1}} if len(data) >= LARGE else {})


@contextmanager
def serve(world: World) -> Iterator[str]:
    """The server's address while the block runs."""
    handler = type("Handler", (_Handler,), {"world": world})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
