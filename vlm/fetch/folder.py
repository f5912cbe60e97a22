"""Puts what a source consists of where the workflow expects it, complete or not at all.

The files stay where they are: in the Hub's cache, in the cache of downloads, or in the user's folder. The folder that
is made holds links to them. Beside it `<name>.manifest.json` says what came from where: commit, sizes, sha256. It
outlives the folder, so that a run that fetches again gets the same or is told.
"""

from __future__ import annotations

import fnmatch
import shutil
import sys
import threading
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from vlm import files, pictures
from vlm.fetch import hub, web
from vlm.fetch.hub import Kind

MODEL_FILES = ("*.json", "*.safetensors", "tokenizer.model*", "*.txt", "*.jinja", "README.md", "LICENSE*")
"""What a model is read from. Pickles (`*.bin`, `*.pt`, `*.pth`) run code when they are opened and are not fetched."""
TWINS = ("consolidated*.safetensors",)
"""The same weights once more, in the layout of Mistral's own programs: 14.5 GB that nothing here reads."""


@dataclass(frozen=True)
class Origin:
    """One part of a source."""

    source: str
    place: str = ""
    """Folder below that of the source in which its files belong."""

    @property
    def is_url(self) -> bool:
        return "://" in self.source

    @property
    def local(self) -> Path | None:
        """The folder or file on this machine that is meant, whether or not it exists."""
        path = Path(self.source).expanduser()
        named = self.source.startswith(("/", "./", "../", "~")) or self.source in (".", "..")
        return path if not self.is_url and (named or path.exists()) else None

    def __str__(self) -> str:
        return f"{self.place} from {self.source}" if self.place else self.source


@dataclass
class _Part:
    """An origin once its files are on this machine: a folder or a file, and what the manifest says of it."""

    origin: Origin
    path: Path
    about: dict[str, Any]


def fetch(
    source: str | Sequence[str],
    out: Path,
    revision: str = "main",
    kind: Kind = "model",
    include: Sequence[str] = (),
    below: Sequence[str] = (),
    unpack: bool = False,
    offline: bool = False,
) -> None:
    """Make the folder `out` of links to the files of all sources.

    Args:
        source: folders or files on this machine, `owner/name` or `owner/name@revision` on the Hub, or URLs.
        revision: branch, tag or commit of Hub repositories that name none.
        kind: of a model only the files in MODEL_FILES are taken, and it must have `config.json` and safetensors.
        include: patterns of the files to download of a data set on the Hub, such as `data/test-*`; none for all.
        below: `PLACE=SOURCE`, whose files belong in the folder PLACE of `out`. Not fetched where a folder of `source`
            has that place already.
        unpack: unpack the zip archives.
        offline: fetch nothing, take what the caches hold.

    Raises:
        ValueError: no such repository or revision, no access to it, a model that cannot be read safely, a broken
            archive, or something else than what was fetched before.
        FileNotFoundError: a host cannot be reached and the cache does not hold the file, or a folder does not exist.
    """
    sources = [source] if isinstance(source, str) else list(source)
    origins = [Origin(one) for one in sources]
    for one in below:
        place, equals, text = one.partition("=")
        if not equals or not place or ".." in PurePosixPath(place).parts or place.startswith("/"):
            raise ValueError(f"--below {one}: expected PLACE=SOURCE, with a place inside of the folder")
        if any(origin.local and (origin.local / place).exists() for origin in origins if not origin.place):
            print(f"{place}: is in the source already, {text} is not fetched", file=sys.stderr)
            continue
        origins.append(Origin(text, place))
    if lost := [str(one) for one in origins if one.local and not one.local.exists()]:
        raise FileNotFoundError("; ".join(f"{one}: there is no such folder or file" for one in lost))
    record = out.with_name(f"{out.name}.manifest.json")
    offline = offline or hub.is_offline()
    before = files.read_json(record)["parts"] if record.is_file() else []
    parts = _bring(origins, revision, kind, include, offline, {one["source"]: one for one in before})
    if kind == "model":
        for part in parts:
            _check_model(part)

    folder = files.beside(out)
    for part in parts:
        _link(part, folder, MODEL_FILES if kind == "model" else ("*",))
    if unpack:
        for archive in sorted(folder.rglob("*.zip")):
            _unpack(archive)
    files.write_json(record, {"parts": [part.about for part in parts]})
    if out.is_dir() and not out.is_symlink():  # an older one goes when the new one is complete
        shutil.rmtree(out)
    folder.rename(out)


def _bring(
    origins: Sequence[Origin],
    revision: str,
    kind: Kind,
    include: Sequence[str],
    offline: bool,
    before: Mapping[str, Mapping[str, Any]],
) -> list[_Part]:
    """All parts, from all hosts at once. A failure is told when the others are done: what they fetched is kept."""
    parts: dict[Origin, _Part] = {}
    failures: list[Exception] = []

    def bring(origin: Origin) -> None:
        try:
            parts[origin] = _bring_one(origin, revision, kind, include, offline, before.get(origin.source, {}))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=bring, args=(one,), daemon=True) for one in origins]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(failures) == 1 or any(not isinstance(one, ValueError | FileNotFoundError) for one in failures):
        raise next((one for one in failures if not isinstance(one, ValueError | FileNotFoundError)), failures[0])
    if failures:
        raise ValueError(f"{len(failures)} of {len(origins)} parts are missing:\n  " + "\n  ".join(map(str, failures)))
    return [parts[one] for one in origins]


