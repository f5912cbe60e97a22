"""`vlm plan`: counts and times against sums done by hand, layouts, sources of sizes, refusals, and what is printed."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import yaml
from plan_fixtures import MISTRAL_LAYER, ROOT, alone, recipe_bases, settings, small_bases, tree
from safetensors import safe_open

from vlm import cli, resources
from vlm.estimate import layouts
from vlm.model import flops
from vlm.resources import jobs, memory, parameters, speed, storage, workload


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`vlm plan` of the recipe with changes: exit code, what it printed, and what it said on stderr."""
    monkeypatch.chdir(tmp_path)

    def plan(*options: str, **changes: object) -> tuple[int, str, str]:
        Path("config.yaml").write_text(yaml.safe_dump(tree(**changes)))
        code = cli.main(["plan", "--config", "config.yaml", *options])
        return code, *capsys.readouterr()

    return plan


def figures(run, *options: str, **changes: object) -> dict:
    return json.loads(run("--json", *options, **changes)[1])


def test_parameters_by_hand():
    counts = parameters.of_parts(recipe_bases(), settings())
    # transformers counts 7,248,023,552 for Mistral-7B-Instruct-v0.3.
    assert counts["language"].total == 32 * MISTRAL_LAYER + 2 * 32768 * 4096 + 4096 == 7_248_023_552
    assert counts["vision"].total == 303_505_408
    assert counts["projector"].total == 1024 * 4096 + 4096 + 4096 * 4096 + 4096 == 20_979_712
    reference = settings(models__projector__hidden_size=14336, models__projector__bias=False, export=False)
    assert parameters.projector(recipe_bases(), reference).total == 73_400_320
    fewer = settings(models__vision__feature_layer=-2)
    block = 4 * 1024**2 + 2 * 1024 * 4096 + 9 * 1024 + 4096
    assert counts["vision"].total - parameters.of_parts(recipe_bases(), fewer)["vision"].total == block


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_pipeline_stages_have_all_parameters(pipeline, tied):
    bases = recipe_bases()
    bases = replace(bases, language=replace(bases.language, tied_embeddings=tied))
    config = settings(parallel__tensor=1, parallel__pipeline=pipeline)
    whole = sum(count.total for count in parameters.of_parts(bases, config).values())
    stages = [parameters.of_stage(bases, config, config.parallel, i) for i in range(pipeline)]
    copy = 32768 * 4096 if tied and pipeline > 1 else 0  # the head of the last stage is the embedding of the first
    assert sum(count.total for stage in stages for count in stage.values()) == whole + copy


