from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import data_fixtures as fixtures
import numpy as np
import pytest
import torch

from vlm import config as settings
from vlm.batch import PackedBatch
from vlm.data.index import index
from vlm.data.shard import shard
from vlm.loader import Loader, build
from vlm.prompt import Prompter

NUM_CAPTIONS, NUM_DIALOGUES = 120, 80
SEQUENCE = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixtures.write_loader_folder(tmp_path_factory.mktemp("loader"), NUM_CAPTIONS, NUM_DIALOGUES)


Open = Callable[..., Loader]


@pytest.fixture
def open_loader(folder: Path, tmp_path: Path) -> Iterator[Open]:
    """Builds a loader with changed settings; its processes end with the test."""
    opened = []

    def make(*, data: Path | None = None, rank: int = 0, world: int = 1, **changes: Any) -> Loader:
        config = settings.load(fixtures.write_config(tmp_path / "config.yaml", **changes))
        dirs = {name: (data or folder / "data") / name for name in config.stages["pretrain"].data}
        loader = build(config, "pretrain", dirs, folder / "language", folder / "vision", rank, world)
        opened.append(loader)
        return loader

    yield make
    for loader in opened:
        loader.close()


def _take(loader: Loader, number: int) -> list[PackedBatch]:
    return list(islice(loader, number))


def _keys(batches: list[PackedBatch]) -> list[str]:
    return [key for batch in batches for key in batch.sample_keys]


def _equal(one: PackedBatch, other: PackedBatch) -> bool:
    tensors = ("tokens_S", "positions_S", "cu_seqlens", "images", "image_positions", "trained_positions", "labels_R")
    return one.sample_keys == other.sample_keys and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in tensors
    )


def _split_keys(folder: Path, data_set: str, prefix: str) -> set[str]:
    keys = set()
    for path in (folder / "data" / data_set).glob(f"{prefix}-*.tar"):
        with tarfile.open(path) as tar:
            keys |= {f"{data_set}/{name[:9]}" for name in tar.getnames()}
    return keys


def test_tokens_labels_and_pictures_stay_together(open_loader: Open, folder: Path) -> None:
    prompter = Prompter(folder / "language", fixtures.IMAGE_TOKEN, fixtures.NUM_IMAGE_TOKENS)
    records = {name: json.loads((folder / name / "annotations.json").read_text()) for name in ("captions", "dialogues")}
    num_text_only = 0
    for batch in _take(open_loader(), 30):
        pictures = iter(batch.images.numpy())
        for number, key in enumerate(batch.sample_keys):
            start, end = batch.cu_seqlens[number : number + 2].tolist()
            data_set, position = key.split("/")
            record = records[data_set][int(position)]
            expected = prompter.training(record["conversations"], int("image" in record))
            assert batch.tokens_S[start:end].tolist() == expected.tokens_L.tolist()
            positions = batch.trained_positions.numpy()
            positions = positions[(positions >= start) & (positions < end)] - start
            assert positions.tolist() == np.flatnonzero(expected.trained_L[1:]).tolist()
            num_text_only += "image" not in record
            if "image" in record:
                assert fixtures.picture_index(next(pictures)) == int(position)
        assert next(pictures, None) is None
        assert len(batch.image_positions) == len(batch.images) * fixtures.NUM_IMAGE_TOKENS
        assert batch.tokens_S.shape == (SEQUENCE,) and batch.cu_seqlens[-1] == SEQUENCE
    assert num_text_only > 5


def test_every_training_sample_comes_and_no_other(open_loader: Open, folder: Path) -> None:
    loader = open_loader(stages__pretrain__data={"captions": 1.0})
    seen = _keys(_take(loader, 140))
    train = _split_keys(folder, "captions", "shard")
    assert len(train) == 108 and set(seen) == train
    assert not set(seen) & _split_keys(folder, "captions", "validation")
    counts = {key: seen.count(key) for key in train}
    assert max(counts.values()) - min(counts.values()) <= 2  # epochs, not draws with replacement


def test_weights_decide_how_often_a_data_set_is_drawn(open_loader: Open) -> None:
    keys = _keys(_take(open_loader(), 200))
    assert len(keys) > 500
    assert 0.70 < sum(key.startswith("dialogues/") for key in keys) / len(keys) < 0.80


