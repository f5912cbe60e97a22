"""Megatron-LM's rank files: written as it names and divides tensors, read back to the bit, refused by name."""

from __future__ import annotations

import argparse
import json
import os
import shutil

import pytest
import torch
from folder_fixtures import VOCABULARY, make_combined, names, write_language, write_settings
from model_fixtures import LANGUAGE, VISION

from vlm import checkpoint
from vlm.checkpoint import Tensors
from vlm.convert import combine
from vlm.convert import language as language_model
from vlm.convert.legacy import convert
from vlm.export.legacy import export
from vlm.weights import language_table, legacy, projector_table, vision_table

RANK = "iter_0000001/mp_rank_{:02d}/model_optim_rng.pt"


@pytest.fixture(scope="module")
def combined(tmp_path_factory):
    """Heads and key-value heads for four ranks; features before the last vision block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LANGUAGE, "num_key_value_heads", 4)
        patch.setitem(LANGUAGE, "num_attention_heads", 8)
        patch.setitem(VISION, "num_attention_heads", 4)
        return make_combined(tmp_path_factory.mktemp("combined"), models__vision__feature_layer=-2)


@pytest.fixture
def base(combined):
    return {"language": combined.parent / "hub/language", "vision": combined.parent / "hub/vision"}


def read(file):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, weights_only=True)


def assert_same(first, second):
    first, second = Tensors(first), Tensors(second)
    assert first.specs == second.specs
    for key in first.specs:
        assert torch.equal(first.read(key).view(torch.uint8), second.read(key).view(torch.uint8)), key


@pytest.mark.parametrize("implementation", ["transformer_engine", "local"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_there_and_back_is_bit_identical(tmp_path, combined, base, tensor, implementation):
    export(combined, tmp_path / "legacy", tensor, implementation)
    assert names(tmp_path / "legacy") == {"iter_0000001", "latest_checkpointed_iteration.txt"}
    assert (tmp_path / "legacy/latest_checkpointed_iteration.txt").read_text().strip() == "1"
    convert(tmp_path / "legacy", tmp_path / "back", **base, config=combined.parent / "config.yaml")
    assert_same(combined, tmp_path / "back")
    before, after = checkpoint.read_manifest(combined), checkpoint.read_manifest(tmp_path / "back")
    assert (after.kind, set(after.parts)) == (before.kind, set(before.parts))
    assert (after.models, after.settings) == (before.models, before.settings)
    for name in ("language/tokenizer.json", "language/config.json", "vision/preprocessor_config.json"):
        assert (tmp_path / "back/huggingface" / name).read_bytes() == (combined / "huggingface" / name).read_bytes()


@pytest.mark.parametrize("part", ["language", "vision"])
def test_a_part_alone_has_names_without_a_prefix(tmp_path, combined, base, part):
    alone = combined.parent / part
    export(alone, tmp_path / "legacy", 2)
    model = read(tmp_path / "legacy" / RANK.format(1))["model"]
    known = {"language": "embedding.word_embeddings.weight", "vision": "class_token"}
    assert known[part] in model and not any(name.startswith(legacy.PARTS) for name in model)
    convert(tmp_path / "legacy", tmp_path / "back", **{part: base[part]})
    assert_same(alone, tmp_path / "back")
    # A part of a whole LLaVA is that part.
    export(combined, tmp_path / "whole", 2)
    convert(tmp_path / "whole", tmp_path / "part", **{part: base[part]})
    assert_same(alone, tmp_path / "part")


MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "sliding_window": None,
    "vocab_size": 32768,
}
CLIP = {
    "architectures": ["CLIPVisionModel"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
}
L, V, P = "language_model.decoder.layers.31.", "vision_model.decoder.layers.23.", "vision_projection.encoder."
FOUR_RANKS = {
    "language_model.embedding.word_embeddings.weight": (8192, 4096),
    f"{L}self_attention.linear_qkv.layer_norm_weight": (4096,),
    f"{L}self_attention.linear_qkv.weight": (1536, 4096),
    f"{L}self_attention.linear_proj.weight": (4096, 1024),
    f"{L}mlp.linear_fc1.layer_norm_weight": (4096,),
    f"{L}mlp.linear_fc1.weight": (7168, 4096),
    f"{L}mlp.linear_fc2.weight": (4096, 3584),
    "language_model.decoder.final_layernorm.weight": (4096,),
    "language_model.output_layer.weight": (8192, 4096),
    "vision_model.class_token": (1, 1, 1024),
    "vision_model.position_embeddings.weight": (577, 1024),
    "vision_model.conv1.weight": (1024, 3, 14, 14),
    "vision_model.ln_pre.weight": (1024,),
    "vision_model.ln_pre.bias": (1024,),
    f"{V}self_attention.linear_qkv.layer_norm_weight": (1024,),
    f"{V}self_attention.linear_qkv.layer_norm_bias": (1024,),
    f"{V}self_attention.linear_qkv.weight": (768, 1024),
    f"{V}self_attention.linear_qkv.bias": (768,),
    f"{V}self_attention.linear_proj.weight": (1024, 256),
    f"{V}self_attention.linear_proj.bias": (1024,),
    f"{V}mlp.linear_fc1.layer_norm_weight": (1024,),
    f"{V}mlp.linear_fc1.layer_norm_bias": (1024,),
    f"{V}mlp.linear_fc1.weight": (1024, 1024),
    f"{V}mlp.linear_fc1.bias": (1024,),
    f"{V}mlp.linear_fc2.weight": (1024, 1024),
    f"{V}mlp.linear_fc2.bias": (1024,),
    f"{P}linear_fc1.weight": (3584, 1024),
    f"{P}linear_fc2.weight": (4096, 3584),
}
"""Of one of four ranks, as Megatron-LM's own conversion has Mistral-7B, ViT-L/14 at 336 px and the projector
(tools/checkpoint, examples/multimodal/model_converter/clip_converter.py); the last layers stand for all."""


def test_names_and_shapes_are_megatrons():
    tables = (language_table(MISTRAL), vision_table(CLIP), projector_table(1024, 14336, 4096, bias=False))
    rows = [row for table in tables for row in table.rows if legacy.is_taken(row.ours, 24)]
    found = {legacy.fused(row.ours): legacy.local_shape(row.ours, row.shape, 4) for row in rows}
    inner = [name for name in found if ".layers." in name and not name.startswith((L, V))]
    assert {name: shape for name, shape in found.items() if name not in inner} == FOUR_RANKS
    assert len(inner) == 31 * 6 + 23 * 12
    assert all(legacy.plain(legacy.fused(row.ours)) == row.ours for row in rows)


def test_each_rank_holds_its_share_of_every_matrix(tmp_path, combined):
    """Divided here by hand, so that a mistake made both ways shows."""
    export(combined, tmp_path / "legacy", 2)
    ranks = [read(tmp_path / "legacy" / RANK.format(rank)) for rank in (0, 1)]
    tensors = Tensors(combined)
    layer = "language_model.decoder.layers.1."
    gate, up = tensors.read(f"{layer}mlp.linear_fc1.weight").split(LANGUAGE["intermediate_size"])
    down = tensors.read(f"{layer}mlp.linear_fc2.weight")
    embedding = tensors.read("language_model.embedding.word_embeddings.weight")
    half, width = len(gate) // 2, down.shape[1] // 2
    for rank, content in enumerate(ranks):
        model = content["model"]
        mine = slice(rank * half, (rank + 1) * half)
        assert torch.equal(model[f"{layer}mlp.linear_fc1.weight"], torch.cat([gate[mine], up[mine]]))
        assert torch.equal(model[f"{layer}mlp.linear_fc2.weight"], down[:, rank * width : (rank + 1) * width])
        assert torch.equal(model["vision_model.ln_pre.bias"], tensors.read("vision_model.ln_pre.bias"))
        assert model[f"{layer}mlp.linear_fc1._extra_state"] is None
        assert not any("ln_post" in name or "vision_model.decoder.layers.2" in name for name in model)
        assert content["args"].tensor_model_parallel_size == 2 and content["checkpoint_version"] == 3.0
        assert (content["args"].padded_vocab_size, content["args"].rotary_base) == (512, 5000)
    padded = torch.cat([content["model"]["language_model.embedding.word_embeddings.weight"] for content in ranks])
    assert torch.equal(padded[:VOCABULARY], embedding) and (padded[VOCABULARY:] == embedding[-1]).all()


@pytest.mark.parametrize("positions", [8192, 64], ids=["as-megatrons", "another-length"])
def test_llama_3s_positions_are_told_to_megatron_or_refused(tmp_path, positions):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = positions
    source = write_language(tmp_path / "hub", llama=True, rope_parameters=rope, max_position_embeddings=131072)
    language_model.convert(source, tmp_path / "language")
    if positions == 8192:
        export(tmp_path / "language", tmp_path / "legacy", 1)
        arguments = read(tmp_path / "legacy" / RANK.format(0))["args"]
        assert arguments.use_rope_scaling and arguments.rope_scaling_factor == 32
    else:
        with pytest.raises(ValueError, match="original_max_positions=64.* is not Megatron-LM's, which has .*=8192"):
            export(tmp_path / "language", tmp_path / "legacy", 1)
        assert not (tmp_path / "legacy").exists()


def test_a_trained_stage_is_exported_with_what_it_inherits(tmp_path, combined, base):
    fc2 = "vision_projection.encoder.linear_fc2.weight"
    tensors, manifest = Tensors(combined), checkpoint.read_manifest(combined)
    learned = {key: spec for key, spec in tensors.specs.items() if key.startswith("vision_projection.")}
    with checkpoint.writing(tmp_path / "stage") as folder:
        checkpoint.write_tensors(folder, learned, lambda key: tensors.read(key) + 1)
        shutil.copytree(combined / "huggingface", folder / "huggingface")
        parent = checkpoint.Parent(os.path.relpath(combined, tmp_path / "stage"), manifest.identity)
        checkpoint.Manifest(
            "stage", ("vision_projection",), models=manifest.models, settings=manifest.settings, parent=parent
        ).write(folder)
    export(tmp_path / "stage", tmp_path / "legacy", 2)
    model = read(tmp_path / "legacy" / RANK.format(0))["model"]
    assert torch.equal(model[fc2], (tensors.read(fc2) + 1).chunk(2, dim=1)[0])
    assert torch.equal(model["vision_model.class_token"], tensors.read("vision_model.class_token"))
    convert(tmp_path / "legacy", tmp_path / "back", **base, config=combined.parent / "config.yaml")
    assert_same(tmp_path / "stage", tmp_path / "back")


def test_files_of_megatron_itself_are_completed_from_the_base_model(tmp_path, combined, base):
    """Its training saves no `left_out`, whole storages behind views, and `args` with an enumeration."""
    from megatron.core.transformer.enums import AttnBackend

    export(combined, tmp_path / "legacy", 2)
    for rank in (0, 1):
        file = tmp_path / "legacy" / RANK.format(rank)
        content = read(file)
        model = content["model"]
        buffer = torch.cat([tensor.flatten() for tensor in model.values() if tensor is not None])
        start = 0
        for name, tensor in model.items():
            if tensor is not None:
                model[name] = buffer[start : start + tensor.numel()].view(tensor.shape)
                start += tensor.numel()
        content["args"].attention_backend = AttnBackend.auto
        del content["left_out"], content["args"].vocab_size
        torch.save(content | {"optimizer": {"step": torch.ones(1)}}, file)
    settings = combined.parent / "config.yaml"
    convert(tmp_path / "legacy", tmp_path / "back", **base, config=settings)
    assert_same(combined, tmp_path / "back")
    bare = tmp_path / "bare"
    shutil.copytree(combined / "huggingface/vision", bare)
    with pytest.raises(ValueError, match="ln_post.*not in the files.*bare: holds neither model.safetensors"):
        convert(tmp_path / "legacy", tmp_path / "again", base["language"], bare, settings)
    assert names(tmp_path) == {"legacy", "back", "bare"}


class Harmful:
    def __reduce__(self):
        return (os.mkdir, ("harm",))


def edited(folder, change, rank=1):
    file = folder / RANK.format(rank)
    content = read(file)
    change(content)
    torch.save(content, file)


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


UP = "language_model.decoder.layers.1.mlp.linear_fc1.weight"
NORM = "vision_model.ln_pre.weight"
BOTH = range(2)


def both(change):
    return lambda folder: [edited(folder, change, rank) for rank in BOTH]


def truncated(folder):
    file = folder / RANK.format(0)
    os.truncate(file, file.stat().st_size // 2)


BAD = {
    "code-in-a-pickle": (
        lambda f: edited(f, lambda c: c.update(args=Harmful())),
        r"mp_rank_01/model_optim_rng.pt: refers to (posix|os).mkdir, refused because loading it can run any code",
    ),
    "truncated": (truncated, "mp_rank_00/model_optim_rng.pt: is truncated, or no archive"),
    "no-model": (lambda f: edited(f, lambda c: c.pop("model")), "mp_rank_01.*: holds no 'model'"),
    "missing-on-all-ranks": (both(lambda c: c["model"].pop(UP)), f"{UP} is missing"),
    "missing-on-one-rank": (
        lambda f: edited(f, lambda c: c["model"].pop(UP)),
        f"mp_rank_01.*: {UP} is not in the files of all ranks",
    ),
    "unexpected": (
        both(lambda c: c["model"].update({f"{UP}.scale": torch.ones(2)})),
        f"{UP}.scale is unexpected: config.json",
    ),
    "shape-against-config": (
        both(lambda c: c["model"].update({UP: torch.ones(80, 48)})),
        rf"{UP} has shape \[160, 48\], config.json gives \[176, 48\]",
    ),
    "ranks-of-different-shapes": (
        lambda f: edited(f, lambda c: c["model"].update({NORM: torch.ones(31)})),
        rf"mp_rank_01.*: {NORM} is torch.float32 \[31\], and torch.float32 \[32\] in mp_rank_00",
    ),
    "ranks-disagree": (
        lambda f: edited(f, lambda c: c["model"][NORM].mul_(1.001)),
        f"{NORM}: mp_rank_00 and mp_rank_01 hold different values",
    ),
    "another-number-of-ranks": (
        lambda f: shutil.rmtree(f / "iter_0000001/mp_rank_01"),
        "mp_rank_00.*: is of 2 tensor-parallel ranks, 1 are there",
    ),
    "a-gap-in-the-ranks": (rename("iter_0000001/mp_rank_01", "iter_0000001/mp_rank_02"), "expected mp_rank_00, mp_ra"),
    "pipeline": (rename("iter_0000001/mp_rank_01", "iter_0000001/mp_rank_00_001"), "only tensor parallelism"),
    "no-file": (lambda f: (f / RANK.format(1)).unlink(), "mp_rank_01/model_optim_rng.pt: is missing"),
    "tracker-of-another-iteration": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("7"),
        "names 7, but iter_0000007 holds no mp_rank_00",
    ),
    "no-files": (lambda f: [shutil.rmtree(f), f.mkdir()], r"holds no iter_\*/mp_rank_00/model_optim_rng.pt"),
    "another-model": (
        both(lambda c: [c["model"].clear(), c.pop("left_out"), c["model"].update(x=torch.ones(1))]),
        "neither those of a LLaVAModel nor of a GPTModel",
    ),
    "no-projector": (
        both(lambda c: [c["model"].pop(k) for k in list(c["model"]) if k.startswith("vision_projection")]),
        "are missing; convert the parts one by one and join them",
    ),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, combined):
    out = tmp_path_factory.mktemp("exported") / "legacy"
    export(combined, out, 2, "local")
    return out


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_and_nothing_is_left(tmp_path, monkeypatch, exported, combined, base, case):
    break_it, message = BAD[case]
    shutil.copytree(exported, tmp_path / "legacy")
    break_it(tmp_path / "legacy")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "legacy", tmp_path / "out", **base, config=combined.parent / "config.yaml")
    assert names(tmp_path) == {"legacy"}


def test_what_does_not_fit_the_command_is_refused(tmp_path, exported, combined, base):
    for options, message in (
        ({}, "name --language, --vision or both"),
        (base, "--config is missing"),
        ({"language": base["vision"]}, "tokenizer.json: is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(exported, tmp_path / "out", **options)
    settings = write_settings(tmp_path / "config.yaml", models__projector__hidden_size=80)
    with pytest.raises(ValueError, match=r"linear_fc1.weight has shape \[48, 32\], models.projector gives \[80, 32\]"):
        convert(exported, tmp_path / "out", **base, config=settings)
    assert names(tmp_path) == {"config.yaml"}


@pytest.mark.parametrize(
    "tensor, changes, message",
    [
        (8, {}, "--tensor 8: num_key_value_heads of the language model is 4, which does not divide over 8 ranks"),
        (0, {}, "--tensor 0: expected at least 1 rank"),
        (
            4,
            {"models__projector__hidden_size": 50, "export": False},
            "linear_fc1.weight: 50 of shape .* do not divide over 4",
        ),
    ],
    ids=["heads", "no-rank", "projector"],
)
def test_a_size_that_does_not_divide_is_refused(tmp_path, combined, tensor, changes, message):
    settings = write_settings(tmp_path / "config.yaml", **changes)
    combine.combine(settings, combined.parent / "language", combined.parent / "vision", tmp_path / "combined")
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "combined", tmp_path / "legacy", tensor)
    assert names(tmp_path) == {"config.yaml", "combined"}


def test_an_interrupted_export_leaves_the_old_one(tmp_path, combined, monkeypatch):
    export(combined, tmp_path / "legacy", 2)
    before = (tmp_path / "legacy" / RANK.format(0)).read_bytes()
    reads = iter(range(5))

    def fail(self, key, read=Tensors.read):
        if next(reads, None) is None:
            raise KeyboardInterrupt
        return read(self, key)

    monkeypatch.setattr(Tensors, "read", fail)
    with pytest.raises(KeyboardInterrupt):
        export(combined, tmp_path / "legacy", 1)
    assert names(tmp_path) == {"legacy"} and names(tmp_path / "legacy/iter_0000001") == {"mp_rank_00", "mp_rank_01"}
    assert (tmp_path / "legacy" / RANK.format(0)).read_bytes() == before


def test_options_of_the_other_format_are_refused(tmp_path, combined):
    from vlm import cli

    assert cli.main(["export", str(combined), str(tmp_path / "out"), "--tensor", "2"]) == 2
    arguments = ["export", str(combined), str(tmp_path / "out"), "--format", "megatron", "--tensor", "2"]
    assert cli.main(arguments) == 0
    assert json.loads((tmp_path / "out/latest_checkpointed_iteration.txt").read_text()) == 1
