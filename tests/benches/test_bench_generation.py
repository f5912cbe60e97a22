"""The bench of generation at tiny sizes: its rows fit together. The times themselves mean nothing here."""

from __future__ import annotations

import json
from pathlib import Path

import bench_generation as bench
import pytest
import torch

from vlm import parallel

BATCHES, NEW_TOKENS = (2, 5), 4


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    path: Path = tmp_path_factory.mktemp("bench") / "rows.json"
    try:
        bench.main(["--tiny", "--new-tokens", str(NEW_TOKENS), "--output", str(path), "--batches", *map(str, BATCHES)])
    finally:
        parallel.destroy()
    return json.loads(path.read_text())


def test_every_contestant_answers_every_batch(rows: list[dict]) -> None:
    names = ["triton+graph", "triton", "torch"] if torch.cuda.is_available() else ["triton", "torch"]
    assert [(row["contestant"], row["batch"]) for row in rows] == [(n, b) for n in names for b in BATCHES]
    if not torch.cuda.is_available():  # there the backends are the same functions
        assert all(row["same_tokens"] == 1.0 for row in rows)


def test_figures_follow_from_the_times_and_sizes(rows: list[dict]) -> None:
    language = bench.TINY_LANGUAGE
    hidden, ffn, head_dim = language["hidden_size"], language["intermediate_size"], language["head_dim"]
    heads, groups = language["num_attention_heads"], language["num_key_value_heads"]
    layer = hidden * head_dim * (2 * heads + 2 * groups) + 3 * hidden * ffn + 2 * hidden
    weights = 2 * (language["num_hidden_layers"] * layer + hidden + language["vocab_size"] * hidden)  # bf16
    prompt = 4 + bench.TEXT_TOKENS  # 28 px make 2 x 2 patches
    for row in rows:
        seconds = row["prefill_seconds"] + (NEW_TOKENS - 1) * row["step_seconds"]
        assert row["captions_per_second"] == pytest.approx(row["batch"] / seconds)
        assert row["prompt_tokens"] == prompt
        assert row["weight_bytes"] == weights
        keys = prompt + NEW_TOKENS / 2
        assert row["cache_bytes"] == 2 * 2 * language["num_hidden_layers"] * groups * head_dim * row["batch"] * keys
        floor = (row["weight_bytes"] + row["cache_bytes"]) / row["copy_bytes_per_second"]
        assert row["share_of_floor"] == pytest.approx(floor / row["step_seconds"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="full size runs on a GPU")
def test_full_size_is_refused_on_a_cpu() -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        bench.main(["--batches", "1"])
