"""Puts a Hub repository or a local folder where the workflow expects it, complete or not at all.

The files stay where they are, in the Hub's cache or in the user's folder; `out` holds links to them. Where the cache
is, which server is asked and who asks are huggingface_hub's own settings: HF_HOME, HF_ENDPOINT, HF_TOKEN and
HF_HUB_OFFLINE.
"""

from __future__ import annotations

import fnmatch
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tqdm import tqdm

MODEL_FILES = ("*.json", "*.safetensors", "tokenizer.model*", "*.txt", "*.jinja", "README.md", "LICENSE*")
"""What a model is read from. Pickles (`*.bin`, `*.pt`, `*.pth`) run code when they are opened and are not fetched."""
TWINS = ("consolidated*.safetensors",)
"""The same weights once more, in the layout of Mistral's own programs: 14.5 GB that nothing here reads."""


def fetch(
    source: str,
    out: Path,
    revision: str = "main",
    kind: Literal["model", "dataset"] = "model",
    include: Sequence[str] = (),
) -> None:
    """Make the folder `out` of links to the files of `source`; archives of a data set are unpacked in it.

    Args:
        source: folder on this machine, or `owner/name` on the Hub.
        revision: branch, tag or commit on the Hub; ignored for a folder.
        kind: of a model only the files in MODEL_FILES are taken, and it must have `config.json` and safetensors.
        include: patterns of the files to download of a data set on the Hub, such as `data/test-*`; none for all.

    Raises:
        ValueError: no such repository or revision, no access to it, a model that cannot be read safely, or a broken
            archive.
        FileNotFoundError: the Hub cannot be reached and its cache does not hold the repository.
    """
    local = Path(source).expanduser()
    folder = local.resolve() if local.is_dir() else _download(source, revision, kind, include)
    patterns = MODEL_FILES if kind == "model" else ("*",)
    entries = sorted(
        entry
        for entry in folder.iterdir()
        if not entry.name.startswith(".") and any(fnmatch.fnmatch(entry.name, pattern) for pattern in patterns)
    )
    if kind == "model":
        _check_model(source, folder, {entry.name for entry in entries if entry.is_file()})
    beside = out.with_name(f".{out.name}.writing")
    if beside.exists():  # left by an interrupted run
        shutil.rmtree(beside)
    beside.mkdir(parents=True)
    for entry in entries:
        if kind == "model" and entry.is_dir():
            continue
        (beside / entry.name).symlink_to(entry.resolve(), target_is_directory=entry.is_dir())
    if kind == "dataset":
        for archive in sorted(beside.glob("*.zip")):
            _unpack(archive, beside)
    if out.is_dir() and not out.is_symlink():  # an older one goes when the new one is complete
        shutil.rmtree(out)
    beside.rename(out)


def _check_model(source: str, folder: Path, names: set[str]) -> None:
    if "config.json" not in names:
        raise ValueError(f"{source}: has no config.json, so it is not a model in Hugging Face format")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".pt", ".pth"))
        found = f"only {', '.join(pickles)}" if pickles else "no safetensors"
        raise ValueError(
            f"{source}: has {found}, and weights are read from safetensors alone, since a pickle runs code when it is "
            "opened; name a revision or a folder with safetensors"
        )


def _download(source: str, revision: str, kind: Literal["model", "dataset"], include: Sequence[str]) -> Path:
    """Folder of the repository in the Hub's cache."""
    from huggingface_hub import constants, errors, snapshot_download

    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"{source}: there is no such folder, and it is not a Hub repository `owner/name` either")
    where = f"{source} (revision {revision}) on {constants.ENDPOINT}"
    patterns, ignored = (list(MODEL_FILES), list(TWINS)) if kind == "model" else (list(include) or None, None)
    try:
        return Path(
            snapshot_download(
                source, repo_type=kind, revision=revision, allow_patterns=patterns, ignore_patterns=ignored
            )
        )
    except errors.GatedRepoError:
        raise ValueError(
            f"{where}: its owner asks you to accept terms; do so on its page, then set HF_TOKEN or run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{where}: there is no such {kind} (nor a folder of that name here), or it is private; if it is yours, set "
            "HF_TOKEN or run `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{where}: the repository has no such revision") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise FileNotFoundError(
            f"{where}: the Hub cannot be reached and its cache here does not hold the files; fetch them on a machine "
            f"that reaches it and name that folder as the source ({type(error).__name__})"
        ) from None


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack `images.zip` to `images/`, whether or not its members begin with `images/`; keep what is there already."""
    place = folder / archive.stem
    if place.exists():
        return
    try:
        with zipfile.ZipFile(archive) as content:
            members = content.namelist()
            inside = all(member.split("/")[0] == archive.stem for member in members)
            for member in tqdm(members, desc=f"unpacking {archive.name}", unit="file", mininterval=1):
                content.extract(member, folder if inside else place)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive.resolve()}: is broken, fetch it again ({error})") from None