def test_operations_of_the_reference_sample():
    """A caption of 591 tokens takes the language model about 8.5 TFLOP forward, its head at all positions."""
    bases = recipe_bases()
    cost = flops.count(
        bases.language, bases.vision, projector_size=4096, feature_layer=-1, trainable=("projector", "language")
    )
    forward = cost(tokens=591, pairs=591 * 592 // 2, images=0, trained_tokens=591) / 3
    assert forward / 1e12 == pytest.approx(8.5, rel=0.01)
    config = alone(stages__sft__sequence_length=591, stages__sft__global_batch=3)
    sequence = workload.of_sequence(config, "sft", bases)
    step = speed.of_training(config, "sft", bases, resources.gpu("h100"), speed.efficiency(config, "sft"))
    expected = 3 * cost(
        tokens=round(sequence.tokens),
        pairs=round(sequence.pairs),
        images=round(sequence.pictures),
        trained_tokens=round(sequence.trained_tokens),
    )
    assert step.flops == expected


def test_a_step_takes_as_long_as_it_was_measured():
    """The bench's pretraining step: two sequences on one H200."""
    rows = json.loads((ROOT / "tests/benches/results/training_step_nvidia-h200.json").read_text())
    for row in rows:
        if row["stage"] != "pretrain":
            continue
        config = alone(stages__pretrain__global_batch=2, kernels__backend=row["backend"])
        share = speed.efficiency(config, "pretrain")
        assert share.share == pytest.approx(row["mfu"], rel=0.01)
        step = speed.of_training(config, "pretrain", recipe_bases(), resources.gpu("h200"), share)
        assert step.seconds == pytest.approx(row["seconds"], rel=0.03)
        assert step.waiting_seconds == 0


def test_shares_of_the_peak_are_the_measured_ones():
    rows = json.loads((ROOT / "tests/benches/results/training_step_nvidia-h200.json").read_text())
    assert {(row["backend"], row["stage"] == "sft") for row in rows} == set(speed.MEASURED)
    for (backend, learns), share in speed.MEASURED.items():
        found = [row["mfu"] for row in rows if (row["backend"], row["stage"] == "sft") == (backend, learns)]
        assert share == pytest.approx(mean(found), abs=5e-4)


def test_waiting_by_hand():
    """Tensor 4: four all-reduces of 9984 x 4096 bfloat16 per layer, each moves 2 x 3/4 of it over NVLink."""
    bases, gpu = recipe_bases(), resources.gpu("h100")
    config = settings(parallel__ranks_per_node=4, parallel__distributed_optimizer=False)
    step = speed.of_training(config, "pretrain", bases, gpu, speed.Efficiency(0.5, "-"))
    ring = 1.5 * 9984 * 4096 * 2 / (450e9 * speed.LINK_SHARE)
    assert step.waiting_seconds == pytest.approx(16 * 32 * 4 * ring)
    assert step.compute_seconds == pytest.approx(step.flops / (4 * 989.4e12 * 0.5))
    pipelined = settings(parallel__tensor=1, parallel__pipeline=4, parallel__ranks_per_node=4)
    step = speed.of_training(pipelined, "pretrain", bases, gpu, speed.Efficiency(0.5, "-"))
    assert step.waiting_seconds == pytest.approx(3 / 16 * step.compute_seconds)


def test_recompute_costs_a_forward_pass_of_the_layers():
    bases, gpu, share = recipe_bases(), resources.gpu("h100"), speed.Efficiency(0.5, "-")
    plain, again = (
        speed.of_training(alone(parallel__recompute=one), "sft", bases, gpu, share).compute_seconds
        for one in (False, True)
    )
    assert 1.3 < again / plain < 4 / 3


def test_the_reference_layout_fits_eight_times_80_gb(run):
    code, out, _ = run("--gpu", "h100")
    assert code == 0 and "The run fits" in out
    found = figures(run, "--gpu", "h100")
    assert (found["layout"]["tensor"], found["layout"]["gpus"], found["layout_from"]) == (
        4,
        8,
        "as in the configuration",
    )
    assert all(stage["fits"] for stage in found["stages"].values())


def test_one_141_gb_card_pretrains_and_needs_recompute_for_sft(run):
    gpu = resources.gpu("h200")
    assert memory.peak(alone(), "pretrain", recipe_bases()).total < gpu.usable_bytes
    assert memory.peak(alone(), "sft", recipe_bases()).total > gpu.memory_bytes
    found = figures(run, "--gpu", "h200", "--gpus-per-node", "1")
    assert found["fits"] and found["layout"]["recompute"] and "chosen for these GPUs" in found["layout_from"]
    sft = found["stages"]["sft"]
    assert sft["memory"]["total"] <= gpu.usable_bytes < sft["total_with_recompute_changed"]
    assert found["stages"]["pretrain"]["smallest_layout"]["recompute"] is False


def test_what_does_not_fit_exits_1_and_names_the_smallest_that_does(run):
    code, out, _ = run("--gpu", "a100-40", "--gpus-per-node", "2")
    assert code == 1 and "does NOT fit" in out and "NO" in out
    small = figures(run, "--gpu", "a100-40", "--gpus-per-node", "2")["smallest_layout"]
    assert small["gpus"] > 2 and small["peak_bytes"] <= resources.gpu("a100-40").usable_bytes
    fewer = layouts.candidates(settings(), recipe_bases(), resources.gpu("a100-40"), 2, 2, ["sft"])
    assert fewer and all(one.peak_bytes > resources.gpu("a100-40").usable_bytes for one in fewer)


def test_of_equally_fast_layouts_the_simplest_is_taken():
    """Sharding the sequence costs no time here, so that it is taken only where its memory is needed."""
    gpu = resources.gpu("h100")
    split = [
        one
        for one in layouts.candidates(settings(), recipe_bases(), gpu, 8, 8, ["sft"])
        if (one.config.parallel.tensor, one.config.parallel.pipeline) == (4, 1)
    ]
    assert {one.config.parallel.sequence for one in split} == {False, True}
    best = layouts.best(split, gpu)
    assert best is not None and best.seconds == min(one.seconds for one in split)
    assert not best.config.parallel.sequence and not best.config.parallel.recompute


def test_overlays_go_over_the_settings(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main(["plan", "--json", "--config", "config/config.yaml", "config/tiny.yaml"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["dtype"], found["layout"]["gpus"]) == ("tiny", "float32", 1)
    assert found["stages"]["sft"]["epochs"]["sft"]["samples"] == 7920
    assert cli.main(["plan", "--config", "config/config.yaml", "profiles/slurm/nothing.yaml"]) == 2


def test_no_layout_holds_a_run_on_the_smallest_of_gpus(run):
    code, out, _ = run("--gpu", "0.5:100")
    assert code == 1 and "No layout of these GPUs holds the run" in out


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (["--gpu", "h300"], {}, r"--gpu: 'h300' is not known, allowed are h100, .*96:400"),
        (["--gpu", "0:300"], {}, "is not known"),
        (["--gpus-per-node", "3"], {}, "3 GPUs cannot share the run"),
        (["--nodes", "0"], {}, "--nodes: 0 is not a number of machines"),
        (["--mfu", "40"], {}, "--mfu: 40.0 is not a share"),
        ([], {"models__language__source": "other/model"}, "models.language.source: the sizes of 'other/model' are not"),
        ([], {"parallel__tensor": 16, "parallel__ranks_per_node": 16}, "num_key_value_heads 8 is not a multiple of "),
        ([], {"parallel__pipeline": 3, "parallel__ranks_per_node": 12}, "num_hidden_layers 32 is not a multiple of "),
        ([], {"parallel__tensor": 3}, "is not a multiple of tensor x pipeline = 3"),
    ],
    ids=["gpu", "no-memory", "gpus", "nodes", "mfu", "sizes", "heads", "layers", "ranks"],
)
def test_refusals(run, options, changes, message):
    code, out, error = run(*options, **changes)
    assert code == 2 and out == "" and re.search(message, error), error


def test_a_gpu_may_be_stated():
    stated = resources.gpu("96:400:300")
    assert (stated.memory_bytes, stated.peak_flops, stated.link_bytes_per_second) == (96 * 2**30, 400e12, 300e9)
    assert resources.gpu("H200").peak_flops == flops.peak("NVIDIA H200", "bfloat16")


def test_where_sizes_come_from(tmp_path):
    config = settings()
    fetched = tmp_path / "results" / config.run / "sources/language"
    fetched.mkdir(parents=True)
    two_layers = resources.bases(config).configs["language"] | {"num_hidden_layers": 2}
    (fetched / "config.json").write_text(json.dumps(two_layers))
    table, found = resources.bases(config), resources.bases(config, results=tmp_path / "results")
    assert (table.language.num_layers, found.language.num_layers) == (32, 2)
    assert "table of known models" in table.found["language"] and str(fetched) in found.found["language"]
    given = resources.bases(config, language=ROOT / "resources/tiny/language", results=tmp_path / "results")
    assert "resources/tiny/language" in given.found["language"] and given.language.num_layers not in (2, 32)
    with pytest.raises(ValueError, match="there is no such file"):
        resources.bases(config, vision=tmp_path)


def test_the_miniature_has_the_sizes_of_its_folders(monkeypatch):
    """Counted against the weights in resources/tiny themselves."""
    monkeypatch.chdir(ROOT)
    content = tree()
    content["models"]["language"]["source"] = "resources/tiny/language"
    content["models"]["vision"]["source"] = "resources/tiny/vision"
    config = settings(models=content["models"])
    bases = resources.bases(config)
    stored = {}
    for part in ("language", "vision"):
        with safe_open(ROOT / f"resources/tiny/{part}/model.safetensors", "pt") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
        stored[part] = sum(math.prod(shape) for shape in shapes)
    found = storage.base_models(bases, config)
    assert {part: size // bases.stored_bytes(part) for part, size in found.items()} == stored


def test_metrics_of_a_run_give_the_efficiency(run, tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"iteration": i, "mfu": share} for i, share in enumerate((0.1, 0.41, 0.42))]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"iteration": 3, "validation_loss": 1.0}]))
    found = figures(run, "--metrics", str(path))["stages"]["sft"]
    assert found["efficiency"] == {"share": 0.41, "found": f"median of {path}"}
    stated = figures(run, "--mfu", "0.205")["stages"]["sft"]
    assert stated["compute_seconds"] == pytest.approx(2 * found["compute_seconds"])
    path.write_text('{"iteration": 1}\n')
    assert "has no line with an mfu" in run("--metrics", str(path))[2]


