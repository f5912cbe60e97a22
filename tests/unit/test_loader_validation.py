"""The validation split: each sample once, alike on every layout and every time."""

from __future__ import annotations

import itertools
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_fixtures as fixtures
import pytest
import torch

from vlm import config as settings
from vlm.batch import PackedBatch
from vlm.data.index import index
from vlm.loader import Validation, build
from vlm.loader.packing import best_fit
from vlm.prompt import Prompter

SEQUENCE = 512
SAMPLES = {"captions": 12, "dialogues": 32}  # a tenth of each source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixtures.write_loader_folder(tmp_path_factory.mktemp("validation"), 120, 320)


Open = Callable[..., Validation]


@pytest.fixture
def open_validation(folder: Path, tmp_path: Path) -> Open:
    def make(*, data: Path | None = None, rank: int = 0, world: int = 1, **changes: Any) -> Validation:
        config = settings.load(fixtures.write_config(tmp_path / "config.yaml", **changes))
        dirs = {name: (data or folder / "data") / name for name in config.stages["pretrain"].data}
        return build(config, "pretrain", dirs, folder / "language", folder / "vision", rank, world, split="val")

    return make


def _keys(batches: list[PackedBatch]) -> list[str]:
    return [key for batch in batches for key in batch.sample_keys]


def _equal(one: PackedBatch, other: PackedBatch) -> bool:
    tensors = ("tokens_S", "positions_S", "cu_seqlens", "images", "image_positions", "trained_positions", "labels_R")
    return one.sample_keys == other.sample_keys and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in tensors
    )


def _members(folder: Path, data_set: str) -> list[tarfile.TarInfo]:
    (path,) = (folder / data_set).glob("validation-*.tar")
    with tarfile.open(path) as tar:
        return tar.getmembers()


def _split(folder: Path) -> set[str]:
    return {f"{name}/{member.name[:9]}" for name in SAMPLES for member in _members(folder / "data", name)}


@pytest.mark.parametrize("world", [1, 2, 5], ids=["alone", "two", "more-ranks-than-divide"])
def test_each_sample_comes_once_over_all_ranks(open_validation: Open, folder: Path, world: int) -> None:
    loaders = [open_validation(rank=rank, world=world) for rank in range(world)]
    ranks = [list(loader) for loader in loaders]
    keys = [key for batches in ranks for key in _keys(batches)]
    assert sorted(keys) == sorted(_split(folder)) and len(keys) == sum(SAMPLES.values())
    assert len({len(batches) for batches in ranks} | {len(loader) for loader in loaders}) == 1


def test_the_sequences_do_not_depend_on_the_number_of_ranks(open_validation: Open) -> None:
    alone = list(open_validation())
    world = len(alone) - 1  # so that some rank has to be filled up
    ranks = [list(open_validation(rank=rank, world=world)) for rank in range(world)]
    shared = [batch for batches in zip(*ranks, strict=True) for batch in batches]
    assert all(map(_equal, alone, shared))
    padding = shared[len(alone) :]
    assert len(padding) == world - 1 > 0
    for batch in padding:
        assert batch.sample_keys == () and batch.num_tokens == 0 and len(batch.images) == 0
        assert len(batch.trained_positions) == 0 and len(batch.labels_R) == 0
        assert batch.cu_seqlens.tolist() == [0, SEQUENCE]


def test_it_is_the_same_every_time_and_whatever_is_drawn_for_training(open_validation: Open) -> None:
    loader = open_validation()
    once = list(loader)
    list(itertools.islice(loader, 2))  # one that is left in the middle changes nothing
    assert all(map(_equal, once, list(loader)))
    other = open_validation(seed=7, data__shuffle_buffer=3, data__packing_buffer=5, data__workers=2)
    assert all(map(_equal, once, list(other)))


def test_pictures_belong_to_their_texts_and_sequences_are_full(open_validation: Open, folder: Path) -> None:
    prompter = Prompter(folder / "language", fixtures.IMAGE_TOKEN, fixtures.NUM_IMAGE_TOKENS)
    batches = list(open_validation())
    lengths = []
    for batch in batches:
        pictures = iter(batch.images.numpy())
        for number, key in enumerate(batch.sample_keys):
            start, end = batch.cu_seqlens[number : number + 2].tolist()
            lengths.append(end - start)
            if (batch.tokens_S[start:end] == prompter.image_token_id).any():
                assert fixtures.picture_index(next(pictures)) == int(key.split("/")[1])
        assert next(pictures, None) is None
    assert len(batches) == len(best_fit(lengths, SEQUENCE))


def test_the_first_sequences_hold_all_data_sets_in_proportion(open_validation: Open) -> None:
    # So short that hardly two samples share a sequence: these are in the order in which the samples came.
    keys = _keys(list(open_validation(stages__pretrain__sequence_length=180, data__max_rejected_share=1.0)))
    captions = [key.startswith("captions/") for key in keys]
    assert sum(captions) >= 8 and abs(sum(captions[: len(keys) // 2]) - sum(captions) / 2) <= 2


def test_data_sets_without_validation_samples_are_named(
    open_validation: Open, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    next((data / "captions").glob("validation-*.tar")).unlink()
    index(data / "captions")
    keys = _keys(list(open_validation(data=data)))
    assert len(keys) == SAMPLES["dialogues"] and {key.split("/")[0] for key in keys} == {"dialogues"}
    assert "stages.pretrain: no validation samples in captions; data.sets.<name>.valid" in capsys.readouterr().err
    open_validation(data=data, rank=1, world=2)
    assert capsys.readouterr().err == ""
    next((data / "dialogues").glob("validation-*.tar")).unlink()
    index(data / "dialogues")
    with pytest.raises(ValueError, match=r"stages.pretrain: no validation samples in captions, dialogues.*valid"):
        open_validation(data=data)


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """The data with all validation pictures of `captions` overwritten, and their keys."""
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    return data, fixtures.overwrite_pictures(data / "captions", 12, shard="validation-000000.tar")


def test_unusable_samples_are_counted_and_leave_their_places_empty(
    open_validation: Open, damaged: tuple[Path, list[str]]
) -> None:
    data, broken = damaged
    loader = open_validation(data=data, data__max_rejected_share=1.0)
    batches = list(loader)
    assert loader.rejected.keys() == set(broken)
    assert all(f"{key}: not a picture" in reason for key, reason in loader.rejected.items())
    assert len(_keys(batches)) == SAMPLES["dialogues"] and len(batches) == len(list(open_validation()))
    alone = open_validation(data=data, data__max_rejected_share=1.0, stages__pretrain__data={"captions": 1.0})
    assert [batch.num_tokens for batch in alone] == [0] * len(alone)


def test_too_many_unusable_samples_stop_it(open_validation: Open, damaged: tuple[Path, list[str]]) -> None:
    with pytest.raises(ValueError, match=r"\d+ samples of data set captions .* = 10.00%.*captions/0.*: not a picture"):
        list(open_validation(data=damaged[0], data__max_rejected_share=0.1))
    short = {"stages__pretrain__sequence_length": 70, "data__max_rejected_share": 0.03}
    for rank in range(2):  # texts are read by all ranks, so that all of them stop
        with pytest.raises(ValueError, match=r"samples of data set .* do not fit into sequence_length = 70"):
            len(open_validation(rank=rank, world=2, **short))


def test_a_shard_that_vanishes_is_named(open_validation: Open, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    loader = open_validation(data=data)
    path = data / "captions/validation-000000.tar"
    path.unlink()
    with pytest.raises(ValueError, match=f"captions/0.*: {path} cannot be read"):
        list(loader)
