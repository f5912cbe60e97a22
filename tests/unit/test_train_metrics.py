from __future__ import annotations

import json

import pytest

from vlm.train.metrics import TIMES, Outcome, Reporter, Totals, cut_back, read_lines


def outcome(loss_sum: float = 6.0, trained_tokens: int = 3) -> Outcome:
    return Outcome(
        loss_sum=loss_sum,
        trained_tokens=trained_tokens,
        tokens=10,
        samples=2,
        gradient_norm=0.5,
        seconds=2.0,
        data_wait_seconds=0.25,
    )


def test_line_is_the_token_mean_of_its_interval_not_the_mean_of_step_means():
    totals = Totals()
    totals.add(outcome(loss_sum=6.0, trained_tokens=3))
    totals.add(outcome(loss_sum=9.0, trained_tokens=1))
    line = totals.line(2, outcome(), 1e-3)
    assert line["loss"] == 15.0 / 4
    assert (line["samples"], line["tokens"], line["trained_tokens"]) == (4, 20, 4)
    assert (line["tokens_per_second"], line["samples_per_second"], line["data_wait_seconds"]) == (5.0, 1.0, 0.5)
    totals.add(outcome(loss_sum=1.0, trained_tokens=1))
    line = totals.line(3, outcome(), 1e-3)
    assert line["loss"] == 1.0, "the second interval still holds sums of the first"
    assert line["samples"] == 6 and line["elapsed_seconds"] == 6.0, "counts run from the start of the stage"


def test_totals_survive_a_checkpoint_in_the_middle_of_an_interval():
    whole, before = Totals(), Totals()
    for totals in (whole, before):
        totals.add(outcome(loss_sum=0.1))
    after = Totals(**json.loads(json.dumps(vars(before))))
    for totals in (whole, after):
        totals.add(outcome(loss_sum=0.7, trained_tokens=7))
    assert after.line(2, outcome(), 0.1) == whole.line(2, outcome(), 0.1)


@pytest.mark.parametrize(
    ("torn", "iteration", "kept"),
    [
        pytest.param("", 4, [2, 4], id="beyond-the-checkpoint"),
        pytest.param('{"iteration": 8, "lo', 6, [2, 4, 6], id="killed-while-writing"),
        pytest.param('{"iteration": 8, "loss": 1.0}', 8, [2, 4, 6], id="whole-but-without-newline"),
        pytest.param("", 0, [], id="no-checkpoint-yet"),
    ],
)
def test_cut_back(tmp_path, torn, iteration, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"iteration": i, "loss": 1 / i}) + "\n" for i in (2, 4, 6)) + torn)
    assert [line["iteration"] for line in cut_back(path, iteration)] == kept
    assert read_lines(path) == [{"iteration": i, "loss": 1 / i} for i in kept]
    assert path.read_text().count("\n") == len(kept)


def test_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\nnonsense\n{"iteration": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not JSON"):
        cut_back(path, 3)


def test_reporter_writes_the_same_to_json_and_tensorboard(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    totals = Totals()
    reporter = Reporter(tmp_path, start=0, iterations=2, description="pretrain")
    for iteration in (1, 2):
        totals.add(outcome(loss_sum=float(iteration)))
        reporter.advance(outcome(loss_sum=float(iteration)))
        reporter.write(totals.line(iteration, outcome(), 0.1))
    reporter.close()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2]
    assert set(TIMES) < set(lines[0])
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in set(lines[0]) - {"iteration"}:
        scalars = board.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2]
        assert [scalar.value for scalar in scalars] == pytest.approx([line[name] for line in lines])
    bar = capsys.readouterr().err
    assert "pretrain" in bar and "loss=" in bar and "tokens/s=" in bar


def test_tensorboard_forgets_what_a_killed_run_wrote_beyond_its_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps, loss in ((0, (1, 2, 3), 1.0), (2, (3, 4), 2.0)):
        reporter = Reporter(tmp_path, start=start, iterations=4, description="sft")
        for step in steps:
            reporter.write({"iteration": step, "loss": loss})
        reporter.close()
    assert [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1.0, 1.0, 2.0, 2.0]
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
