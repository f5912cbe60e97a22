"""Downloads a URL into a cache, going on where a broken transfer stopped, also after the process was killed.

The cache is `$HF_HOME/downloads`, beside the Hub's own. A download is complete when its `.json` is there; what is on
the way is called `.part`. Proxies are those of HTTP_PROXY and HTTPS_PROXY.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from vlm import files
from vlm.fetch import retry

TIMEOUT_SECONDS = 60.0
"""Without a byte, after which a transfer counts as broken."""
_CHUNK = 1 << 20


def cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "downloads"


def download(source: str, *, offline: bool = False) -> tuple[Path, dict[str, Any]]:
    """The downloaded file, and what is known of it: `url`, `size`, `sha256`, and `etag` and `modified` if given.

    Args:
        source: URL; it may end in `#sha256=...`, the hash that the file must have.
        offline: only look into the cache.

    Raises:
        ValueError: the server refuses it, or answers something else than the file; a wrong hash; the disk is too small.
        FileNotFoundError: it cannot be reached, or is not in the cache and may not be fetched.
    """
    url, _, fragment = source.partition("#")
    if fragment and not re.fullmatch("sha256=[0-9a-f]{64}", fragment):
        raise ValueError(f"{source}: after `#` there can only be sha256= and 64 digits (0-9, a-f)")
    wanted = fragment.removeprefix("sha256=")
    folder = cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / _name(url)
    about = path.with_name(f"{path.name}.json")
    if not about.is_file() and offline:
        raise FileNotFoundError(f"{url}: is not in the cache ({folder}), and nothing may be fetched offline")
    if not about.is_file():
        with _locked(folder):
            if not about.is_file():
                files.write_json(about, _fetch(url, path))
    known: dict[str, Any] = files.read_json(about)
    if not path.is_file() or path.stat().st_size != known["size"]:
        raise ValueError(f"{path}: was changed after it was downloaded; remove {folder} to fetch it again")
    if wanted and known["sha256"] != wanted:
        raise ValueError(
            f"{url}: its sha256 is {known['sha256']}, not {wanted} as the configuration says; remove {folder} to "
            "fetch it again"
        )
    return path, known


def _name(url: str) -> str:
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if not name or name.startswith("."):
        raise ValueError(f"{url}: names no file")
    return name


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with its holder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        files.lock(lock.fileno(), f"{folder}: waiting for another process that downloads it")
        yield


def _fetch(url: str, path: Path) -> dict[str, Any]:
    part = path.with_name(f"{path.name}.part")
    failed, longest = 0, _size(part)
    while True:
        retry_after = None
        try:
            entity = _transfer(url, part)
            break
        except urllib.error.HTTPError as error:
            if error.code not in retry.STATUSES:
                raise ValueError(f"{url}: the server refuses it ({error.code} {error.reason})") from None
            reason, retry_after = f"{error.code} {error.reason}", error.headers.get("Retry-After")
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.filename is not None:  # the disk's, not the network's
                raise ValueError(f"{error.filename}: cannot be written: {error.strerror}") from None
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        failed = 1 if _size(part) > longest else failed + 1
        longest = max(longest, _size(part))
        if failed >= retry.TRIES:
            raise FileNotFoundError(f"{url}: cannot be fetched ({reason}); run the command again to go on")
        retry.pause(url, reason, failed, retry_after)
    try:
        _check_content(url, part)
    except ValueError:
        part.unlink()
        raise
    sha256 = sha256_of(part)
    with open(part, "rb") as stream:
        os.fsync(stream.fileno())
    part.replace(path)
    _entity_file(part).unlink(missing_ok=True)
    return {"url": url, "size": path.stat().st_size, "sha256": sha256, **entity}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _transfer(url: str, part: Path) -> dict[str, str]:
    """One attempt to complete `part`; the server's names for this version of the file."""
    have = _size(part)
    entity = _read_entity(part)
    request = urllib.request.Request(url, headers={"User-Agent": "vlm", "Accept-Encoding": "identity"})
    if have and entity:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", entity.get("etag") or entity["modified"])
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return entity  # it was complete
        if error.code == 416:
            part.unlink()
            raise ConnectionError("the server has another version than the part that is here") from None
        raise
    with response:
        start = have if response.status == 206 else 0
        if start and not str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-"):
            part.unlink()
            raise ConnectionError("the server sent another range than it was asked for")
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        if not start:
            entity = {"etag": response.headers.get("ETag"), "modified": response.headers.get("Last-Modified")}
            entity = {name: value for name, value in entity.items() if value and not value.startswith("W/")}
            files.write_json(_entity_file(part), entity)
        if total is not None and (free := shutil.disk_usage(part.parent).free) < total - start:
            raise ValueError(
                f"{part.parent}: {url} needs {total - start:,} bytes, its disk has {free:,} free; HF_HOME names another"
            )
        with (
            open(part, "ab" if start else "wb") as stream,
            tqdm(total=total, initial=start, desc=part.stem, unit="B", unit_scale=True, mininterval=1) as progress,
        ):
            while chunk := response.read(_CHUNK):
                stream.write(chunk)
                progress.update(len(chunk))
    if total is not None and _size(part) != total:
        raise ConnectionError(f"the transfer broke off at byte {_size(part):,} of {total:,}")
    return entity


def _entity_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.entity")


def _read_entity(part: Path) -> dict[str, str]:
    try:
        return dict(json.loads(_entity_file(part).read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _check_content(url: str, path: Path) -> None:
    """Refuse what a proxy or a login page answers in a file's place, and an archive without its end."""
    with open(path, "rb") as stream:
        start = stream.read(512)
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        raise ValueError(
            f"{url}: a web page came instead of the file ({start[:60]!r}): a proxy or a login page answered"
        )
    if url.endswith(".zip") and not zipfile.is_zipfile(path):
        raise ValueError(f"{url}: what came is not a zip archive ({path.stat().st_size:,} bytes)")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
