from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vlm import config as configuration
from vlm.train import identity

ROOT = Path(__file__).parents[2]


def settings(**changes):
    tree = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    for path, value in changes.items():
        node = tree
        *keys, last = path.split("__")
        for key in keys:
            node = node[key]
        node[last] = value
    return configuration.validate(tree)


def describe(stage: str = "sft", parent: str = "abc", data: str = "def", **changes):
    return identity.describe(settings(**changes), stage, parent, {"sft": data})


@pytest.mark.parametrize(
    "change",
    [
        {"stages__sft__optimizer__lr": 2.0e-6},
        {"stages__sft__iterations": 10},
        {"stages__sft__trainable": ["language"]},
        {"seed": 7},
        {"dtype": "float32"},
        {"data__packing_buffer": 3},
        {"models__vision__feature_layer": -2},
        {"parent": "abd"},
        {"data": "deg"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_the_weights_makes_another_run(change):
    assert identity.digest(describe(**change)) != identity.digest(describe())


@pytest.mark.parametrize(
    "change",
    [
        {"stages__sft__save_interval": 2000},
        {"stages__sft__log_interval": 7},
        {"stages__sft__validation_interval": 100},
        {"stages__sft__validation_batches": 7},
        {"stages__sft__keep": 7},
        {"stages__sft__keep_best": False},
        {"stages__sft__early_stop": 7},
        {"stages__pretrain__optimizer__lr": 1.0},
        {"data__workers": 7},
        {"evaluation__batch_size": 7},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_rest_does_not(change):
    assert identity.digest(describe(**change)) == identity.digest(describe())


def test_difference_names_the_keys_and_both_values():
    text = identity.difference(describe(), describe(stages__sft__optimizer__lr=2.0e-6, parent="x" * 64))
    assert text == 'stages.sft.optimizer.lr: 1e-06 -> 2e-06, parent: "abc" -> xxxxxxxx…'


def indexed(directory: Path, content: bytes) -> Path:
    (directory / ".nv-meta").mkdir(parents=True)
    (directory / "shard-000000.tar").write_bytes(content)
    return directory


def test_fingerprint_sees_a_changed_byte_of_equal_size_in_small_and_large_shards(tmp_path):
    large = bytes(9 << 20)
    first = identity.fingerprint(indexed(tmp_path / "a", large))
    assert first == identity.fingerprint(indexed(tmp_path / "b", large))
    assert first != identity.fingerprint(indexed(tmp_path / "c", b"x" + large[1:]))
    assert first != identity.fingerprint(indexed(tmp_path / "d", large[1:]))
    small = bytes(3 << 20)
    assert identity.fingerprint(indexed(tmp_path / "e", small)) != identity.fingerprint(
        indexed(tmp_path / "f", small[:-1] + b"x")
    )


def test_fingerprint_names_a_folder_that_is_missing_unindexed_or_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        identity.fingerprint(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="is not indexed"):
        identity.fingerprint(tmp_path)
    (tmp_path / ".nv-meta").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no training shards"):
        identity.fingerprint(tmp_path)


def leave(out: Path, text: str) -> None:
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "kept").write_text(text)
    (out / "metrics.jsonl").write_text(text)
    identity.write(out / "checkpoints", {"seed": text})


def test_set_aside_keeps_every_earlier_run(tmp_path):
    assert identity.set_aside(tmp_path, None) is None
    folders = []
    for text in ("one", "two", "one"):
        leave(tmp_path, text)
        folders.append(identity.set_aside(tmp_path, identity.read(tmp_path / "checkpoints")))
        assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "metrics.jsonl").exists()
    assert len(set(folders)) == 3
    assert [(folder / "metrics.jsonl").read_text() for folder in folders] == ["one", "two", "one"]
    assert [(folder / "checkpoints" / "kept").read_text() for folder in folders] == ["one", "two", "one"]


def test_set_aside_goes_on_where_a_kill_stopped_it(tmp_path, monkeypatch):
    leave(tmp_path, "one")
    rename, moves = identity.os.rename, []

    def killed_at_second(source, target):
        if moves:
            raise KeyboardInterrupt
        moves.append(source)
        rename(source, target)

    monkeypatch.setattr(identity.os, "rename", killed_at_second)
    with pytest.raises(KeyboardInterrupt):
        identity.set_aside(tmp_path, {"seed": "one"})
    monkeypatch.setattr(identity.os, "rename", rename)
    assert identity.read(tmp_path / "checkpoints") == {"seed": "one"}, "the identity moved before the rest"
    folder = identity.set_aside(tmp_path, {"seed": "one"})
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "metrics.jsonl"]


def test_a_broken_identity_is_named(tmp_path):
    (tmp_path / "identity.json").write_text('{"seed":')
    with pytest.raises(ValueError, match=r"identity\.json: not JSON"):
        identity.read(tmp_path)


def test_knowing_a_run_needs_no_torch():
    code = "import sys, vlm.train.identity; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
