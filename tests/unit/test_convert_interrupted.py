"""What stops a conversion or an export in the middle leaves nothing under the final name, and the source as it was."""

from __future__ import annotations

import builtins
import collections
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from folder_fixtures import make_combined, names

from vlm import checkpoint
from vlm.checkpoint import Tensors
from vlm.checkpoint import tensors as streams
from vlm.convert import language, llava
from vlm.export import base
from vlm.export import llava as exports
from vlm.weights import Folder, Row
from vlm.weights import folder as folders


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`hub/language`, `hub/vision`, `language`, `vision` and `combined` of one run."""
    return make_combined(tmp_path_factory.mktemp("run")).parent


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def convert(run, out):
    language.convert(run / "hub/language", out)


def export(run, out):
    exports.export(run / "combined", out)


# what writes, where it opens its files, the file for which no room is left
WRITERS = {
    "weights": (convert, streams, ".distcp"),
    "last-file": (convert, streams, "common.pt"),
    "export": (export, folders, ".safetensors"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_becomes_full_is_one_clear_error(tmp_path, run, monkeypatch, writer):
    write, module, ending = WRITERS[writer]

    def full(path, mode="r", *arguments, **options):
        """What is written goes to the device that is always full."""
        name = "/dev/full" if "w" in mode and str(path).endswith(ending) else path
        return builtins.open(name, mode, *arguments, **options)

    monkeypatch.setattr(module, "open", full, raising=False)
    with pytest.raises(ValueError, match=r"out: its disk became full; \d+,\d+ bytes are needed, nothing of it"):
        write(run, tmp_path / "out")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("write", [convert, export])
def test_a_disk_without_room_is_found_out_first(tmp_path, run, monkeypatch, write):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: collections.namedtuple("U", "free")(1000))
    monkeypatch.setattr(Folder, "read", lambda *arguments: pytest.fail("a weight was read"))
    monkeypatch.setattr(Tensors, "read", lambda *arguments: pytest.fail("a weight was read"))
    with pytest.raises(ValueError, match=r"out: needs \d\d\d,\d\d\d bytes, and its disk has 1,000 free"):
        write(run, tmp_path / "out")
    assert names(tmp_path) == set()


PLACES = {
    "inside-the-source": ("source/converted", r"lies inside .*source, which is read"),
    "inside-by-a-link": ("link/converted", r"lies inside .*source, which is read"),
    "the-source": ("source", r"is .*source, which is read"),
    "around-the-source": ("", r"holds .*source, which is read"),
    "somebody-elses-folder": ("home", r"holds other files \(there is no manifest.json\), which would be lost"),
    "a-file": ("home/letter", "is a file; name a new folder"),
    "below-a-file": ("home/letter/converted", "cannot be written: Not a directory"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_would_cost_something_is_refused(tmp_path, run, case):
    place, message = PLACES[case]
    shutil.copytree(run / "hub/language", tmp_path / "source")
    (tmp_path / "link").symlink_to("source")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter").write_text("dear")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=message):
        language.convert(tmp_path / "source", tmp_path / place)
    assert content(tmp_path) == before and names(tmp_path) == {"source", "link", "home"}


def test_a_place_without_permission_is_refused(tmp_path, run, monkeypatch):
    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)  # the tests may run as root, whom no mode keeps out
    with pytest.raises(ValueError, match=r"out: cannot be written: Permission denied \(.*\.out\.writing\)"):
        language.convert(run / "hub/language", tmp_path / "out")


def test_only_an_export_is_replaced_by_an_export(tmp_path, run):
    shutil.copytree(run / "hub/language", tmp_path / "model")
    before = content(tmp_path / "model")
    with pytest.raises(ValueError, match="model: holds other files"):
        base.export_language(run / "language", tmp_path / "model")
    assert content(tmp_path / "model") == before
    for _ in range(2):
        base.export_language(run / "language", tmp_path / "export")


KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from vlm import checkpoint, files
from vlm.convert import language
from vlm.export import base
from vlm.weights import Folder
from vlm.checkpoint import Tensors

torch.set_num_threads(1)
run, work = Path(sys.argv[1]), Path(sys.argv[2])
WRITE = {
    "convert": lambda out: language.convert(run / "hub/language", out),
    "export": lambda out: base.export_language(run / "language", out),
}

def kill_after(owner, name, calls, which=lambda *arguments: True):
    original, left = getattr(owner, name), [calls]
    def counted(*arguments, **options):
        if which(*arguments):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
        return original(*arguments, **options)
    setattr(owner, name, counted)

POINTS = {
    "first-weight": lambda: [kill_after(owner, "read", 0) for owner in (Folder, Tensors)],
    "middle": lambda: [kill_after(owner, "read", 11) for owner in (Folder, Tensors)],
    "before-the-rename": lambda: kill_after(files, "put_in_place", 0),
    "between-the-renames": lambda: kill_after(Path, "rename", 0, lambda path, *to: path.name.endswith(".writing")),
}
found = {}
for verb, write in WRITE.items():
    for point, arm in POINTS.items():
        out = work / f"{verb}-{point}"
        if point == "between-the-renames":
            write(out)  # an older one is there
        child = os.fork()
        if not child:
            arm()
            write(out)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        left = sorted(path.name for path in work.iterdir())
        there = out.exists()
        write(out)
        again = sorted(path.name for path in work.iterdir())
        found[f"{verb}-{point}"] = [status, there, left, again]
        for path in work.iterdir():
            path.rename(work.parent / "done" / path.name)
print(json.dumps(found))
"""


