from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import data_fixtures as fixtures
import pytest

from vlm.data.index import index
from vlm.data.shard import shard

NUM = 120


def _members(folder: Path, pattern: str) -> dict[str, bytes]:
    members = {}
    for path in sorted(folder.glob(pattern)):
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None and member.name not in members
                members[member.name] = stream.read()
    return members


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("sharded")
    records = fixtures.write_source(folder / "captions", NUM, text_only_share=0.2)
    shard(fixtures.write_config(folder / "config.yaml"), "captions", folder / "captions", folder / "out")
    return folder, records


def test_every_sample_is_in_one_split_as_it_was(sharded: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, records = sharded
    train, validation = (_members(folder / "out", f"{name}-*.tar") for name in ("shard", "validation"))
    assert not train.keys() & validation.keys()
    assert sum(name.endswith(".json") for name in validation) == 12
    members = train | validation
    expected = {}
    for position, record in enumerate(records):
        key = f"{position:09d}"
        assert json.loads(members.pop(f"{key}.json")) == record
        if "image" in record:
            expected[f"{key}.{record['image'][-3:]}"] = (folder / "captions/images" / record["image"]).read_bytes()
    assert members == expected
    assert {name[-3:] for name in expected} == {"jpg", "png"}


def test_shards_have_their_size_and_a_shuffled_order(sharded: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = sharded
    keys = {}
    for path in sorted((folder / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            keys[path.name] = [int(name[:9]) for name in tar.getnames() if name.endswith(".json")]
    assert {name: len(found) for name, found in keys.items()} == {
        "shard-000000.tar": 50,
        "shard-000001.tar": 50,
        "shard-000002.tar": 8,
        "validation-000000.tar": 12,
    }
    assert keys["shard-000000.tar"] != sorted(keys["shard-000000.tar"])
    assert max(keys["shard-000000.tar"]) > 90 and min(keys["shard-000001.tar"]) < 30
    counts = json.loads((folder / "out/shards.json").read_text())
    assert counts.pop("fingerprint") and counts.pop("sizes") == {
        path: (folder / "out" / path).stat().st_size for path in keys
    }
    assert counts == {"data_set": "captions", "train": 108, "validation": 12, "rejected": 0, "left_out": 0}


def test_same_seed_same_bytes_in_place_of_the_old_ones(sharded: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = sharded
    before = _hashes(folder / "out")
    again = folder / "again"
    again.mkdir()
    (again / "shard-000009.tar").write_bytes(b"from an older run")
    (folder / ".again.writing").mkdir()  # left by a killed run
    (folder / ".again.writing/shard-000007.tar").write_bytes(b"half")
    shard(folder / "config.yaml", "captions", folder / "captions", again)
    assert _hashes(again) == before
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    other = fixtures.write_config(folder / "other.yaml", seed=5)
    shard(other, "captions", folder / "captions", folder / "other")
    assert _hashes(folder / "other").keys() == before.keys()
    assert _hashes(folder / "other")["shard-000000.tar"] != before["shard-000000.tar"]


def _broken_source(folder: Path) -> list[str]:
    """60 samples, six of which cannot be used, and what must be said about each."""
    records = fixtures.write_source(folder, 60)
    pictures = folder / "images"
    records[3]["conversations"][0]["from"] = "bot"
    del records[8]["image"]
    records[13]["conversations"][0]["value"] = "no place for the picture"
    (pictures / records[18]["image"]).unlink()
    damaged = pictures / records[23]["image"]
    damaged.write_bytes(damaged.read_bytes()[:900])
    records[29]["image"] = "../annotations.json"
    (folder / "annotations.json").write_text(json.dumps(records))
    return [
        "annotations.json[3] (id 000003): conversations[0].from: 'bot' does not exist",
        "annotations.json[8] (id 000008): 1 <image> in the text, 0 picture(s)",
        "annotations.json[13] (id 000013): 0 <image> in the text, 1 picture(s)",
        "annotations.json[18] (id 000018).image: ",
        "annotations.json[23] (id 000023).image: ",
        "annotations.json[29] (id 000029).image: expected a path below",
    ]


def test_unusable_samples_are_left_out_counted_and_explained(tmp_path: Path) -> None:
    reasons = _broken_source(tmp_path / "captions")
    config = fixtures.write_config(tmp_path / "config.yaml", data__max_rejected_share=0.1)
    shard(config, "captions", tmp_path / "captions", tmp_path / "out")
    report = json.loads((tmp_path / "out/rejected.json").read_text())
    assert (report["num_samples"], report["num_rejected"]) == (60, 6)
    assert [entry["index"] for entry in report["rejected"]] == [3, 8, 13, 18, 23, 29]
    for entry, reason in zip(report["rejected"], reasons, strict=True):
        assert reason in entry["reason"]
    assert "does not exist" in report["rejected"][3]["reason"]
    assert "does not decode" in report["rejected"][4]["reason"]
    kept = {int(name[:9]) for name in _members(tmp_path / "out", "*.tar")}
    assert kept == set(range(60)) - {3, 8, 13, 18, 23, 29}


@pytest.mark.parametrize(("share", "how_many"), [(0.05, "5"), (0.09, "at least 6")], ids=["texts", "pictures"])
def test_too_many_unusable_samples_stop_the_command(tmp_path: Path, share: float, how_many: str) -> None:
    _broken_source(tmp_path / "captions")
    config = fixtures.write_config(tmp_path / "config.yaml", data__max_rejected_share=share)
    message = rf"^{how_many} of the 60 samples of .*annotations.json .*data.max_rejected_share = {share:.2%}.*'bot'"
    with pytest.raises(ValueError, match=message):
        shard(config, "captions", tmp_path / "captions", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "out.rejected.json").read_text())["num_rejected"] == int(how_many[-1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"annotations.json does not exist.*data.sets.captions.annotations"),
        ("[{]", r"annotations.json: not JSON as expected at byte 1: expected a whole record"),
        ('{"id": 1}', r"annotations.json: not JSON as expected at byte 0: expected a list"),
        ('[{"id": 1}, ', r"annotations.json: it ends at byte 12, expected a whole record; fetch it again"),
        ('[{"id": 1} {"id": 2}]', r"at byte 11: expected a comma or the end of the list, found '\{\"id"),
        ("\n<!doctype html>", r"annotations.json: it is a web page, not JSON"),
        ("[]", r"annotations.json: expected a list .*, found an empty one"),
    ],
    ids=["missing", "not-json", "not-a-list", "half-of-it", "two-values", "login-page", "empty"],
)
def test_annotations_that_cannot_be_read_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    config = fixtures.write_config(tmp_path / "config.yaml")
    (tmp_path / "captions").mkdir()
    if text is not None:
        (tmp_path / "captions/annotations.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        shard(config, "captions", tmp_path / "captions", tmp_path / "out")


def test_unknown_data_set_is_refused(tmp_path: Path) -> None:
    config = fixtures.write_config(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="'caption' is not under data.sets .*captions, dialogues"):
        shard(config, "caption", tmp_path, tmp_path / "out")


def test_index_splits_by_file_name_and_can_be_repeated(sharded: tuple[Path, list[dict[str, Any]]]) -> None:
    from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta

    folder = sharded[0] / "indexed"
    shard(sharded[0] / "config.yaml", "captions", sharded[0] / "captions", folder)
    for _ in range(2):
        index(folder)
        from megatron.energon.epathlib import EPath

        counts = {
            part: {
                shard.name: shard.count for shard in WebdatasetMeta.from_config(EPath(folder), split_part=part).shards
            }
            for part in ("train", "val")
        }
        assert counts == {
            "train": {"shard-000000.tar": 50, "shard-000001.tar": 50, "shard-000002.tar": 8},
            "val": {"validation-000000.tar": 12},
        }


@pytest.mark.parametrize("block", [1, 512], ids=["anywhere", "between-blocks"])
def test_index_refuses_a_truncated_shard_by_name(
    sharded: tuple[Path, list[dict[str, Any]]], tmp_path: Path, block: int
) -> None:
    for path in (sharded[0] / "out").glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index(tmp_path)
    broken = tmp_path / "shard-000001.tar"
    data = broken.read_bytes()
    broken.write_bytes(data[: int(len(data) * 0.6) // block * block])
    with pytest.raises(ValueError, match=r"shard-000001.tar: the tar file is truncated"):
        index(tmp_path)


def test_index_refuses_a_folder_without_samples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no shard-\*.tar to index"):
        index(tmp_path)
    (tmp_path / "shard-000000.tar").write_bytes(b"\0" * 10240)
    with pytest.raises(ValueError, match="shard-000000.tar has no samples"):
        index(tmp_path)
    assert not (tmp_path / ".nv-meta").exists()


@pytest.mark.parametrize("shards", [["ab", "cb"], ["aba"]], ids=["two-shards", "one-shard"])
def test_index_refuses_a_key_that_comes_twice(tmp_path: Path, shards: list[str]) -> None:
    for number, keys in enumerate(shards):
        with tarfile.open(tmp_path / f"shard-{number:06d}.tar", "w") as tar:
            for key in keys:
                tar.addfile(tarfile.TarInfo(f"{key}.json"))
    with pytest.raises(ValueError, match=f"two samples have the key {'b' if len(shards) == 2 else 'a'}; run"):
        index(tmp_path)
    assert not (tmp_path / ".nv-meta").exists()