@pytest.mark.parametrize("workers", [0, 2])
def test_the_seed_decides_the_stream(open_loader: Open, workers: int) -> None:
    first, again, other = (
        _take(open_loader(data__workers=workers, seed=seed, data__packing_buffer=8), 20) for seed in (1, 1, 2)
    )
    assert all(map(_equal, first, again))
    assert _keys(first) != _keys(other)


@pytest.mark.parametrize(
    ("workers", "taken"),
    [(0, 0), (0, 7), (0, 40), (2, 0), (2, 13)],
    ids=["at-once", "first-epoch", "third-epoch", "processes-at-once", "processes-odd-number"],
)
def test_a_restored_loader_goes_on_exactly(open_loader: Open, workers: int, taken: int) -> None:
    options = {"data__workers": workers, "stages__pretrain__sequence_length": 160, "data__max_rejected_share": 1.0}
    loader = open_loader(**options)
    _take(loader, taken)
    state = loader.state()
    expected = _take(loader, 25)
    restored = open_loader(**options)
    restored.restore(state)
    assert all(map(_equal, expected, _take(restored, 25)))
    for name in ("num_sequences", "num_samples", "num_tokens", "rejected"):
        assert getattr(restored, name) == getattr(loader, name)
    assert loader.rejected  # too long for this sequence length: their count is part of what goes on


@pytest.mark.parametrize("workers", [0, 2])
def test_a_permutation_goes_on_exactly_past_broken_pictures(
    open_loader: Open, damaged: tuple[Path, list[str]], workers: int
) -> None:
    """In the middle of an epoch and of a packing buffer, with settings as in config.yaml."""
    options = {"data__shuffle_run": 1, "data__shuffle_buffer": 1, "data__packing_buffer": 24, "data__workers": workers}
    loader = open_loader(data=damaged[0], **options)
    _take(loader, 9)
    state = loader.state()
    expected = _take(loader, 40)
    restored = open_loader(data=damaged[0], **options)
    restored.restore(state)
    assert all(map(_equal, expected, _take(restored, 40)))
    assert restored.rejected == loader.rejected and loader.rejected.keys() <= set(damaged[1])
    assert loader.rejected


def test_ranks_share_the_samples_without_overlap(open_loader: Open, folder: Path) -> None:
    seen = []
    for rank in range(2):
        loader = open_loader(rank=rank, world=2, stages__pretrain__data={"captions": 1.0})
        seen.append(set(_keys(_take(loader, 70))))
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == _split_keys(folder, "captions", "shard")


def test_packing_fills_the_sequences(open_loader: Open) -> None:
    loader = open_loader(stages__pretrain__sequence_length=1024, data__packing_buffer=128)
    batches = _take(loader, 60)
    used = sum(batch.num_tokens for batch in batches)
    assert loader.packing_efficiency == pytest.approx(used / (60 * 1024))
    assert loader.packing_efficiency > 0.93
    assert loader.num_samples == len(_keys(batches))


def test_plain_prompt_leaves_the_picture_alone(open_loader: Open) -> None:
    captions = {"stages__pretrain__data": {"captions": 1.0}}
    whole, plain = (open_loader(**captions, stages__pretrain__prompt=prompt) for prompt in ("instruction", "plain"))
    _take(whole, 40), _take(plain, 40)
    assert plain.num_tokens / plain.num_samples < whole.num_tokens / whole.num_samples - 10


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """The data with four pictures of `captions` overwritten inside a shard, and their keys."""
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    return data, fixtures.overwrite_pictures(data / "captions", 4, start=5)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_are_counted_once_and_left_out(
    open_loader: Open, damaged: tuple[Path, list[str]], workers: int
) -> None:
    data, broken = damaged
    loader = open_loader(data=data, stages__pretrain__data={"captions": 1.0}, data__workers=workers)
    keys = _keys(_take(loader, 120))
    assert loader.rejected.keys() == set(broken) and not set(broken) & set(keys)
    assert all(f"{key}: not a picture" in reason for key, reason in loader.rejected.items())


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_pictures_stop_the_run(
    open_loader: Open, damaged: tuple[Path, list[str]], workers: int
) -> None:
    loader = open_loader(data=damaged[0], data__workers=workers, data__max_rejected_share=0.03)
    message = "4 samples of data set captions .*data.max_rejected_share = 3.00%.*captions/0000.*: not a picture"
    with pytest.raises(ValueError, match=message):
        _take(loader, 400)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("share", [0.05, 1.0])
