"""A run is the same however its ranks share the work, and goes on at another layout as if it had always had it.

Losses and gradient norms of twenty steps of the real trainer.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import toy_run
from toy_run import GLOBAL_BATCH, SAVED

LAYOUTS = {
    "alone": {},
    "data": {"ranks_per_node": 2},
    "data+distributed_optimizer": {"ranks_per_node": 2, "distributed_optimizer": True},
    "tensor": {"ranks_per_node": 2, "tensor": 2},
    "tensor+sequence": {"ranks_per_node": 2, "tensor": 2, "sequence": True},
    "pipeline": {"ranks_per_node": 2, "pipeline": 2},
    "tensor+data": {"ranks_per_node": 4, "tensor": 2},
    "tensor+sequence+pipeline": {"ranks_per_node": 4, "tensor": 2, "pipeline": 2, "sequence": True},
    "recompute": {"recompute": True},
    "distributed_optimizer": {"distributed_optimizer": True},
    "pipeline+bfloat16": {"ranks_per_node": 2, "pipeline": 2, "dtype": "bfloat16"},
    "bfloat16": {"ranks_per_node": 2, "distributed_optimizer": True, "dtype": "bfloat16"},
}


class Runs:
    """Undisturbed runs by their layout, each trained once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def out(self, layout: str, stage: str = "sft", start_from: Path | None = None) -> Path:
        out = self.folder / "runs" / f"{stage}-{layout}"
        if not out.exists():
            toy_run.run(self.folder, out, stage, start_from, **LAYOUTS[layout])
        return out

    def resumed(self, then: str, now: str, name: str, stage: str = "sft", **options) -> Path:
        out = self.folder / "runs" / name
        return toy_run.resume(self.folder, self.out(then, stage), out, stage=stage, **LAYOUTS[now], **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(toy_run.make(tmp_path_factory.mktemp("layouts")))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return Runs(toy_run.make(tmp_path_factory.mktemp("tied"), tied=True))


def assert_same(out: Path, reference: Path) -> None:
    found, expected = toy_run.curve(out), toy_run.curve(reference)
    assert len(found) == len(expected) == toy_run.ITERATIONS + 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "alone" and "bfloat16" not in name])
def test_every_layout_trains_alike(runs, layout):
    assert_same(runs.out(layout), runs.out("alone"))
    counts = [
        {name: report[name] for name in ("trained_parameters", "frozen_parameters", "samples", "tokens")}
        for report in (json.loads((runs.out(name) / "finished.json").read_text()) for name in (layout, "alone"))
    ]
    assert counts[0] == counts[1]


def test_the_vision_model_learns_alike(runs):
    assert_same(runs.out("tensor+sequence+pipeline", "all"), runs.out("alone", "all"))


def test_there_is_something_to_learn(runs):
    curve = toy_run.curve(runs.out("alone"))
    assert curve[toy_run.ITERATIONS - 1][0] < curve[0][0] - 1


@pytest.mark.parametrize("layout", ["pipeline", "tensor+sequence+pipeline"])
def test_tied_embeddings_stay_equal_at_both_ends_of_a_pipeline(tied, layout):
    assert_same(tied.out(layout), tied.out("alone"))


def test_tied_embeddings_are_stored_once(tied):
    assert_same(tied.resumed("pipeline", "alone", "pipeline-to-alone"), tied.out("alone"))


def test_a_stage_feeds_the_next_at_another_layout(runs):
    """The first one trains nothing on the pipeline's last stage, which then has nothing to read from its checkpoint."""
    pretrained = {layout: runs.out(layout, "pretrain") for layout in ("alone", "pipeline")}
    assert_same(pretrained["pipeline"], pretrained["alone"])
    assert "differs" not in (pretrained["pipeline"] / "log").read_text(), "megatron-core compares what ranks save"
    expected = runs.out("alone", "sft_after", pretrained["alone"])
    assert_same(runs.out("tensor+sequence+pipeline", "sft_after", pretrained["pipeline"]), expected)


@pytest.mark.parametrize(
    ("then", "now"),
    [("alone", "tensor"), ("alone", "pipeline"), ("tensor+sequence+pipeline", "alone"), ("recompute", "alone")],
)
def test_another_layout_goes_on_alike(runs, then, now):
    out = runs.resumed(then, now, f"{then}-to-{now}")
    assert_same(out, runs.out("alone"))
    assert json.loads((out / "finished.json").read_text())["data_restarts"] == []


@pytest.mark.parametrize(
    ("then", "now"), [("data", "alone"), ("data+distributed_optimizer", "distributed_optimizer"), ("alone", "data")]
)
def test_another_number_of_data_ranks_goes_on_alike_with_a_stream_of_its_own(runs, then, now):
    out = runs.resumed(then, now, f"{then}-to-{now}", first=SAVED * GLOBAL_BATCH)
    assert_same(out, runs.out("alone"))
    sizes = [LAYOUTS[name].get("ranks_per_node", 1) for name in (now, then)]
    log = (out / "log").read_text()
    assert f"parallel gives {sizes[0]} data-parallel ranks" in log and f"was written by {sizes[1]}:" in log
    assert json.loads((out / "finished.json").read_text())["data_restarts"] == [SAVED]
    first, anew = (out / "seeds").read_text().split()
    assert first != anew
    # Once begun, the new stream is the one that a later resume goes on with.
    (out / "finished.json").unlink()
    toy_run.run(runs.folder, out, **LAYOUTS[now])
    assert (out / "seeds").read_text().split()[-1] == anew
    assert json.loads((out / "finished.json").read_text())["data_restarts"] == [SAVED]


@pytest.mark.parametrize("layout", ["tensor+sequence+pipeline", "data+distributed_optimizer", "bfloat16"])
def test_the_same_layout_goes_on_to_the_bit(runs, layout):
    out = runs.resumed(layout, layout, f"{layout}-again")
    assert toy_run.curve(out) == toy_run.curve(runs.out(layout))


def test_a_rank_that_trains_nothing_goes_on_too(runs):
    out = runs.resumed("pipeline+bfloat16", "pipeline+bfloat16", "pretrain-again", "pretrain")
    assert toy_run.curve(out) == toy_run.curve(runs.out("pipeline+bfloat16", "pretrain"))


@pytest.mark.parametrize(
    ("now", "options", "message"),
    [
        pytest.param(
            "distributed_optimizer",
            {},
            r"parallel.distributed_optimizer: is true, but .*iteration_0000010 was saved with false",
            id="optimizer",
        ),
        pytest.param(
            "alone", {"workers": 1}, r"data.workers: is 1, but .*iteration_0000010 was written with 0", id="workers"
        ),
    ],
)
def test_what_cannot_be_carried_over_is_refused(runs, now, options, message):
    out = runs.resumed("alone", now, f"refused-{now}", **options)
    log = (out / "log").read_text()

    assert re.search("refused: " + message, log)
    assert len(toy_run.curve(out)) == toy_run.ITERATIONS + 2, "metrics were touched before the refusal"


@pytest.mark.parametrize("layout", ["tensor+sequence+pipeline", "tensor+data"])
def test_every_rank_stops_and_names_the_samples_of_the_broken_batch(runs, layout):
    out = toy_run.run(runs.folder, runs.folder / "runs" / f"broken-{layout}", broken=6, **LAYOUTS[layout])
    messages = re.findall("refused: .*", (out / "log").read_text())
    assert len(messages) == 4 and len(set(messages)) == 1
    assert messages[0].startswith("refused: sft: iteration 2 is not finite: loss nan")
    assert "samples: captions/6-0, dialogues/6-1. The last good" in messages[0]
