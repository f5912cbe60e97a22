from __future__ import annotations

import json

import pytest

from vlm.model.flops import StepFlops
from vlm.train.metrics import TIMES, Meter, Outcome, Reporter, Totals, cut_back, read_lines

METER = Meter(StepFlops(per_token=2, per_pair=3, per_image=5, per_trained_token=7), devices=2, peak=None)


def outcome(loss_sum: float = 6.0, trained_tokens: int = 3, *, other: tuple[float, int] | None = None) -> Outcome:
    """A step over the data set `a`, and `b` where `other` has its sum and trained tokens."""
    losses, trained = {"a": loss_sum}, {"a": trained_tokens}
    if other:
        losses["b"], trained["b"] = other
    return Outcome(
        losses=losses,
        trained=trained,
        tokens=10,
        samples=2,
        images=3,
        pairs=40,
        gradient_norm=0.5,
        seconds=2.0,
        data_wait_seconds=0.25,
    )


def line(totals: Totals, iteration: int, meter: Meter = METER) -> dict[str, float]:
    return totals.line(iteration, outcome(), 1e-3, meter, 77)


def test_line_is_the_token_mean_of_its_interval_not_the_mean_of_step_means():
    totals = Totals()
    totals.add(outcome(loss_sum=6.0, trained_tokens=3))
    totals.add(outcome(loss_sum=9.0, trained_tokens=1))
    first = line(totals, 2)
    assert first["loss"] == 15.0 / 4
    assert (first["samples"], first["tokens"], first["trained_tokens"]) == (4, 20, 4)
    assert (first["tokens_per_second"], first["samples_per_second"], first["data_wait_seconds"]) == (5.0, 1.0, 0.5)
    assert first["peak_memory_bytes"] == 77
    totals.add(outcome(loss_sum=1.0, trained_tokens=1))
    second = line(totals, 3)
    assert second["loss"] == 1.0, "the second interval still holds sums of the first"
    assert second["samples"] == 6 and second["elapsed_seconds"] == 6.0, "counts run from the start of the stage"


def test_loss_of_each_of_several_data_sets():
    totals = Totals()
    totals.add(outcome(6.0, 3, other=(0.0, 0)))
    assert line(totals, 1).items() >= {"loss": 2.0, "loss/a": 2.0}.items(), "a set without a trained token has no mean"
    totals.add(outcome(6.0, 3, other=(8.0, 1)))
    totals.add(outcome(0.0, 0, other=(2.0, 4)))
    found = line(totals, 3)
    assert (found["loss"], found["loss/a"], found["loss/b"]) == (2.0, 2.0, 2.0)
    totals.add(outcome(3.0, 3))
    assert [name for name in line(totals, 4) if name.startswith("loss")] == ["loss"], "the only set's is the loss"


def test_operations_per_second_are_those_of_the_interval_and_a_device():
    totals = Totals()
    line(totals, 1)
    for _ in range(2):
        totals.add(outcome(trained_tokens=4))
    rate = 2 * (2 * 10 + 3 * 40 + 5 * 3 + 7 * 4) / 4.0 / 2  # over two steps of two seconds on two devices
    known = Meter(METER.flops, METER.devices, peak=100.0)
    assert known.read(totals) == {"tflops_per_device": pytest.approx(rate / 1e12), "mfu": round(rate / 100.0, 4)}
    assert "mfu" not in line(totals, 3), "the share of an unknown peak is not zero, it is unknown"


def test_totals_survive_a_checkpoint_in_the_middle_of_an_interval():
    whole, before = Totals(), Totals()
    for totals in (whole, before):
        totals.add(outcome(loss_sum=0.1, other=(0.3, 2)))
    after = Totals(**json.loads(json.dumps(vars(before))))
    for totals in (whole, after):
        totals.add(outcome(loss_sum=0.7, trained_tokens=7, other=(0.9, 1)))
    assert line(after, 2) == line(whole, 2)


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

    totals, known = Totals(), Meter(METER.flops, METER.devices, peak=1e12)
    reporter = Reporter(tmp_path, start=0, iterations=2, description="pretrain")
    for iteration in (1, 2):
        totals.add(outcome(loss_sum=float(iteration), other=(1.0, 2)))
        reporter.advance(outcome(loss_sum=float(iteration)))
        reporter.write(line(totals, iteration, known))
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
