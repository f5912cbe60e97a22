"""Downloads a repository of the Hugging Face Hub into the Hub's cache, and proves that what came is what it lists.

Where the cache is, which server is asked and who asks are huggingface_hub's own settings: HF_HOME, HF_ENDPOINT,
HF_TOKEN (or `hf auth login`) and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from vlm.fetch import retry
from vlm.fetch.web import sha256_of

Kind = Literal["model", "dataset"]
_PULL_REQUESTS = 20  # looked at for safetensors
_Result = TypeVar("_Result")


@dataclass
class Snapshot:
    """Files of one commit."""

    folder: Path
    commit: str
    files: dict[str, dict[str, Any]]
    """Size, sha256 and time of the last change of each."""


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to fetch anything."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def download(
    repository: str,
    revision: str,
    kind: Kind,
    patterns: Sequence[str],
    *,
    ignored: Sequence[str] = (),
    offline: bool = False,
    commit: str | None = None,
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> Snapshot:
    """Bring files of a repository into the Hub's cache; what is there already is not fetched again.

    Args:
        patterns: files that are wanted, all if empty.
        ignored: files that are not, although they are wanted.
        offline: only look into the cache.
        commit: the one that `revision` has to lead to.
        known: files that were proven before, as `Snapshot.files` has them; these are not read again.

    Raises:
        ValueError: no such repository, revision or file; no access; another commit; damaged files; a full disk.
        FileNotFoundError: the Hub cannot be reached and its cache does not hold the files.
    """
    from huggingface_hub import constants, snapshot_download

    where = f"{repository} (revision {revision}) on {constants.ENDPOINT}"
    options: dict[str, Any] = {
        "repo_type": kind,
        "revision": revision,
        "allow_patterns": list(patterns) or None,
        "ignore_patterns": list(ignored) or None,
    }

    def bring() -> Path:
        folder = Path(_again(where, lambda: snapshot_download(repository, local_files_only=offline, **options)))
        _check_commit(where, folder.name, commit)
        return folder

    with _explained(where, repository, kind, patterns, offline):
        if not offline:
            planned = _plan(where, lambda: snapshot_download(repository, dry_run=True, **options))
            if planned is None:
                offline = True
            else:
                _check_plan(where, planned, patterns, commit)
        folder = bring()
        bad, found = _prove(folder, patterns, ignored, known or {})
        if bad and not offline:
            for name in bad:  # fetched once more, this time into an empty place
                (folder / name).resolve().unlink()
                (folder / name).unlink(missing_ok=True)
            folder = bring()
            bad, found = _prove(folder, patterns, ignored, known or {})
    if bad:
        raise ValueError(f"{where}: {', '.join(bad)} came damaged, twice: not what the repository lists")
    return Snapshot(folder, folder.name, found)


@contextmanager
def _explained(where: str, repository: str, kind: Kind, patterns: Sequence[str], offline: bool) -> Iterator[None]:
    """Say what to do about the errors of huggingface_hub."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repository}"
    try:
        yield
    except errors.GatedRepoError:
        raise ValueError(
            f"{where}: its owner asks you to accept terms; do so on {page}, then set HF_TOKEN or run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{where}: there is no such {kind} (nor a folder of that name here), or it is private; if it is yours, set "
            "HF_TOKEN or run `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{where}: the repository has no such revision") from None
    except errors.HFValidationError as error:
        raise ValueError(f"{repository}: is no folder here, and no name of a repository either: {error}") from None
    except errors.HfHubHTTPError as error:
        raise _refused(where, error) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = "nothing may be fetched offline" if offline else "the Hub cannot be reached"
        wanted = f" ({', '.join(patterns)})" if patterns and kind == "dataset" else ""
        raise FileNotFoundError(
            f"{where}: {why} and its cache, {constants.HF_HUB_CACHE}, does not hold the files{wanted}; fetch them on a "
            "machine that reaches it and name that folder as the source"
        ) from None
    except errors.HTTPError as error:
        raise FileNotFoundError(f"{where}: the Hub cannot be reached ({error})") from None


def _plan(where: str, action: Callable[[], list[Any]]) -> list[Any] | None:
    """What would be fetched; None where the Hub cannot be reached or is down, so that the cache has to do."""
    from huggingface_hub import errors

    try:
        return _again(where, action)
    except errors.DryRunError:
        pass
    except errors.HfHubHTTPError as error:
        if error.response.status_code not in retry.STATUSES:
            raise
    print(f"{where}: cannot be reached, looking into the cache", file=sys.stderr)
    return None


