"""The workflow as a plan: what it refuses before any job, how fast it is read, and what it never imports."""

from __future__ import annotations

import itertools
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from workspace import ROOT, Snakemake, jobs


def test_dry_run_takes_three_seconds_and_no_torch(snakemake: Snakemake) -> None:
    def processor_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = processor_seconds()
    plan = snakemake("all", "-n")
    assert plan.returncode == 0, plan.stdout
    assert processor_seconds() - before < 3
    assert "Training stage sft" in jobs(plan.stdout)

    imported = snakemake("all", "-n", PYTHONPROFILEIMPORTTIME="1").stdout
    assert re.search(r"\| +vlm\.config$", imported, flags=re.MULTILINE)
    assert not re.search(r"\| +(torch|megatron|transformers)$", imported, flags=re.MULTILINE)


def test_full_recipe_fetches_and_shares_the_miniatures_steps(snakemake: Snakemake) -> None:
    """One code path: without its overlay the miniature differs only in where the data come from."""
    listed = snakemake("all", "-n", "-c1", profile="none").stdout
    assert re.search(r"Training stage pretrain\n    asks for nodes 1, gres gpu:8, .* runtime \d+\n", listed)
    assert listed.count("asks for") > 35
    tiny, full = jobs(snakemake("all", "-n").stdout), jobs(listed)
    fetched = {job for job in full if job.startswith("Fetching the data of")}
    assert {job.split()[4] for job in fetched} == {"pretrain", "sft", "captions", "mmmu"}
    models = re.compile(r"Fetching the (language|vision) model .*|Writing the report .*")
    assert {job for job in tiny if not models.fullmatch(job)} - full == {"Rendering the miniature data sets"}
    assert {job for job in full if not models.fullmatch(job)} - tiny == fetched


def test_benchmarks_of_an_overlay_are_fetched_asked_and_scored(snakemake: Snakemake) -> None:
    """Also beside the rendered data of the miniature. Two benchmarks of one repository fetch it once."""
    before = jobs(snakemake("all", "-n").stdout)
    both = ("--configfile", "config/tiny.yaml", "config/benchmarks.yaml")
    plan = snakemake("all", "-n", "-p", *both).stdout
    added = jobs(plan) - before
    fetched = {job for job in added if job.startswith("Fetching")}
    assert "Fetching the data of docvqa and infovqa from lmms-lab/DocVQA" in fetched
    assert "--include 'DocVQA/validation-*' --include 'InfographicVQA/validation-*'" in plan
    names = set(yaml.safe_load((ROOT / "config/benchmarks.yaml").read_text())["evaluation"])
    assert len(fetched) == len(names) - 1
    for model in ("combined", "pretrain", "sft"):
        for name in names:
            assert {f"Generating {name} with the model {model}", f"Scoring {name} of the model {model}"} <= added
    assert len(added) == len(fetched) + 6 * len(names), "something else depends on the benchmarks"
    assert jobs(snakemake("pope_scores", "-n", *both).stdout) & added == {
        "Fetching the data of pope from lmms-lab/POPE",
        *(f"Generating pope with the model {model}" for model in ("combined", "pretrain", "sft")),
        *(f"Scoring pope of the model {model}" for model in ("combined", "pretrain", "sft")),
    }


STAGE = (
    "{start_from: %s, trainable: [projector], data: {sft: 1.0}, prompt: instruction, sequence_length: 1024, "
    "global_batch: 4, iterations: 5, save_interval: 5, log_interval: 5, optimizer: {lr: 1e-3, min_lr: 0, "
    "warmup_share: 0, weight_decay: 0, beta1: 0.9, beta2: 0.95, eps: 1e-8, clip_grad: 1}}"
)


def test_the_last_stage_is_the_one_that_no_other_starts_from(snakemake: Snakemake) -> None:
    """An overlay's new stage comes last in the merged settings, also where it is trained in the middle."""
    change = f"stages={{sft: {{start_from: warm}}, warm: {STAGE % 'pretrain'}}}"
    planned = jobs(snakemake("all", "-n", "--config", change).stdout)
    assert "Training stage warm" in planned
    assert "Writing the model after sft as a transformers LLaVA folder" in planned


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param("stages={sft: {optimiser: {}}}", ["stages.sft.optimiser", "'optimizer'"], id="misspelt-key"),
        pytest.param(
            "stages={sft: {start_from: pretrian}}", ["stages.sft.start_from", "'pretrain'"], id="no-such-stage"
        ),
        pytest.param("stages={pretrain: {start_from: sft}}", ["circle"], id="stages-in-a-circle"),
        pytest.param("data={sets: {mmmu: {source: a}}}", ["data.sets.mmmu"], id="set-named-as-evaluation"),
        pytest.param("data={sets: {sft: {source: other/coco}}}", ["coco"], id="two-sources-in-one-folder"),
        pytest.param(
            "evaluation={ocrbench: {source: data/coco, revision: v2, split: test, prompt: a, max_new_tokens: 1}}",
            ["'captions' and 'ocrbench'", "coco"],
            id="two-revisions-in-one-folder",
        ),
        pytest.param("stages={sft: {data: {sft: -1}}}", ["stages.sft.data.sft"], id="negative-weight"),
        pytest.param(f"stages={{export: {STAGE % 'sft'}}}", ["stages.export", "taken"], id="stage-named-as-a-rule"),
    ],
)
def test_mistakes_stop_the_run_before_the_first_job(snakemake: Snakemake, change: str, words: list[str]) -> None:
    refused = snakemake("all", "--config", change)
    assert refused.returncode != 0
    assert "Traceback" not in refused.stdout
    assert len(refused.stdout.splitlines()) < 15
    for word in words:
        assert word in refused.stdout
    assert "Job " not in refused.stdout


