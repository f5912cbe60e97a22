"""When a time budget ends a run: late enough to be of use, early enough to save."""

from __future__ import annotations

import time

import pytest

from vlm.train import stop


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90m", 5400), ("3h50m", 13800), ("1h", 3600), ("45s", 45), ("1h1m1s", 3661)],
)
def test_durations(text, seconds):
    assert stop.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0m", "m", "-5", "1.5h", "5 m", "3m2h", "soon"])
def test_no_durations(text):
    with pytest.raises(ValueError, match="--stop-after: .* is no time, write for example 90m or 3h50m"):
        stop.parse_duration(text)


@pytest.mark.parametrize(
    ("left", "steps", "validation", "save", "out"),
    [
        pytest.param(100, [10], 0, 50, False, id="fits"),
        pytest.param(89, [10], 0, 50, True, id="a-step-and-a-save-and-half-of-both"),
        pytest.param(100, [10], 20, 50, True, id="with-a-validation"),
        pytest.param(100, [90] + 10 * [10], 0, 50, False, id="the-first-step-compiled"),
        pytest.param(100, [10, 20, 10], 0, 50, True, id="the-slowest-of-the-last-steps"),
    ],
)
def test_the_budget_leaves_time_for_a_step_and_a_save(monkeypatch, left, steps, validation, save, out):
    now = time.monotonic()
    asked = stop.Stop(1000.0)
    for seconds in steps:
        asked.stepped(seconds)
    asked.validated(validation)
    asked.saved(save)
    ends = asked._deadline
    assert ends is not None and abs(ends - now - 1000) < 600, "counted from the start of the process"
    monkeypatch.setattr(time, "monotonic", lambda: ends - left)
    assert bool(asked.code) == out
    assert not out or stop.name(asked.code) == "--stop-after"


def test_before_the_first_save_the_start_stands_for_it(monkeypatch):
    asked = stop.Stop(1000.0)
    began, ends = asked._started, asked._deadline
    assert ends is not None
    monkeypatch.setattr(time, "monotonic", lambda: began + 100)
    asked.began()
    monkeypatch.setattr(time, "monotonic", lambda: ends - 151)
    assert not asked.code
    monkeypatch.setattr(time, "monotonic", lambda: ends - 149)
    assert asked.code


def test_without_a_budget_it_goes_on():
    assert stop.Stop().code == 0
