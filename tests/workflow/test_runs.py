"""What runs, what runs again, and what is left alone: the real workflow with stand-ins for the commands."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml
from workspace import Snakemake, environment, jobs

SFT_AND_AFTER = {
    "Training stage sft",
    *(f"Generating {task} with the model sft" for task in ("captions", "captions_shuffled", "dialogue", "mmmu")),
    *(f"Scoring {task} of the model sft" for task in ("captions", "captions_shuffled", "mmmu")),
    "Gathering the scores",
    "Drawing the scores",
    "Drawing the loss curves",
    "Making the gallery",
    "Keeping the configuration",
    "Writing the model after sft as a transformers LLaVA folder",
    "Writing the report results/tiny/report.html",
}


def wait_until(happened: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_everything_is_made_once_and_a_change_remakes_only_what_follows(workspace: Path, snakemake: Snakemake) -> None:
    first = snakemake("all")
    assert first.returncode == 0, first.stdout
    resolved = yaml.safe_load((workspace / "results/tiny/config.yaml").read_text())
    assert resolved["run"] == "tiny" and resolved["models"]["projector"]["bias"] is True

    report = (workspace / "results/tiny/report.html").read_text()
    assert "Gallery" in report and "loss of every stage" in report
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']https?:", report), (
        "the report needs the internet"
    )
    assert "System Message" not in report, "a caption of the report is not valid reStructuredText"

    calls = (workspace / "calls.txt").read_text()
    for part in ("language", "vision"):
        assert f"convert {part} results/tiny/sources/{part} results/tiny/convert/{part}\n" in calls
    for name, source in {"pretrain": "LLaVA-Pretrain", "sft": "LLaVA-Instruct-150K"}.items():
        folders = f"--source results/tiny/sources/{source} --out results/tiny/data/{name} --workers 2\n"
        assert f"data shard --config results/tiny/config.yaml --set {name} {folders}" in calls

    assert calls.count("--task dialogue") == 1, "the gallery shows what the last stage says"

    assert "Nothing to be done" in snakemake("all", "-n").stdout

    other_rate = snakemake("all", "-n", "--config", "stages={sft: {optimizer: {lr: 3e-4}}}")
    assert jobs(other_rate.stdout) == SFT_AND_AFTER
    assert "3e-4" not in (workspace / "results/tiny/config.yaml").read_text(), "a dry run changed what commands read"

    watched = "stages={sft: {log_interval: 1, keep: 3, validation_interval: 25}}"
    for change in ("evaluation={batch_size: 8}", watched):
        assert jobs(snakemake("all", "-n", "--config", change).stdout) == {
            "Keeping the configuration",
            "Writing the report results/tiny/report.html",
        }
    assert jobs(snakemake("all", "-n", "--config", "evaluation={dialogue: {questions: [Who]}}").stdout) == {
        "Generating dialogue with the model sft",
        "Making the gallery",
        "Keeping the configuration",
        "Writing the report results/tiny/report.html",
    }
    assert jobs(snakemake("coco_scores", "-n", "--forcerun", "score_captions").stdout) == {
        f"Scoring {task} of the model {model}"
        for task in ("captions", "captions_shuffled")
        for model in ("combined", "pretrain", "sft")
    }

    remade = snakemake("all", "--config", "stages={sft: {optimizer: {lr: 3e-4}}}")
    assert remade.returncode == 0, remade.stdout
    calls = (workspace / "calls.txt").read_text().splitlines()
    assert [len([call for call in calls if f"--stage {stage}" in call]) for stage in ("pretrain", "sft")] == [1, 2]
    assert (
        yaml.safe_load((workspace / "results/tiny/config.yaml").read_text())["stages"]["sft"]["optimizer"]["lr"] == 3e-4
    )


def test_make_demo_goes_on_after_snakemake_was_killed(workspace: Path) -> None:
    """SIGKILL leaves a lock, an incomplete output and a running trainer behind; a plain rerun copes with all three."""
    (workspace / ".venv/.installed").touch()
    (workspace / "hold").touch()
    command = ["make", "--assume-old=.venv/.installed", "demo"]
    environ = environment(workspace)

    def start(log: str) -> psutil.Popen:
        with open(workspace / log, "w") as stream:
            return psutil.Popen(command, cwd=workspace, env=environ, stdout=stream, stderr=stream)

    def trainings() -> int:
        return (workspace / "results/tiny/train/pretrain/started").read_text().count("started")

    first = start("first.log")
    wait_until(lambda: (workspace / "results/tiny/train/pretrain/started").exists())
    refused = subprocess.run(command, cwd=workspace, env=environ, capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0 and "Another `make demo` is running" in refused.stderr

    family = first.children(recursive=True)
    trainer = [process for process in family if "--stage" in process.cmdline() and "-c" not in process.cmdline()]
    assert len(trainer) == 1
    for process in [first, *(one for one in family if "snakemake" in " ".join(one.cmdline()) and one not in trainer)]:
        process.kill()
        process.wait()
    assert trainer[0].is_running(), "the trainer died with snakemake, so this test shows nothing"
    assert list((workspace / ".snakemake/locks").iterdir()), "the kill left no lock, so this test shows nothing"

    second = start("second.log")
    wait_until(lambda: "Waiting for another training" in (workspace / "second.log").read_text())
    assert trainings() == 1, "two trainers write to one folder"
    (workspace / "hold").unlink()
    assert second.wait(timeout=200) == 0, (workspace / "second.log").read_text()
    assert "summary of results/tiny/scores/table.csv" in (workspace / "second.log").read_text().splitlines()
    assert trainings() == 2
    calls = (workspace / "calls.txt").read_text().splitlines()
    assert len([call for call in calls if call.startswith("tiny data")]) == 1, "finished work was done again"


def test_a_stopped_training_is_a_failed_job_that_says_how_to_go_on(workspace: Path, snakemake: Snakemake) -> None:
    (workspace / "stop").touch()
    stopped = snakemake("pretrain")
    assert stopped.returncode != 0
    assert "stopped by SIGTERM; the same command goes on" in stopped.stdout
    assert "missing" not in stopped.stdout.lower(), "the exit code was lost on the way"
    folder = workspace / "results/tiny/train/pretrain"
    assert (folder / "started").exists() and not (folder / "finished.json").exists()
    (workspace / "stop").unlink()
    resumed = snakemake("pretrain")
    assert resumed.returncode == 0, resumed.stdout
    assert (folder / "finished.json").exists()
    assert (workspace / "calls.txt").read_text().count("tiny data") == 1, "finished work was done again"