def test_several_machines_are_for_slurm(snakemake: Snakemake) -> None:
    """Refused where training is planned, and before anything is done; what needs no training runs."""
    change = ("--config", "parallel={nodes: 2}")
    refused = snakemake("pretrain", *change)
    assert refused.returncode != 0 and "parallel.nodes: 2 machines are for a run on SLURM" in refused.stdout
    assert not jobs(refused.stdout)
    assert snakemake("results/tiny/convert/verified.json", *change).returncode == 0


def test_a_projector_that_transformers_lacks_is_not_exported(snakemake: Snakemake) -> None:
    overlay = ("--configfile", "config/nvidia_projector.yaml")
    plan = snakemake("all", "-n", "-c1", *overlay, profile="none")
    assert plan.returncode == 0 and "export: is false, so `all` writes no transformers LLaVA folder" in plan.stdout
    export = "Writing the model after sft as a transformers LLaVA folder"
    assert export not in jobs(plan.stdout) and "Training stage sft" in jobs(plan.stdout)
    assert export in jobs(snakemake("all", "-n", "-c1", profile="none").stdout)
    refused = snakemake("export", "-n", "-c1", *overlay, profile="none")
    assert refused.returncode != 0 and "export: is false; `vlm export --part language`" in refused.stdout


def test_the_small_recipe_makes_its_models_and_shares_all_other_steps(snakemake: Snakemake) -> None:
    small = jobs(snakemake("all", "-n", profile="profiles/gpu").stdout)
    tiny = jobs(snakemake("all", "-n").stdout)
    fetched = {"Fetching the language model resources/tiny/language", "Fetching the vision model resources/tiny/vision"}
    written = {"Writing the report results/small/report.html"}
    assert tiny - small - {"Writing the report results/tiny/report.html"} == fetched
    assert small - tiny - written == {
        "Fetching SmolLM2-135M-Instruct and emoji drawings",
        "Reading the language model data/small/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Training the vision model on the miniature's pictures",
    }
    alone = {"Fetching SmolLM2-135M-Instruct and emoji drawings"}
    assert jobs(snakemake("sources", "-n", profile="profiles/gpu").stdout) == alone


def test_the_small_recipes_pictures_do_not_depend_on_how_its_vision_model_is_trained(
    snakemake: Snakemake, workspace: Path
) -> None:
    for name in ("SmolLM2-135M-Instruct.Q4_1.gguf", "stamps.parquet"):
        (workspace / "data/small").mkdir(parents=True, exist_ok=True)
        (workspace / "data/small" / name).write_bytes(b"")
    asked = ("results/small/data/pretrain/.nv-meta/dataset.yaml", "results/small/convert/vision")
    assert snakemake(*asked, profile="profiles/gpu").returncode == 0
    call = next(one for one in (workspace / "calls.txt").read_text().splitlines() if one.startswith("tiny vision"))
    config, out, state = "results/small/config.yaml", "results/small/sources/vision", "results/small/vision_training"
    assert call == f"tiny vision --config {config} --out {out} --state {state}/state.pt --workers 10"
    change = ("--config", "miniature={vision: {steps: 7}}")
    again = jobs(snakemake("-n", *asked, *change, profile="profiles/gpu").stdout)
    assert "Training the vision model on the miniature's pictures" in again
    assert "Rendering the miniature data sets" not in again


def test_stage_names_are_targets(snakemake: Snakemake) -> None:
    assert "Training stage sft" not in jobs(snakemake("pretrain", "-n").stdout)
    assert "Training stage sft" in jobs(snakemake("sft", "-n").stdout)
    assert jobs(snakemake("tiny_models", "-n").stdout) == {
        f"Training the miniature {part} model from nothing" for part in ("language", "vision")
    }


def test_every_step_has_a_log_and_a_benchmark() -> None:
    for path in sorted((ROOT / "workflow/rules").glob("*.smk")):
        text = path.read_text()
        counts = {
            word: len(re.findall(rf"^ +{word}:$", text, flags=re.MULTILINE)) for word in ("shell", "log", "benchmark")
        }
        assert len(set(counts.values())) == 1, f"{path.name}: {counts}"


def test_the_schema_of_the_configuration_is_current() -> None:
    command = [sys.executable, ROOT / "workflow/scripts/config_schema.py", "--check"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_documented_commands_name_their_target_before_configuration_files():
    """Snakemake takes whatever follows `--configfile` for one more file."""
    commands = []
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("config/*"), *ROOT.glob("profiles/**/*.*")]:
        commands += re.findall(r"snakemake [^`\n]*--configfile[^`\n]*", path.read_text())
    assert len(commands) > 3
    for command in commands:
        files = itertools.takewhile(lambda word: not word.startswith("-"), command.split("--configfile")[1].split())
        assert all(file.endswith(".yaml") for file in files), command