def test_data_of_which_nothing_fits_is_an_error_not_a_wait(open_loader: Open, workers: int, share: float) -> None:
    loader = open_loader(
        data__workers=workers,
        data__max_rejected_share=share,
        stages__pretrain__sequence_length=70,
        stages__pretrain__data={"captions": 1.0},
    )
    message = r"^\d+ samples in a row .*: \d+ tokens do not fit into sequence_length = 70.*data.max_rejected_share"
    with pytest.raises(ValueError, match=message):
        next(loader)


def _rewrite_json(path: Path, text: bytes) -> str:
    """Replace the first sample's json inside a shard by text of the same length."""
    with tarfile.open(path) as tar:
        member = next(member for member in tar if member.name.endswith(".json"))
    with open(path, "r+b") as stream:
        stream.seek(member.offset_data)
        stream.write(text.ljust(member.size))
    return f"captions/{member.name[:9]}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "its json holds no conversations"),
        (b"[]", "its json holds no conversations"),
        (b'{"conversations":[{"from":"bot","value":"a"}]}', r"conversations\[0\].from: 'bot'"),
    ],
    ids=["not-json", "no-conversations", "role"],
)
def test_a_sample_that_broke_after_sharding_is_named(
    open_loader: Open, folder: Path, tmp_path: Path, text: bytes, message: str
) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    key = _rewrite_json(tmp_path / "data/captions/shard-000000.tar", text)
    loader = open_loader(data=tmp_path / "data", data__max_rejected_share=0.0)
    with pytest.raises(ValueError, match=f"{key}: {message}"):
        _take(loader, 200)


def test_damaged_data_sets_are_refused_before_the_first_sample(open_loader: Open, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    path = data / "captions/shard-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40000])
    with pytest.raises(ValueError, match="captions/shard-000001.tar is truncated"):
        open_loader(data=data)
    path.unlink()
    with pytest.raises(ValueError, match="captions/shard-000001.tar does not exist"):
        open_loader(data=data)
    shutil.rmtree(data / "captions/.nv-meta")
    with pytest.raises(ValueError, match="captions is not indexed: run `vlm data shard` and `vlm data index"):
        open_loader(data=data)
    shutil.rmtree(data / "captions")
    with pytest.raises(ValueError, match="captions does not exist"):
        open_loader(data=data)


def test_settings_that_cannot_work_are_refused(open_loader: Open, folder: Path) -> None:
    with pytest.raises(ValueError, match="sequence_length: 64 leaves no room for text beside the 64 tokens"):
        open_loader(stages__pretrain__sequence_length=64)
    with pytest.raises(ValueError, match=r"dialogues has 72 training samples for 80 loader processes"):
        open_loader(data__workers=40, world=2)
    config = settings.load(folder / "config.yaml")
    with pytest.raises(ValueError, match="stages.pretrain.data: no folder is given for dialogues"):
        build(config, "pretrain", {"captions": folder}, folder / "language", folder / "vision")


def test_a_state_of_other_workers_is_refused(open_loader: Open) -> None:
    loader = open_loader(data__workers=2)
    _take(loader, 3)
    other = open_loader(data__workers=0)
    with pytest.raises(ValueError, match="data.workers: 0, but the checkpoint was made with 2"):
        other.restore(loader.state())


def test_importing_the_loader_leaves_megatron_core_alone() -> None:
    code = "import sys, vlm.loader; sys.exit('megatron.core' in sys.modules or 'vlm.model' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2]).returncode == 0


def test_image_bytes_reach_the_batch_as_transformers_would_resize_them(open_loader: Open, folder: Path) -> None:
    """One picture from shard to batch against the shard's own bytes."""
    from vlm import images

    batch = next(open_loader(stages__pretrain__data={"captions": 1.0}))
    key = batch.sample_keys[0].split("/")[1]
    for path in (folder / "data/captions").glob("shard-*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.startswith(key) and not member.name.endswith(".json"):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    expected = images.resize(images.load(io.BytesIO(stream.read()).getvalue()), 64, "crop")
                    assert (batch.images[0].numpy() == expected).all()
                    return
    pytest.fail(f"{key} is in no shard")


def test_several_pictures_of_a_sample_keep_their_order(folder: Path, tmp_path: Path) -> None:
    """Of both kinds of file, so that the order is the conversation's and not that of the extensions."""
    records = fixtures.write_source(tmp_path / "captions", 40)
    for index_ in range(0, 38, 7):  # these pictures are png
        records[index_]["image"] = [
            records[index_]["image"],
            records[index_ + 1]["image"],
            records[index_ + 2]["image"],
        ]
        records[index_]["conversations"][0]["value"] = "<image><image>\nwhich? or <image>"
    (tmp_path / "captions/annotations.json").write_text(json.dumps(records))
    config = fixtures.write_config(
        tmp_path / "config.yaml",
        stages__pretrain__data={"captions": 1.0},
        stages__pretrain__keep_best=False,
        stages__pretrain__validation_interval=0,
        data__sets__captions__validation_share=0,
        stages__pretrain__sequence_length=1024,
    )
    shard(config, "captions", tmp_path / "captions", tmp_path / "data")
    index(tmp_path / "data")
    dirs = {"captions": tmp_path / "data"}
    loader = build(settings.load(config), "pretrain", dirs, folder / "language", folder / "vision")
    shown: dict[str, list[int]] = {}
    for batch in _take(loader, 20):
        pictures = iter(batch.images.numpy())
        for key in batch.sample_keys:
            own = records[int(key.split("/")[1])]["image"]
            number = len(own) if isinstance(own, list) else 1
            shown[key] = [fixtures.picture_index(next(pictures)) for _ in range(number)]
    assert len(shown) == 40
    for key, found in shown.items():
        position = int(key.split("/")[1])
        assert found == ([position, position + 1, position + 2] if position % 7 == 0 and position < 38 else [position])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "vanished"])