def test_samples_and_epochs(run, tmp_path):
    found = figures(run)["stages"]["pretrain"]
    # 16 sequences of 16 captions are about the reference's 256, whose 20,000 steps see 5,120,000.
    assert found["samples"] == pytest.approx(5_120_000, rel=0.01)
    assert found["epochs"]["pretrain"]["epochs"] == pytest.approx(found["samples"] / (558_128 * 0.99), rel=1e-3)
    written = tmp_path / "results/mistral-7b-clip-336/data/pretrain/shards.json"
    written.parent.mkdir(parents=True)
    written.write_text(json.dumps({"train": 1000, "sizes": {"a.tar": 70, "b.tar": 7}}))
    again = figures(run)
    assert again["stages"]["pretrain"]["epochs"]["pretrain"]["epochs"] == pytest.approx(found["samples"] / 1000)
    assert {"what": "data/pretrain, shards", "bytes": 77} in again["disk"]
    other = figures(run, data__sets__sft__annotations="mine.json")
    assert other["stages"]["sft"]["epochs"]["sft"]["epochs"] is None
    assert "unknown number of samples" in run(data__sets__sft__annotations="mine.json")[1]


def test_disk_of_checkpoints():
    """bfloat16 weight, fp32 master and two moments: 14 bytes of what learns. Two kept, the best, and the one being
    written."""
    found = storage.of_stage(settings(), "sft", recipe_bases())
    assert (found.each, found.number) == (14 * (7_248_023_552 + 20_979_712), 4)
    assert storage.of_stage(settings(stages__sft__keep_best=False), "sft", recipe_bases()).number == 3
    assert storage.of_stage(settings(), "pretrain", recipe_bases()).each == 14 * 20_979_712


