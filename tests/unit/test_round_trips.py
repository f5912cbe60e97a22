"""Hugging Face to Megatron and back gives every bit again, in folders that stock `transformers` loads."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from folder_fixtures import (
    OPENAI,
    make_combined,
    read_config,
    write_language,
    write_openai_vision,
    write_settings,
    write_vision,
)
from safetensors.torch import load_file
from torch.nn import functional

from vlm import checkpoint, parallel, weights
from vlm.checkpoint import Manifest, Parent, Tensors
from vlm.convert import combine, language, llava, verify, vision
from vlm.export import base
from vlm.export import llava as exports
from vlm.generate import speaker

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


def stored(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors.update(load_file(path))
    return tensors


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def loaded(kind, folder):
    """`transformers`' model of a folder, after a look at what it missed or did not know."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module")
def combined(tmp_path_factory):
    return make_combined(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_shard_size": "20KB", "dtype": "bfloat16"},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "head_dim": None},
        {"llama": True, "tied": True},
        {"llama": True, "tied": True, "rope_parameters": LLAMA3, "dtype": "float16"},
    ],
    ids=["mistral-untied", "sharded-bfloat16", "one-kv-head", "no-groups", "llama-tied", "llama-3"],
)
def test_language_models_come_back_to_the_bit(tmp_path, options):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = write_language(tmp_path / "hub", **options)
    language.convert(source, tmp_path / "megatron")
    base.export_language(tmp_path / "megatron", tmp_path / "back")
    assert_same(stored(tmp_path / "back"), stored(source))
    assert read_config(tmp_path / "back") == read_config(source)
    ours, theirs = (loaded(AutoModelForCausalLM, folder) for folder in (tmp_path / "back", source))
    tokens = torch.arange(3, 90)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    text = "the red circle"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "back", source)]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id == 2


def test_weights_trained_in_another_type_are_described_as_they_are(tmp_path, combined):
    """As after a bfloat16 run from float32 base models."""
    from transformers import AutoModelForCausalLM

    tensors = Tensors(combined.parent / "language")
    with checkpoint.writing(tmp_path / "trained") as folder:
        specs = {key: (torch.bfloat16, shape) for key, (_, shape) in tensors.specs.items()}
        checkpoint.write_tensors(folder, specs, lambda key: tensors.read(key).bfloat16())
        shutil.copytree(combined.parent / "language/huggingface", folder / "huggingface")
        tensors.links[0][1].write(folder)
    base.export_language(tmp_path / "trained", tmp_path / "back")
    wanted = {name: tensor.bfloat16() for name, tensor in stored(combined.parent / "hub/language").items()}
    assert_same(stored(tmp_path / "back"), wanted)
    assert read_config(combined.parent / "hub/language")["dtype"] == "float32"
    assert loaded(AutoModelForCausalLM, tmp_path / "back").dtype == torch.bfloat16


def test_stretched_positions_in_the_older_spelling_survive(tmp_path):
    from transformers import AutoConfig

    source = write_language(tmp_path / "hub", llama=True)
    older = {key: value for key, value in read_config(source).items() if key != "rope_parameters"}
    older |= {"rope_theta": 5e5, "rope_scaling": {key: LLAMA3[key] for key in LLAMA3 if key != "rope_theta"}}
    older["torch_dtype"] = older.pop("dtype")
    (source / "config.json").write_text(json.dumps(older))
    language.convert(source, tmp_path / "megatron")
    base.export_language(tmp_path / "megatron", tmp_path / "back")
    assert read_config(tmp_path / "back") == older
    read = [AutoConfig.from_pretrained(folder).rope_parameters for folder in (tmp_path / "back", source)]
    assert read[0] == read[1] == LLAMA3


def hidden_states(model):
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return pixels, model(pixels, output_hidden_states=True).hidden_states


@pytest.mark.parametrize(
    "options", [{}, {"projected": True}, {"whole": True}], ids=["alone", "with-projection", "with-text-tower"]
)
def test_vision_models_come_back_to_the_bit(tmp_path, options):
    from transformers import CLIPImageProcessor, CLIPVisionModel

    source = write_vision(tmp_path / "hub", **options)
    vision.convert(source, tmp_path / "megatron")
    base.export_vision(tmp_path / "megatron", tmp_path / "back")
    prefix = "vision_model."
    wanted = {prefix + name.removeprefix(prefix): tensor for name, tensor in stored(source).items()}
    others = (f"{prefix}text_", f"{prefix}visual_projection", f"{prefix}logit_scale")
    assert_same(stored(tmp_path / "back"), {n: t for n, t in wanted.items() if not n.startswith(others)})
    _, ours = hidden_states(loaded(CLIPVisionModel, tmp_path / "back"))
    _, theirs = hidden_states(CLIPVisionModel.from_pretrained(source).eval())
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert tuple(CLIPImageProcessor.from_pretrained(tmp_path / "back").image_mean) == (0.4, 0.5, 0.6)


