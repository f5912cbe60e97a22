"""The table: every model and control in order, nothing missing."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from evaluation_fixtures import overlay, write_config, write_json

from vlm.evaluate import table


def captions(cider: float, images: int = 30) -> dict[str, object]:
    names = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L")
    metrics = {"CIDEr": cider, **{n: cider / 10 + k for k, n in enumerate(names)}}
    return {
        "metrics": metrics,
        "standard_errors": {name: value / 100 for name, value in metrics.items()},
        "num_images": images,
    }


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    folder = tmp_path / "scores"
    for n, model in enumerate(("combined", "pretrain", "sft")):
        write_json(folder / model / "captions.json", captions(1.0 + n))
        write_json(folder / model / "captions_shuffled.json", captions(0.5 + n))
        mmmu = {"accuracy": 0.25 * (n + 1), "num_correct": 1, "num_questions": 40, "num_fallback": 3 - n}
        mmmu |= {"standard_errors": {"accuracy": 0.01 * (n + 1)}}
        write_json(folder / model / "mmmu.json", mmmu)
    for n, control in enumerate(("random", "nearest", "reference")):
        write_json(folder / "controls" / f"{control}.json", captions(0.7 + n))
    return folder


def test_rows_and_columns(scores: Path, tmp_path: Path) -> None:
    table.write(write_config(tmp_path / "config.yaml"), scores, tmp_path / "table.csv")
    read = pd.read_csv(tmp_path / "table.csv")
    assert tuple(read.columns) == table.COLUMNS
    assert list(read["name"]) == ["combined", "pretrain", "sft", "random", "nearest", "reference"]
    sft = read.set_index("name").loc["sft"]
    assert sft["CIDEr"] == 3.0 and sft["BLEU-4"] == pytest.approx(3.3) and sft["METEOR"] == pytest.approx(4.3)
    assert sft["ROUGE-L"] == pytest.approx(5.3)
    assert sft[table.SHUFFLED] == 2.5 and sft[table.ACCURACY] == 0.75
    assert (sft["images"], sft["questions"], sft["unparsed answers"]) == (30, 40, 1)
    assert read.set_index("name").loc["nearest", [table.SHUFFLED, table.ACCURACY, "questions"]].isna().all()
    assert list(read.loc[:1, "label"]) == ["before training", "after pretrain"]


def test_every_score_has_its_standard_error(scores: Path, tmp_path: Path) -> None:
    table.write(write_config(tmp_path / "config.yaml"), scores, tmp_path / "table.csv")
    read = pd.read_csv(tmp_path / "table.csv").set_index("name")
    sft = read.loc["sft"]
    assert sft["CIDEr standard error"] == 0.03 and sft["BLEU-4 standard error"] == pytest.approx(0.033)
    assert sft[f"{table.SHUFFLED} standard error"] == 0.025 and sft[f"{table.ACCURACY} standard error"] == 0.03
    assert read.loc["nearest", "ROUGE-L standard error"] == pytest.approx(read.loc["nearest", "ROUGE-L"] / 100)
    assert read.loc["nearest", [f"{name} standard error" for name in (table.SHUFFLED, table.ACCURACY)]].isna().all()


def test_benchmarks_of_the_configuration_have_columns_at_the_end(scores: Path, tmp_path: Path) -> None:
    chosen = {name: overlay("benchmarks")["evaluation"][name] for name in ("docvqa", "pope")}
    config = write_config(tmp_path / "config.yaml", evaluation=chosen)
    with pytest.raises(ValueError, match=r"combined/docvqa\.json: there is no such file"):
        table.write(config, scores, tmp_path / "table.csv")
    for n, model in enumerate(("combined", "pretrain", "sft")):
        for name, metrics in (("docvqa", {"anls": 0.1 * n}), ("pope", {"accuracy": 0.5, "f1": 0.25})):
            score = {"metrics": metrics, "standard_errors": dict.fromkeys(metrics, 0.125), "num_items": 7}
            write_json(scores / model / f"{name}.json", score)
    table.write(config, scores, tmp_path / "table.csv")
    read = pd.read_csv(tmp_path / "table.csv").set_index("name")
    assert tuple(read.columns[len(table.COLUMNS) - 1 :]) == (
        *("DocVQA ANLS", "DocVQA ANLS standard error", "DocVQA items"),
        *("POPE accuracy", "POPE accuracy standard error", "POPE items"),
    )
    assert list(read.loc["sft"].iloc[-6:]) == [0.2, 0.125, 7, 0.5, 0.125, 7]
    assert read.loc["random"].iloc[-6:].isna().all()
    write_json(scores / "sft/pope.json", {"metrics": {}, "num_items": 7})
    with pytest.raises(ValueError, match=r"sft/pope\.json: expected an object under metrics"):
        table.write(config, scores, tmp_path / "table.csv")
    score = {"metrics": {"accuracy": 0.5}, "standard_errors": {"accuracy": 0.1}, "num_items": 6}
    write_json(scores / "sft/pope.json", score)
    with pytest.raises(ValueError, match=r"different numbers of POPE items .*sft: 6"):
        table.write(config, scores, tmp_path / "table.csv")


def test_missing_and_broken_scores_are_refused_by_name(scores: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml")
    write_json(scores / "controls/nearest.json", captions(1.0, images=29))
    with pytest.raises(ValueError, match=r"different numbers of images .*nearest: 29"):
        table.write(config, scores, tmp_path / "table.csv")
    write_json(scores / "controls/nearest.json", {"metrics": {"CIDEr": 1.0}})
    with pytest.raises(ValueError, match=r"nearest\.json: expected a number under metrics\.Bleu_4"):
        table.write(config, scores, tmp_path / "table.csv")
    (scores / "pretrain/captions_shuffled.json").unlink()
    with pytest.raises(ValueError, match=r"pretrain/captions_shuffled\.json: there is no such file"):
        table.write(config, scores, tmp_path / "table.csv")
    assert not (tmp_path / "table.csv").exists()