def test_a_shard_that_is_damaged_meanwhile_is_named(
    open_loader: Open, folder: Path, tmp_path: Path, workers: int, damage: str
) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    captions = {"stages__pretrain__data": {"captions": 1.0}}
    loader = open_loader(data=tmp_path / "data", data__workers=workers, data__shuffle_run=1, **captions)
    path = tmp_path / "data/captions/shard-000001.tar"
    message = f"{path} is truncated: 2048 bytes" if damage == "truncated" else f"{path} does not exist"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:2048])
    else:
        path.unlink()
    with pytest.raises(ValueError, match=message):
        _take(loader, 60)


def test_samples_without_text_or_picture_are_counted(open_loader: Open, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    path = data / "captions/shard-000000.tar"
    with tarfile.open(path) as old:
        members = [(member, old.extractfile(member).read()) for member in old]  # type: ignore[union-attr]
    keys = sorted({member.name[:9] for member, _ in members})[:2]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as new:
        for member, content in members:
            has_text = member.name.endswith(".json")
            if (member.name[:9], has_text) not in {(keys[0], True), (keys[1], False)}:
                new.addfile(member, io.BytesIO(content))
    index(data / "captions")
    loader = open_loader(data=data, stages__pretrain__data={"captions": 1.0})
    assert not {f"captions/{key}" for key in keys} & set(_keys(_take(loader, 90)))
    text, picture = (loader.rejected.pop(f"captions/{key}") for key in keys)
    assert text == f"captions/{keys[0]}: has no json in its shard"
    assert "1 <image> in the text, 0 picture(s)" in picture and not loader.rejected


def test_every_epoch_is_a_new_permutation(open_loader: Open, folder: Path) -> None:
    """With runs of one sample and nothing held back, as in config.yaml."""
    options = {"data__shuffle_run": 1, "data__shuffle_buffer": 1, "data__packing_buffer": 1}
    loader = open_loader(**options, stages__pretrain__data={"captions": 1.0})
    keys = _keys(_take(loader, 216))
    train = _split_keys(folder, "captions", "shard")
    assert set(keys[:108]) == set(keys[108:]) == train
    together = set(zip(keys[:108], keys[1:108], strict=False)) & set(zip(keys[108:], keys[109:], strict=False))
    assert len(together) <= 6


def test_a_sequence_of_broken_pictures_alone_is_left_out(open_loader: Open, damaged: tuple[Path, list[str]]) -> None:
    captions = {"stages__pretrain__data": {"captions": 1.0}}
    loader = open_loader(data=damaged[0], data__packing_buffer=1, **captions)
    assert all(len(batch.sample_keys) == 1 for batch in _take(loader, 130))
    assert loader.rejected.keys() == set(damaged[1])