def test_jobs_ask_for_what_the_layout_says():
    bases, gpu = recipe_bases(), resources.gpu("h100")
    sft = jobs.of_training(settings(), "sft", bases, gpu)
    assert (sft.nodes, sft.gpus_per_node) == (1, 8)
    assert sft.mem_mb * 1e6 > 2 * storage.of_stage(settings(), "sft", bases).each
    assert sft.disk_mb == pytest.approx(4 * 101_766, rel=0.01)
    longer = jobs.of_training(settings(stages__sft__iterations=40_000), "sft", bases, gpu)
    assert (
        1.9 < (longer.runtime_minutes - jobs.SETTING_UP_MINUTES) / (sft.runtime_minutes - jobs.SETTING_UP_MINUTES) < 2.1
    )
    with pytest.raises(ValueError, match="num_key_value_heads 2"):
        jobs.of_training(settings(), "sft", small_bases(), gpu)
    verify = jobs.of_conversion(settings(), "verify", bases)
    assert verify.gpus_per_node == 1 and verify.mem_mb > 60_000
    assert jobs.of_conversion(settings(), "combine", bases).disk_mb * 1e6 > 15e9
    with pytest.raises(ValueError, match="task: 'nothing' does not exist"):
        jobs.of_generation(settings(), "nothing", bases)
    assert jobs.of_generation(settings(), "captions", bases).runtime_minutes > jobs.SETTING_UP_MINUTES


def test_neither_torch_nor_numpy_is_imported():
    code = (
        "import sys, vlm.resources, vlm.estimate.command; "
        "sys.exit(bool({'torch', 'numpy', 'megatron'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