def _bring_one(
    origin: Origin, revision: str, kind: Kind, include: Sequence[str], offline: bool, before: Mapping[str, Any]
) -> _Part:
    about: dict[str, Any] = {"source": origin.source, "place": origin.place}
    if origin.local:
        return _Part(origin, origin.local.resolve(), about)
    if origin.is_url:
        path, known = web.download(origin.source, offline=offline)
        if before.get("sha256", known["sha256"]) != known["sha256"]:
            raise ValueError(
                f"{origin.source}: is another file now (sha256 {known['sha256']}) than when this run fetched it first "
                f"({before['sha256']})"
            )
        return _Part(origin, path, about | known)
    repository, _, named = origin.source.partition("@")
    revision = named or revision
    if repository.count("/") != 1:
        raise ValueError(f"{repository}: there is no such folder, and it is not a Hub repository `owner/name` either")
    fetched_before = before.get("revision") == revision
    patterns, ignored = (MODEL_FILES, TWINS) if kind == "model" else ((include, ()) if not origin.place else ((), ()))
    snapshot = hub.download(
        repository,
        revision,
        kind,
        patterns,
        ignored=ignored,
        offline=offline,
        commit=before.get("commit") if fetched_before else None,
        known=before.get("files") if fetched_before else None,
    )
    return _Part(
        origin, snapshot.folder, about | {"revision": revision, "commit": snapshot.commit, "files": snapshot.files}
    )


def _check_model(part: _Part) -> None:
    source = part.origin.source
    names = {entry.name for entry in part.path.iterdir() if entry.is_file()} if part.path.is_dir() else set()
    if "config.json" not in names:
        raise ValueError(f"{source}: has no config.json, so it is not a model in Hugging Face format")
    if any(name.endswith(".safetensors") for name in names):
        return
    listed = names if part.origin.local else hub.list_files(source.partition("@")[0], part.about["commit"])
    pickles = sorted(name for name in listed if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    found = f"only {', '.join(pickles)}" if pickles else "no safetensors"
    hint = "name a revision or a folder with safetensors"
    if not part.origin.local and (better := hub.safetensors_revision(source.partition("@")[0])):
        hint = f"the pull request {better} to it has safetensors: set `revision: {better}`, if you trust who made it"
    raise ValueError(
        f"{source}: has {found}, and weights are read from safetensors alone, since a pickle runs code when it is "
        f"opened; {hint}"
    )


def _link(part: _Part, folder: Path, patterns: Sequence[str]) -> None:
    """Links to the entries of a part, in its place."""
    place = _own_folder(folder, part.origin.place)
    entries = sorted(part.path.iterdir()) if part.path.is_dir() else [part.path]
    for entry in entries:
        if entry.name.startswith(".") or (patterns != ("*",) and (entry.is_dir() or not _like(entry.name, patterns))):
            continue
        link = place / entry.name
        if link.exists():
            raise ValueError(f"{part.origin}: {entry.name} is in another part of the source too ({link.resolve()})")
        link.symlink_to(entry.resolve(), target_is_directory=entry.is_dir())


def _like(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, one) for one in patterns) and not any(fnmatch.fnmatch(name, one) for one in TWINS)


def _own_folder(folder: Path, place: str) -> Path:
    """A real folder at `place`, never one of the user's that a link leads to; that one's entries are linked in it."""
    for step in PurePosixPath(place).parts:
        folder = folder / step
        linked = folder.resolve() if folder.is_symlink() else None
        if linked:
            folder.unlink()
        folder.mkdir(exist_ok=True)
        for entry in sorted(linked.iterdir()) if linked else []:
            (folder / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    return folder


def _unpack(archive: Path) -> None:
    """Unpack `val2014.zip` to `val2014/`, whether or not its members begin with `val2014/`; keep what is there."""
    place = archive.with_suffix("")
    if place.exists():
        return
    members = pictures.check_members(archive)
    inside = all(member.filename.split("/")[0] == archive.stem for member in members)
    needed, free = sum(member.file_size for member in members), shutil.disk_usage(archive.parent).free
    if free < needed:
        raise ValueError(f"{place}: unpacking {archive.name} needs {needed:,} bytes, its disk has {free:,} free")
    try:
        with zipfile.ZipFile(archive) as content:
            for member in tqdm(members, desc=f"unpacking {archive.name}", unit="file", mininterval=1):
                content.extract(member, archive.parent if inside else place)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # damaged, encrypted, packed in other ways
        raise ValueError(f"{archive.resolve()}: cannot be unpacked: {error}") from None
