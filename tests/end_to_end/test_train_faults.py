"""One message or one count for every fault, and nothing lost: the table in docs/failures.md, line by line."""

from __future__ import annotations

import errno
import json
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import train_process
import train_workspace
from data_fixtures import overwrite_pictures
from train_process import Event
from train_runs import NAMED_AT_NEXT_STEP, assert_same, log

STEP = "vlm.train.step:Step.__call__"


def said(out: Path) -> str:
    text = log(out)
    assert "Traceback" not in text, text
    return text


def copied_data(runs: Any, folder: Path) -> Path:
    return Path(shutil.copytree(runs.workspace.data, folder / "data"))


def rename_text_parts(shard: Path, number: int) -> None:
    """Let samples lose their text; everything stays in its place, so that the index still holds."""
    content, left = bytearray(shard.read_bytes()), number
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(".json") and left:
                left -= 1
                member.name = member.name.removesuffix(".json") + ".jsox"
                content[member.offset : member.offset + 512] = member.tobuf(tarfile.USTAR_FORMAT)
    shard.write_bytes(content)


@pytest.mark.parametrize("part", ["picture", "text"])
def test_broken_samples_are_counted_and_named(runs, tmp_path, part):
    data = copied_data(runs, tmp_path)
    for name in ("captions", "dialogues"):
        if part == "picture":
            overwrite_pictures(data / name, 20)
        else:
            rename_text_parts(data / name / "shard-000000.tar", 20)
    config = train_workspace.changed(runs.config, tmp_path / "c.yaml", data__max_rejected_share=0.5)
    out = tmp_path / "run"
    assert runs.train("pretrain", out, config=config, data=data) == 0, log(out)
    rejected = json.loads((out / "rejected.json").read_text())
    assert json.loads((out / "finished.json").read_text())["rejected"] == len(rejected) > 0
    assert f"{len(rejected)} samples could not be used" in said(out)
    assert all(key.split("/")[0] in ("captions", "dialogues") and reason for key, reason in rejected.items())


def test_too_many_broken_samples_end_the_run(runs, tmp_path):
    data = copied_data(runs, tmp_path)
    overwrite_pictures(data / "captions", 40)
    overwrite_pictures(data / "dialogues", 40)
    assert runs.train("pretrain", tmp_path / "run", data=data) == 2
    assert "data.max_rejected_share" in said(tmp_path / "run")


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_broken_shard_is_refused_before_the_first_step(runs, tmp_path, damage):
    data = copied_data(runs, tmp_path)
    shard = data / "captions/shard-000001.tar"
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert runs.train("pretrain", tmp_path / "run", data=data) == 2
    assert str(shard) in said(tmp_path / "run")


def test_shards_that_shrink_while_it_trains_are_named(runs, tmp_path):
    data, out = copied_data(runs, tmp_path), tmp_path / "run"
    shards = tuple(data.glob("*/shard-*.tar"))
    config = train_workspace.changed(runs.config, tmp_path / "c.yaml", stages__pretrain__iterations=200)
    code = runs.train("pretrain", out, Event(STEP, 4, train_process.shorten, shards), config=config, data=data)
    assert code in (1, 2)
    assert any(shard.name in said(out) for shard in shards)
    assert (out / "checkpoints/latest").read_text() == "iteration_0000003\n"


def test_a_full_disk_costs_only_the_checkpoint_that_did_not_fit(runs, tmp_path):
    out = tmp_path / "full"
    event = Event("vlm.checkpoint.pending:Pending.__init__", 2, train_process.limit_files, (9999,))
    assert runs.train("sft", out, event) == 1
    message = said(out)
    assert f"{out}/checkpoints/iteration_0000006: could not be saved: [Errno {errno.EFBIG}]" in message
    assert "bytes, " in message and "are free" in message
    left = {path.name for path in (out / "checkpoints").iterdir()}
    assert left == {"identity.json", "latest", "iteration_0000003"}
    assert runs.train("sft", out) == 0
    assert_same(out, runs.undisturbed("sft"))