def _again(where: str, action: Callable[[], _Result]) -> _Result:
    """Ask again, later and later, where the server is busy or the transfer broke off."""
    from huggingface_hub import errors

    number = 0
    while True:
        number += 1
        try:
            return action()
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: the answer is not JSON ({error}): a proxy or a login page answered; see HF_ENDPOINT and "
                "HTTPS_PROXY"
            ) from None
        except (OSError, errors.DryRunError) as error:
            refused = error if isinstance(error, errors.HfHubHTTPError) else error.__cause__
            if isinstance(refused, errors.HfHubHTTPError):
                answer = refused.response
                if answer.status_code not in retry.STATUSES or number == retry.TRIES:
                    raise refused from None
                retry.pause(where, f"{answer.status_code}", number, answer.headers.get("Retry-After"))
            elif "Consistency check failed" in str(error) and number < retry.TRIES:
                retry.pause(where, "the transfer broke off", number)
            else:
                raise


def _refused(where: str, error: Any) -> Exception:
    status = error.response.status_code
    if status in retry.STATUSES:
        return FileNotFoundError(f"{where}: the Hub answers {status} again and again; run the command later to go on")
    hint = "; its token is not accepted, see HF_TOKEN or run `hf auth login`" if status in (401, 403) else ""
    return ValueError(f"{where}: the Hub refuses it ({status}){hint}")


def _check_commit(where: str, found: str, commit: str | None) -> None:
    if commit and found != commit:
        raise ValueError(
            f"{where}: leads to commit {found} now, and to {commit} when this run fetched it first; set "
            f"`revision: {commit}` to keep that"
        )


def _check_plan(where: str, planned: Sequence[Any], patterns: Sequence[str], commit: str | None) -> None:
    from huggingface_hub import constants

    if not planned:
        raise ValueError(f"{where}: has no file like {', '.join(patterns) or 'any'}")
    _check_commit(where, planned[0].commit_hash, commit)
    needed = sum(one.file_size or 0 for one in planned if one.will_download)
    place = Path(constants.HF_HUB_CACHE)
    place.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(place).free) < needed:
        raise ValueError(
            f"{where}: needs {needed:,} bytes in {place}, its disk has {free:,} free; HF_HOME names another"
        )


def _prove(
    folder: Path, patterns: Sequence[str], ignored: Sequence[str], known: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Names of damaged files, and what is known of the good ones.

    The cache names each file by what the Hub says of it: the sha256 of a large one, git's hash of a small one.
    """
    bad, found = [], {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or not _wanted(name, patterns, ignored):
            continue
        about = path.stat()
        entry = {"size": about.st_size, "changed": about.st_mtime_ns}
        listed = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
        if (before := known.get(name)) and {key: before.get(key) for key in entry} == entry:
            found[name] = {**entry, "sha256": before["sha256"]}
            continue
        sha256 = sha256_of(path)
        right = {64: sha256, 40: _git_hash(path) if len(listed) == 40 else ""}.get(len(listed), listed)
        if listed != right:
            bad.append(name)
        found[name] = {**entry, "sha256": sha256}
    return bad, found


def _wanted(name: str, patterns: Sequence[str], ignored: Sequence[str]) -> bool:
    def like(some: Sequence[str]) -> bool:
        return any(fnmatch.fnmatch(name, one) for one in some)

    return (not patterns or like(patterns)) and not like(ignored)


def _git_hash(path: Path) -> str:
    """As git names a file: the SHA-1 of its length and its bytes."""
    return hashlib.sha1(b"blob %d\0" % path.stat().st_size + path.read_bytes()).hexdigest()


def list_files(repository: str, revision: str) -> list[str]:
    """All files of a model's repository, for messages: none where the Hub does not tell."""
    from huggingface_hub import HfApi

    try:
        return list(HfApi().list_repo_files(repository, revision=revision))
    except Exception:  # a message is not worth another
        return []


def safetensors_revision(repository: str) -> str | None:
    """A pull request to a model with safetensors, such as the one the Hub's conversion makes; None if none has them."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(repository, include_pull_requests=True).pull_requests or []
    except Exception:  # a hint is not worth another message
        return None
    revisions = (str(ref.ref) for ref in refs[:_PULL_REQUESTS])
    return next(
        (one for one in revisions if any(name.endswith(".safetensors") for name in list_files(repository, one))), None
    )
