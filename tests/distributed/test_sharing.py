"""One rank of each model-parallel group opens the data; the others get the very same batches, and the same refusals."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).parent))  # the processes import this module by name

import data_fixtures as fixtures

NUM_BATCHES = 7
LARGEST = 2**31 - 1  # token id
SEQUENCE = 512
TENSORS = ("tokens_S", "positions_S", "cu_seqlens", "images", "image_positions", "trained_positions", "labels_R")


def work(rank: int, folder: Path, tensor: int, pipeline: int, data: int) -> None:
    """What a rank sees of everything that can happen, into `folder/{rank}.pt`."""
    torch.set_num_threads(1)
    from torch import distributed

    import vlm_kernels
    from vlm import config as settings
    from vlm import loader, parallel
    from vlm.batch import Sample, pack
    from vlm.train.feed import Feed
    from vlm.train.sharing import on_builder

    world = tensor * pipeline * data
    store = f"file://{folder}/store"
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    config = settings.load(folder / "config.yaml")
    layout = {"ranks_per_node": world, "tensor": tensor, "pipeline": pipeline, "distributed_optimizer": False}
    parallel.initialize(config.parallel.model_copy(update=layout), seed=1)
    from megatron.core import parallel_state

    data_rank = parallel_state.get_data_parallel_rank()

    def opened(name: str, split: str = "train", settings: Any = config) -> Any:
        dirs = {one: folder / name / one for one in fixtures.SETS}
        root = folder / "language", folder / "vision"
        return on_builder(lambda: loader.build(settings, "pretrain", dirs, *root, data_rank, data, split=split))

    def feed(stream: Any) -> Feed:
        return Feed(stream if stream is None else iter(stream), torch.device("cpu"), fixtures.SETS)

    def outcome(act: Callable[[], Any]) -> str:
        try:
            act()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def taken(source: Feed, number: int) -> list[Any]:
        counted = []
        for batch in islice(source, number):
            own = replace(batch, **{name: value.clone() for name, value in batch.tensors.items()})
            counted.append((own, source.sets_R, source.tokens, source.pairs, list(source.trained)))
        return counted

    told = []

    def tell(x: torch.Tensor, values: torch.Tensor) -> None:
        told.append(bool(torch.equal(x, values)))

    vlm_kernels.known_on_host = tell
    training = opened("data")
    source = feed(training)
    generators = torch.get_rng_state()
    seen = {"data_rank": data_rank, "opens": training is not None, "batches": taken(source, NUM_BATCHES)}
    seen["fetched"] = source.fetch(3)
    seen["batches"] += taken(source, 3)
    seen["undisturbed"] = bool(torch.equal(generators, torch.get_rng_state()))
    seen["told"] = list(told)
    source.begin()
    seen["forgotten"] = (source.keys, source.tokens)
    held_out = feed(opened("data", "val"))
    seen["counts"] = []
    while number := held_out.fetch(2):
        seen["counts"].append(number)
        taken(held_out, number)
    seen["validation"] = held_out.keys
    largest = pack(
        [Sample(np.array([7, LARGEST]), np.array([False, True]), np.zeros(0, int))], [], ["captions/0"], 3, 8
    )
    ((batch, *_),) = taken(feed([largest] if training is not None else None), 1)
    seen["largest"] = [batch.tokens_S.tolist(), batch.labels_R.tolist()]
    seen["truncated"] = outcome(lambda: opened("truncated"))
    strict = config.model_copy(update={"data": config.data.model_copy(update={"max_rejected_share": 0.01})})
    broken = feed(opened("broken", settings=strict))
    seen["rejected"] = outcome(lambda: list(islice(broken, 100)))
    seen["failure"] = outcome(lambda: next(feed(failing() if training is not None else None)))
    torch.save(seen, folder / f"{rank}.pt")
    if training is not None:
        training.close()
    parallel.destroy()


def failing() -> Iterator[Any]:
    raise KeyError("of the loader")
    yield


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets: whole, with a truncated shard, and with broken pictures."""
    from vlm.data.index import index
    from vlm.data.shard import shard

    root = tmp_path_factory.mktemp("sharing")
    config = fixtures.write_config(root / "config.yaml", data__max_rejected_share=0.02)
    for number, name in enumerate(fixtures.SETS):
        fixtures.write_source(root / name, 120, seed=number, text_only_share=0.3 * number)
        shard(config, name, root / name, root / "data" / name)
        index(root / "data" / name)
    for name in ("truncated", "broken"):
        shutil.copytree(root / "data", root / name)
    path = root / "truncated/captions/shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-40000])
    for number in range(2):  # each data-parallel rank reads one of them
        fixtures.overwrite_pictures(root / "broken/captions", 40, shard=f"shard-{number:06d}.tar")
    fixtures.write_tokenizer(root / "language")
    fixtures.write_vision(root / "vision")
    return root