@pytest.mark.parametrize(
    "target", ["vlm.files:beside", "vlm.checkpoint.model:complete"], ids=["before-the-first-file", "with-the-last-file"]
)
def test_a_disk_that_is_full_earlier_or_later(runs, tmp_path, target):
    out = tmp_path / "full"
    assert runs.train("sft", out, Event(target, 2, train_process.fail, (errno.ENOSPC, "somewhere"))) == 1
    assert "iteration_0000006: could not be saved: [Errno 28] No space left on device: 'somewhere'" in said(out)
    assert not list((out / "checkpoints").glob(".*"))
    assert runs.train("sft", out) == 0
    assert_same(out, runs.undisturbed("sft"))


def test_a_read_only_folder_is_one_line(runs, tmp_path):
    out = tmp_path / "run"
    event = Event("vlm.checkpoint.lock:_Claims.__init__", 1, train_process.fail, (errno.EROFS, str(out)))
    assert runs.train("pretrain", out, event) == 1
    assert f"vlm: pretrain: [Errno 30] Read-only file system: '{out}'" in said(out)


def test_a_weight_that_is_not_a_number_ends_it_before_it_is_saved(runs, tmp_path):
    out = tmp_path / "broken"
    assert runs.train("pretrain", out, Event(STEP, 5, train_process.plant_not_a_number)) == 1
    message = said(out)
    assert "pretrain: iteration 5 is not finite: loss nan" in message and "samples: " in message
    assert f"The last good checkpoint is {out}/checkpoints/iteration_0000003" in message
    assert runs.train("pretrain", out) == 0
    assert_same(out, runs.undisturbed("pretrain"))


FAST = {"vlm.train.watch:BEAT_SECONDS": 0.3, "vlm.train.watch:SILENT_SECONDS": 4.0} | NAMED_AT_NEXT_STEP


@pytest.fixture(scope="module")
def two_ranks(runs, tmp_path_factory) -> Path:
    return train_workspace.changed(runs.config, tmp_path_factory.mktemp("ranks") / "c.yaml", parallel__ranks_per_node=2)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", [train_process.kill, train_process.stop_still], ids=["dies", "hangs"])
def test_the_others_end_and_name_the_rank_that(runs, two_ranks, tmp_path, what, rank):
    out = tmp_path / "run"
    ranks: list[Any] = runs.start_ranks("pretrain", out, {rank: [Event(STEP, 5, what)]}, config=two_ranks, values=FAST)
    assert train_process.finish(ranks[1 - rank], seconds=60) == 1
    ranks[rank].kill()
    text = (out.with_suffix(".log") if rank == 1 else out.with_suffix(".log.1")).read_text()
    assert f"vlm: rank {1 - rank} ends because rank {rank}" in text, text
    assert (out / "checkpoints/latest").read_text() == "iteration_0000003\n"


def test_a_full_disk_under_one_rank_ends_all_with_one_message(runs, two_ranks, tmp_path):
    out = tmp_path / "full"
    event = Event("vlm.checkpoint.pending:write", 3, train_process.fail, (errno.ENOSPC, "somewhere"))
    ranks = runs.start_ranks("pretrain", out, {1: [event]}, config=two_ranks)
    assert [train_process.finish(rank) for rank in ranks] == [1, 1]
    assert "could not be saved: [Errno 28] No space left on device: 'somewhere'. It needs about" in said(out)
    assert not list((out / "checkpoints").glob(".*"))


def test_a_second_training_in_the_folder_is_refused(runs, tmp_path):
    out = tmp_path / "run"
    first = runs.start("pretrain", out, Event(STEP, 5, time.sleep, (60.0,)), values=NAMED_AT_NEXT_STEP)
    while not (out / "checkpoints/latest").exists():
        assert first.is_alive(), log(out)
        time.sleep(0.05)
    assert runs.train("pretrain", out) == 73
    assert f"belongs to another training, process {first.pid} on " in log(out)
    first.kill()
    first.join()
    assert runs.train("pretrain", out) == 0
    assert_same(out, runs.undisturbed("pretrain"))
