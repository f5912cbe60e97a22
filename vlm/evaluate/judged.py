"""What a rule says of one answer, and what the answers to many questions are worth together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 1000
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Judged:
    points: Mapping[str, float]
    """Metric -> points from 0 to 1; the first is the benchmark's own."""
    parsed: bool = True
    """False where the rules found no answer in the response, and the benchmark's last resort was taken."""
    counts: Mapping[str, str] = field(default_factory=dict)
    """For measures that are no means over questions: what was said, and what is right."""


def right(correct: bool, *, parsed: bool = True) -> Judged:
    """Right or wrong, as accuracy counts."""
    return Judged({"accuracy": float(correct)}, parsed)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of `values`, with the questions taken for independent draws.

    sqrt(mean((x - mean)^2) / n), which for right-or-wrong questions is the binomial sqrt(p (1 - p) / n). Where several
    questions are about one picture it is somewhat too small.
    """
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values)) / len(values)


def means(judged: Sequence[Judged]) -> dict[str, Any]:
    """Mean points and their standard errors, by metric.

    Returns:
        `{"metrics": {..}, "standard_errors": {..}, "num_items": n}`.
    """
    names = list(judged[0].points)
    columns = {name: [one.points[name] for one in judged] for name in names}
    return {
        "metrics": {name: math.fsum(values) / len(values) for name, values in columns.items()},
        "standard_errors": {name: standard_error(values) for name, values in columns.items()},
        "num_items": len(judged),
    }


def detection(judged: Sequence[Judged]) -> dict[str, Any]:
    """Accuracy, precision, recall and F1 of "yes", and the share of "yes", as POPE reports them.

    Precision, recall and F1 are ratios of counts, so their standard errors come from RESAMPLES bootstrap resamples
    (drawn by BOOTSTRAP_SEED) of the questions. A ratio without a denominator is 0.

    Returns:
        As `means`.
    """
    pairs = [(one.counts["said"], one.counts["gold"]) for one in judged]
    cells = [pairs.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"))]
    own = _ratios(np.array([cells]))
    drawn = np.random.default_rng(BOOTSTRAP_SEED).multinomial(len(pairs), np.array(cells) / len(pairs), RESAMPLES)
    spread = {name: float(values.std()) for name, values in _ratios(drawn).items()}
    said = [float(word == "yes") for word, _ in pairs]
    spread |= {
        "accuracy": standard_error([one.points["accuracy"] for one in judged]),
        "yes_share": standard_error(said),
    }
    return {
        "metrics": {name: float(values[0]) for name, values in own.items()},
        "standard_errors": spread,
        "num_items": len(judged),
    }


def _ratios(cells_N4: np.ndarray) -> dict[str, np.ndarray]:
    """By metric, for rows of true positives, false positives, false negatives and true negatives."""
    true_yes, false_yes, false_no, true_no = cells_N4.T.astype(float)

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)

    return {
        "accuracy": share(true_yes + true_no, cells_N4.sum(axis=1).astype(float)),
        "precision": share(true_yes, true_yes + false_yes),
        "recall": share(true_yes, true_yes + false_no),
        "f1": share(2 * true_yes, 2 * true_yes + false_yes + false_no),
        "yes_share": share(true_yes + false_yes, cells_N4.sum(axis=1).astype(float)),
    }