@pytest.fixture(
    scope="module",
    params=[(2, 1, 1), (1, 2, 1), (2, 1, 2), (2, 2, 1)],
    ids=["tensor", "pipeline", "tensor-x-data", "tensor-x-pipeline"],
)
def ranks(request: pytest.FixtureRequest, workspace: Path) -> list[dict[str, Any]]:
    """What every rank of a layout saw."""
    tensor, pipeline, data = request.param
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlm.train.trainer", "transformers.models.auto.tokenization_auto"])
    (workspace / "store").unlink(missing_ok=True)
    processes = [
        context.Process(target=work, args=(rank, workspace, tensor, pipeline, data))
        for rank in range(tensor * pipeline * data)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * len(processes)
    return [torch.load(workspace / f"{rank}.pt", weights_only=False) for rank in range(len(processes))]


def groups(ranks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The ranks that share batches."""
    numbers = sorted({seen["data_rank"] for seen in ranks})
    return [[seen for seen in ranks if seen["data_rank"] == number] for number in numbers]


def test_one_rank_of_each_group_opens_the_data(ranks: list[dict[str, Any]]) -> None:
    for group in groups(ranks):
        assert [seen["opens"] for seen in group] == [True] + [False] * (len(group) - 1)


def test_all_ranks_of_a_group_have_the_batches_of_its_loader(ranks: list[dict[str, Any]], workspace: Path) -> None:
    from vlm import config, loader

    settings = config.load(workspace / "config.yaml")
    dirs = {name: workspace / "data" / name for name in fixtures.SETS}
    for number, group in enumerate(groups(ranks)):
        alone = loader.build(
            settings, "pretrain", dirs, workspace / "language", workspace / "vision", number, len(groups(ranks))
        )
        for index, expected in enumerate(islice(alone, NUM_BATCHES + 3)):
            owners = [fixtures.SETS.index(key.split("/")[0]) for key in expected.sample_keys]
            segments = torch.bucketize(expected.trained_positions.int(), expected.cu_seqlens, right=True) - 1
            for seen in group:
                batch, sets_R, *_ = seen["batches"][index]
                for name in TENSORS:
                    found, wanted = getattr(batch, name), getattr(expected, name)
                    assert found.dtype == wanted.dtype and torch.equal(found, wanted), name
                assert (batch.sample_keys, batch.max_seqlen) == (expected.sample_keys, expected.max_seqlen)
                assert sets_R.tolist() == [owners[segment] for segment in segments]


def test_all_ranks_of_a_group_count_alike(ranks: list[dict[str, Any]]) -> None:
    for group in groups(ranks):
        for index in range(NUM_BATCHES + 3):
            assert len({repr(seen["batches"][index][2:]) for seen in group}) == 1
        tokens = [tokens for _, _, tokens, *_ in group[0]["batches"]]
        used = [batch.num_tokens for batch, *_ in group[0]["batches"]]
        assert tokens == [sum(used[: index + 1]) for index in range(len(used))]
    assert all(seen["largest"] == [[7, LARGEST, 0], [LARGEST]] for seen in ranks)
    assert all(seen["told"] == [True] * 3 * (NUM_BATCHES + 3) for seen in ranks), "of borders, positions and labels"
    assert all(seen["fetched"] == 3 and seen["undisturbed"] and seen["forgotten"] == ([], 0) for seen in ranks)


def test_validation_ends_on_all_ranks_together(ranks: list[dict[str, Any]]) -> None:
    assert len({tuple(seen["counts"]) for seen in ranks}) == 1
    assert all(number == 2 for number in ranks[0]["counts"][:-1])
    for group in groups(ranks):
        assert all(seen["validation"] == group[0]["validation"] for seen in group)
    keys = [key for group in groups(ranks) for keys in group[0]["validation"] for key in keys]
    assert len(keys) == len(set(keys)) == 24


def test_a_refusal_is_heard_by_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert re.match("ValueError: .*captions/shard-000001.tar is truncated", seen["truncated"])
        assert re.match("ValueError: .*captions/[0-9]+: not a picture", seen["rejected"])
    for group in groups(ranks):
        assert len({seen["rejected"] for seen in group}) == 1
        assert group[0]["failure"] == "KeyError: 'of the loader'"
        for seen in group[1:]:
            assert seen["failure"] == "RuntimeError: the rank that builds the batches failed: KeyError: 'of the loader'"