def test_a_kill_leaves_nothing_half_done_and_the_next_run_clears_up(tmp_path, run):
    before = content(run)
    (tmp_path / "work").mkdir()
    (tmp_path / "done").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, run, tmp_path / "work"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 8
    for name, (status, there, left, again) in found.items():
        assert status == 9, f"{name} was not killed, so this shows nothing"
        assert not there and f".{name}.writing" in left, name
        assert again == [name], "something of the killed run is left"
    for name in found:
        if name.startswith("convert"):
            wanted, tensors = Tensors(run / "language"), Tensors(tmp_path / "done" / name)
            assert checkpoint.read_manifest(tmp_path / "done" / name).identity == wanted.links[0][1].identity
            assert all(torch.equal(tensors.read(key), wanted.read(key)) for key in wanted.specs)
        else:
            weights, source = Folder(tmp_path / "done" / name), Folder(run / "hub/language")
            assert all(torch.equal(weights.read(key), source.read(key)) for key in source.entries)
    assert content(run) == before


class Alive:
    """Counts the bytes of tensors that somebody still holds."""

    def __init__(self):
        self.bytes = self.most = 0

    def watch(self, tensor):
        """The same tensor in memory that is seen to be given back."""
        memory = tensor.contiguous().view(-1).view(torch.uint8).numpy().copy()
        self.bytes += memory.nbytes
        self.most = max(self.most, self.bytes)
        weakref.finalize(memory, self._gone, memory.nbytes)
        return torch.from_numpy(memory).view(tensor.dtype).view(tensor.shape)

    def _gone(self, num_bytes):
        self.bytes -= num_bytes


STREAMED = {
    "convert-language": lambda run, out: language.convert(run / "hub/language", out),
    "convert-llava": lambda run, out: llava.convert(run / "llava", out),
    "export-language": lambda run, out: base.export_language(run / "combined", out),
    "export-llava": lambda run, out: exports.export(run / "combined", out),
}


@pytest.mark.parametrize("writer", STREAMED)
def test_no_more_than_the_tensor_at_hand_and_the_one_made_of_it_are_held(tmp_path, run, monkeypatch, writer):
    """At most the largest tensor and what it is made of, and of the ones before and after a small one."""
    if not (run / "llava").exists():
        exports.export(run / "combined", run / "llava")
    alive = Alive()
    for owner, method in ((Folder, "read"), (Tensors, "read"), (Row, "join")):
        original = getattr(owner, method)
        monkeypatch.setattr(owner, method, lambda *a, original=original: alive.watch(original(*a)))
    split = Row.split
    monkeypatch.setattr(Row, "split", lambda *a: {name: alive.watch(piece) for name, piece in split(*a).items()})
    STREAMED[writer](run, tmp_path / "out")
    kind, source = writer.split("-")
    sizes = [
        entry.num_bytes for entry in Folder(tmp_path / "out" if kind == "export" else run / "llava").entries.values()
    ]
    assert 0 < alive.most <= 2.1 * max(sizes) < sum(sizes) / 2
    assert alive.bytes == 0
