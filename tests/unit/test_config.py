"""The configuration refuses what would fail later, names the key, and survives being written and read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm.config import dump, load, validate

ROOT = Path(__file__).resolve().parents[2]


def merged(*overlays: str) -> dict[str, Any]:
    """config/config.yaml under overlays of config/, merged key by key as Snakemake does."""

    def update(tree: dict[str, Any], over: dict[str, Any]) -> None:
        for key, value in over.items():
            if isinstance(value, dict) and isinstance(tree.get(key), dict):
                update(tree[key], value)
            else:
                tree[key] = value

    tree: dict[str, Any] = {}
    for name in ("config", *overlays):
        update(tree, yaml.safe_load((ROOT / f"config/{name}.yaml").read_text()))
    return tree


def changed(key: str, value: Any) -> dict[str, Any]:
    """The full recipe with one key (`a.b.c`) set; None removes it."""
    tree = copy.deepcopy(merged())
    *path, last = key.split(".")
    branch = tree
    for step in path:
        branch = branch[step]
    if value is None:
        del branch[last]
    else:
        branch[last] = value
    return tree


@pytest.mark.parametrize("overlay", ["tiny", "small", "nvidia_projector"])
def test_every_overlay_of_the_repository_is_valid(overlay: str) -> None:
    config = validate(merged(overlay))
    assert config.run != validate(merged()).run, "two recipes would share a folder"


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    config = validate(merged("tiny"))
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config


def test_the_full_recipe_says_every_key_itself() -> None:
    """It is the manual: a setting that only has a default in the code would not be in it."""
    config = validate(merged())
    assert config.model_dump(exclude_unset=True) == config.model_dump(exclude={"miniature"})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        pytest.param("seeed", 1, ["seeed", "did you mean 'seed'"], id="misspelt-top"),
        pytest.param("stages.sft.optimizer.lrr", 1, ["stages.sft.optimizer.lrr", "'lr'", "min_lr"], id="misspelt-deep"),
        pytest.param("data.sets.sft.shards", 1, ["data.sets.sft.shards", "samples_per_shard"], id="misspelt-in-a-set"),
        pytest.param("models.vision.feature_layer", None, ["models.vision.feature_layer: is missing"], id="missing"),
        pytest.param("stages.sft.optimizer.lr", "fast", ["stages.sft.optimizer.lr", "'fast'"], id="wrong-kind"),
        pytest.param("stages.sft.optimizer.min_lr", 1.0, ["stages.sft.optimizer: min_lr 1.0"], id="min-lr-above-lr"),
        pytest.param("kernels.backend", "cuda", ["kernels.backend", "triton"], id="no-such-backend"),
        pytest.param("run", "../other", ["run", "../other"], id="run-outside-results"),
        pytest.param("stages.sft.start_from", "pretrian", ["stages.sft.start_from", "'pretrain'"], id="no-such-stage"),
        pytest.param("stages.pretrain.start_from", "sft", ["start_from", "circle"], id="stages-in-a-circle"),
        pytest.param("stages.sft.data", {"sfd": 1}, ["stages.sft.data", "'sft'"], id="no-such-set"),
        pytest.param("stages.sft.global_batch", 31, ["stages.sft.global_batch: 31", "2"], id="batch-over-ranks"),
        pytest.param("stages.sft.save_interval", 750, ["stages.sft: keep_best", "750", "500"], id="best-not-validated"),
        pytest.param(
            "stages.sft.validation_interval", 0, ["stages.sft: keep_best", "which is 0"], id="best-of-no-validation"
        ),
        pytest.param("stages.sft.trainable", [], ["stages.sft.trainable"], id="nothing-to-train"),
        pytest.param("parallel.tensor", 3, ["parallel", "tensor x pipeline = 3"], id="tensor-over-ranks"),
        pytest.param("parallel.sequence", "yes please", ["parallel.sequence"], id="not-a-truth-value"),
        pytest.param("parallel.pipeline", 3, ["= 8 is not", "tensor x pipeline = 12"], id="pipeline-over-ranks"),
        pytest.param(
            "models.projector.hidden_size",
            4098,
            ["models.projector.hidden_size: 4098", "parallel.tensor 4"],
            id="projector-over-tensor",
        ),
        pytest.param(
            "parallel",
            merged()["parallel"] | {"tensor": 1, "sequence": True},
            ["parallel: sequence: true needs tensor > 1, which is 1"],
            id="sequence-of-one",
        ),
    ],
)
def test_a_mistake_is_refused_with_its_key(key: str, value: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        validate(changed(key, value))
    for word in words:
        assert word in str(refusal.value)


def test_a_vision_model_of_the_runs_own_needs_its_training() -> None:
    with pytest.raises(ValueError, match="models.vision.source: miniature needs miniature.vision"):
        validate(changed("models.vision.source", "miniature"))
    tree = merged("small")
    tree["miniature"]["vision"]["num_heads"] = 5
    with pytest.raises(ValueError, match="miniature.vision: hidden_size 384 is not a multiple of num_heads 5"):
        validate(tree)


def test_what_reads_the_validation_loss_needs_one() -> None:
    tree = changed("stages.sft.early_stop", 3)
    tree["stages"]["sft"] |= {"validation_interval": 0, "keep_best": False}
    with pytest.raises(ValueError, match=r"stages\.sft: early_stop: 3 needs a validation_interval above 0"):
        validate(tree)
    tree["stages"]["sft"]["early_stop"] = None
    validate(tree)
    for_nothing = changed("data.sets.sft.validation_share", 0)
    with pytest.raises(ValueError, match=r"stages\.sft\.validation_interval: 500 .* is 0 in data\.sets\.sft"):
        validate(for_nothing)


def test_all_mistakes_are_named_at_once() -> None:
    tree = changed("seeed", 1)
    tree["stages"]["sft"]["iterations"] = 0
    with pytest.raises(ValueError, match="2 mistake") as refusal:
        validate(tree)
    assert "seeed" in str(refusal.value) and "stages.sft.iterations" in str(refusal.value)


def test_an_overlay_by_itself_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seed: is missing[\s\S]*an overlay by itself\? .* results/{run}/config.yaml"):
        load(ROOT / "config/small.yaml")
    mistaken = tmp_path / "config.yaml"
    mistaken.write_text(yaml.safe_dump(merged("tiny") | {"sed": 1}))
    with pytest.raises(ValueError, match="sed") as refused:
        load(mistaken)
    assert "an overlay by itself" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a list\n", "expected a mapping of settings, found list"),
        (b"seed: 1\n\tname: x\n", r"is not YAML: [\s\S]*line 2, column 1"),
        (b"\x9d\xff", "is not YAML: .*invalid start byte"),
        (None, "cannot be read: No such file or directory"),
    ],
    ids=["list", "tab", "binary", "missing"],
)
def test_a_file_without_settings_is_refused_by_name(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.yaml: {message}"):
        load(path)


def test_the_lineage_of_a_stage() -> None:
    config = validate(merged())
    assert config.lineage("sft") == ["pretrain", "sft"]
    assert (config.parallel.world_size, config.parallel.data) == (8, 2)