def openai_features(tensors, pixels):
    """[B, 1 + P, D] after the last block, by PyTorch's own attention on the weights as OpenAI stores them."""
    own = {name.removeprefix("visual."): t for name, t in tensors.items() if name.startswith("visual.")}
    width = OPENAI["width"]

    def norm(x, name):
        return functional.layer_norm(x, (width,), own[f"{name}.weight"], own[f"{name}.bias"], 1e-5)

    patches = functional.conv2d(pixels, own["conv1.weight"], stride=OPENAI["patch"]).flatten(2).mT
    x = torch.cat([own["class_embedding"].expand(len(pixels), 1, -1), patches], 1) + own["positional_embedding"]
    x = norm(x, "ln_pre")
    for i in range(OPENAI["layers"]):
        name = f"transformer.resblocks.{i}."
        attention = torch.nn.MultiheadAttention(width, width // 64, batch_first=True)
        attention.load_state_dict({key: own[f"{name}attn.{key}"] for key in attention.state_dict()})
        y = norm(x, f"{name}ln_1")
        x = x + attention(y, y, y)[0]
        y = functional.linear(norm(x, f"{name}ln_2"), own[f"{name}mlp.c_fc.weight"], own[f"{name}mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y)
        x = x + functional.linear(y, own[f"{name}mlp.c_proj.weight"], own[f"{name}mlp.c_proj.bias"])
    return x


@pytest.mark.parametrize("text_tower", [True, False], ids=["whole-clip", "tower-alone"])
@pytest.mark.parametrize("described", [True, False], ids=["config.json", "sizes-from-shapes"])
def test_openais_names_become_hugging_faces(tmp_path, text_tower, described):
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    tensors = write_openai_vision(tmp_path / "openai", text_tower=text_tower)
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"image_size": 24, "patch_size": 8}
    if described:
        config = CLIPVisionConfig(**sizes, architectures=["CLIPVisionModel"])
        config.save_pretrained(tmp_path / "openai")
    vision.convert(tmp_path / "openai", tmp_path / "megatron")
    base.export_vision(tmp_path / "megatron", tmp_path / "back")
    found = stored(tmp_path / "back")
    block = "vision_model.encoder.layers.2."
    for kind in ("weight", "bias"):
        parts = [found[f"{block}self_attn.{x}_proj.{kind}"] for x in "qkv"]
        assert torch.equal(torch.cat(parts), tensors[f"visual.transformer.resblocks.2.attn.in_proj_{kind}"])
    assert torch.equal(found["vision_model.post_layernorm.bias"], tensors["visual.ln_post.bias"])
    model = loaded(CLIPVisionModel, tmp_path / "back")
    read = {key: getattr(model.config, key) for key in [*sizes, "hidden_act", "layer_norm_eps"]}
    assert read == sizes | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    pixels, states = hidden_states(model)
    torch.testing.assert_close(states[-1], openai_features(tensors, pixels), atol=1e-4, rtol=0)
    assert CLIPImageProcessor.from_pretrained(tmp_path / "back").crop_size["height"] == 24


def test_verify_reads_openais_names(tmp_path, combined):
    write_openai_vision(tmp_path / "openai")
    vision.convert(tmp_path / "openai", tmp_path / "vision")
    settings = write_settings(tmp_path / "config.yaml")
    combine.combine(settings, combined.parent / "language", tmp_path / "vision", tmp_path / "combined")
    hub = combined.parent / "hub/language"
    assert verify.verify(tmp_path / "combined", hub, tmp_path / "openai", tmp_path / "report.json") == 0


@pytest.mark.parametrize("saved_by", ["vlm", "transformers"])
def test_llava_comes_back_to_the_bit(tmp_path, combined, saved_by):
    from transformers import LlavaForConditionalGeneration

    exports.export(combined, tmp_path / "first")
    source = tmp_path / "first"
    if saved_by == "transformers":  # other names for the same weights, another spelling of the configuration
        model = loaded(LlavaForConditionalGeneration, source)
        fresh = LlavaForConditionalGeneration(model.config)
        fresh.load_state_dict(model.state_dict())
        (source / "model.safetensors").unlink()
        fresh.save_pretrained(source)
        assert "vision_tower.pre_layrnorm.bias" in stored(source)
    llava.convert(source, tmp_path / "megatron")
    tensors, before = Tensors(tmp_path / "megatron"), Tensors(combined)
    assert_same({key: tensors.read(key) for key in tensors.specs}, {key: before.read(key) for key in before.specs})
    assert {name.split("/")[0] for name in checkpoint.read_manifest(tmp_path / "megatron").sources} == {"llava"}
    exports.export(tmp_path / "megatron", tmp_path / "back")
    exports.export(combined, tmp_path / "wanted")
    assert_same(stored(tmp_path / "back"), stored(tmp_path / "wanted"))
    for name in ("chat_template.jinja", "tokenizer.json", "processor_config.json", "preprocessor_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes(), name
    if saved_by == "vlm":
        assert read_config(tmp_path / "back") == read_config(tmp_path / "wanted")


def test_half_precision_as_llava_15_has_it_comes_back_and_answers(tmp_path, combined):
    from transformers import LlavaForConditionalGeneration

    exports.export(combined, tmp_path / "first")
    loaded(LlavaForConditionalGeneration, tmp_path / "first").half().save_pretrained(tmp_path / "first")
    llava.convert(tmp_path / "first", tmp_path / "megatron")
    exports.export(tmp_path / "megatron", tmp_path / "back")
    found = stored(tmp_path / "back")
    assert_same(found, stored(tmp_path / "first"))
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    name = "vision_tower.vision_model.pre_layrnorm.weight"
    for folder in ("first", "megatron"):
        try:
            weight = speaker.load(tmp_path / folder).model.vision_model.ln_pre.weight
        finally:
            parallel.destroy()
        assert weight.dtype == torch.float32 and torch.equal(weight, found[name].float())


def test_a_tied_llama_3_is_the_same_model_everywhere(tmp_path):
    from transformers import LlavaForConditionalGeneration

    made = make_combined(tmp_path, {"llama": True, "tied": True, "rope_parameters": LLAMA3})
    hub = tmp_path / "hub"
    assert verify.verify(made, hub / "language", hub / "vision", tmp_path / "report.json") == 0
    exports.export(made, tmp_path / "llava")
    theirs = loaded(LlavaForConditionalGeneration, tmp_path / "llava")
    assert theirs.config.text_config.rope_parameters == LLAMA3
    tokens = torch.arange(3, 103)[None]
    assert weights.read_exported(tmp_path / "llava").language_config["tie_word_embeddings"] is True
    try:
        ours = speaker.load(tmp_path / "llava").model
        with torch.no_grad():
            logits = ours.logits(tokens, torch.arange(100)[None], last_only=False)
            torch.testing.assert_close(logits, theirs(input_ids=tokens).logits, atol=1e-4, rtol=0)
    finally:
        parallel.destroy()


def test_each_part_of_a_stage_comes_from_the_newest_checkpoint_that_holds_it(tmp_path, combined):
    """A stage that trained the projector holds nothing else."""
    before, parent = Tensors(combined), checkpoint.read_manifest(combined)
    projector = {k: before.read(k) + 1 for k in before.specs if k.startswith("vision_projection")}
    stage = tmp_path / "train/pretrain/checkpoints/iteration_0000004"
    with checkpoint.writing(stage) as folder:
        specs = {key: before.specs[key] for key in projector}
        checkpoint.write_tensors(folder, specs, lambda key: projector[key])
        shutil.copytree(combined / "huggingface", folder / "huggingface")
        origin = Parent(str(combined), parent.identity)
        own = {"kind": "stage", "stage": "pretrain", "iteration": 4, "parts": ("vision_projection",)}
        Manifest(**dataclasses.asdict(parent) | own | {"parent": origin}).write(folder)
    (stage.parent / "latest").write_text(stage.name)
    exports.export(tmp_path / "train/pretrain", tmp_path / "llava")
    base.export_language(tmp_path / "train/pretrain", tmp_path / "language")
    base.export_vision(tmp_path / "train/pretrain", tmp_path / "vision")
    whole, hub = stored(tmp_path / "llava"), combined.parent / "hub"
    fc2 = projector["vision_projection.encoder.linear_fc2.weight"]
    assert torch.equal(whole["multi_modal_projector.linear_2.weight"], fc2)
    assert_same(stored(tmp_path / "language"), stored(hub / "language"))
    for name, tensor in stored(hub / "language").items():
        assert torch.equal(whole[f"language_model.{name}"], tensor)
    for name, tensor in stored(hub / "vision").items():
        assert torch.equal(whole[f"vision_tower.vision_model.{name}"], tensor)
        assert torch.equal(stored(tmp_path / "vision")[f"vision_model.{name}"], tensor)
    note = json.loads((tmp_path / "llava/provenance.json").read_text())
    assert note["checkpoint"]["stage"] == "pretrain" and note["checkpoint"]["iteration"] == 4
    assert note["trained_from"] == [{"identity": parent.identity, "stage": "combined"}]
    assert note["sources"] == parent.sources
