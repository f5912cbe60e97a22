"""Exported folders are what stock `transformers` expects, and say what our model says."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from data_fixtures import IMAGE_TOKEN
from folder_fixtures import make_combined, names, write_settings
from model_fixtures import IMAGE_SIZE, NUM_PATCHES, initialize
from PIL import Image
from safetensors.torch import load_file, save_file

from vlm import checkpoint, cli, images, parallel, weights
from vlm.config import Kernels
from vlm.convert import combine
from vlm.export.base import export_language, export_vision
from vlm.export.llava import export
from vlm.prompt import Prompter

QUESTION = "the red circle is left of"


@pytest.fixture(scope="module", autouse=True)
def processes():
    initialize()
    yield
    parallel.destroy()


@pytest.fixture(scope="module")
def combined(tmp_path_factory):
    return make_combined(tmp_path_factory.mktemp("run"), models__projector__init_std=0.3)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, combined):
    out = tmp_path_factory.mktemp("exported") / "llava"
    export(combined, out)
    return out


def picture(width=40, height=31):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def messages(*, pictures=True, image=None):
    turn = [{"type": "image"} | ({"image": image} if image else {})] if pictures else []
    return [{"role": "user", "content": [*turn, {"type": "text", "text": QUESTION}]}]


def processed(folder, image):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    return processor.apply_chat_template(
        messages(image=image), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.parametrize("image_resize", ["crop", "square"])
def test_processor_makes_our_tokens_and_our_pixels(tmp_path, combined, image_resize):
    settings = write_settings(tmp_path / "config.yaml", data__image_resize=image_resize)
    combine.combine(settings, combined.parent / "language", combined.parent / "vision", tmp_path / "combined")
    export(tmp_path / "combined", tmp_path / "llava")
    inputs = processed(tmp_path / "llava", picture())
    prompter = Prompter(checkpoint.huggingface(combined, "language"), IMAGE_TOKEN, NUM_PATCHES)
    assert inputs["input_ids"][0].tolist() == prompter.generation(f"<image>\n{QUESTION}", 1)
    pixels = images.resize(picture(), IMAGE_SIZE, image_resize)
    expected = images.normalise(torch.from_numpy(pixels)[None], (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), torch.float32)
    torch.testing.assert_close(inputs["pixel_values"], expected, atol=1e-6, rtol=0)
    assert weights.read_exported(tmp_path / "llava").image_resize == image_resize


def test_text_without_a_picture_and_plain_strings_pass_the_template(exported, combined):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    original = AutoTokenizer.from_pretrained(checkpoint.huggingface(combined, "language"))
    plain = [
        {"role": "user", "content": "the 'red' {{ circle }}"},
        {"role": "assistant", "content": "is\nblue"},
        {"role": "user", "content": QUESTION},
    ]
    expected = original.apply_chat_template(plain, tokenize=False)
    assert tokenizer.apply_chat_template(plain, tokenize=False) == expected
    assert tokenizer.apply_chat_template(messages(pictures=False), tokenize=False) == f"<s>[INST] {QUESTION}[/INST]"
    with pytest.raises(Exception, match="roles must alternate"):
        tokenizer.apply_chat_template(plain[1:], tokenize=False)


def test_transformers_loads_it_and_generates_our_tokens(exported, combined):
    from transformers import LlavaForConditionalGeneration

    from vlm.model import build_from_checkpoint

    theirs, info = LlavaForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32
    inputs = processed(exported, picture())
    ours = build_from_checkpoint(combined)
    tokens_BS = inputs["input_ids"]
    pixels = torch.from_numpy(images.resize(picture(), IMAGE_SIZE, "crop"))[None]
    slots = (tokens_BS[0] == theirs.config.image_token_id).nonzero().squeeze(1)
    assert len(slots) == NUM_PATCHES
    prompt_length = tokens_BS.shape[1]
    generated = theirs.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for step in range(6):
        positions_BS = torch.arange(tokens_BS.shape[1])[None]
        logits = ours.logits(tokens_BS, positions_BS, images=pixels, image_positions=slots, last_only=False)
        if step == 0:
            with torch.no_grad():
                torch.testing.assert_close(logits, theirs(**inputs).logits, atol=1e-4, rtol=0)
        tokens_BS = torch.cat([tokens_BS, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert tokens_BS[0, prompt_length:].tolist() == generated[0, prompt_length:].tolist()
    assert len(set(generated[0, prompt_length:].tolist())) > 1
    assert theirs.generation_config.eos_token_id == 2


def test_an_exported_folder_comes_back_as_our_model(exported, combined):
    from vlm.model import Settings, build, build_from_checkpoint

    found = weights.read_exported(exported)
    assert weights.is_exported(exported) and not weights.is_exported(combined)
    assert found.models.language.image_token == IMAGE_TOKEN and found.models.vision.feature_layer == -1
    settings = Settings(found.models, Kernels(backend="torch"), found.dtype, parallel.single())
    model = build(found.language_config, found.vision_config, settings)
    weights.load_exported(model, exported)
    expected = build_from_checkpoint(combined).state_dict()
    for name, tensor in model.state_dict().items():
        if "_extra_state" not in name:
            assert torch.equal(tensor, expected[name]), name


def test_a_damaged_export_is_refused_by_name(tmp_path, exported):
    shutil.copytree(exported, tmp_path / "llava")
    path = tmp_path / "llava/model.safetensors"
    tensors = load_file(path)
    name = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        weights.load_exported(None, tmp_path / "llava")
    config = json.loads((exported / "config.json").read_text())
    (tmp_path / "llava/config.json").write_text(json.dumps(config | {"vision_feature_select_strategy": "full"}))
    with pytest.raises(ValueError, match="vision_feature_select_strategy 'full' is not supported"):
        weights.read_exported(tmp_path / "llava")


def test_what_transformers_cannot_express_is_refused(tmp_path, combined):
    settings = write_settings(tmp_path / "config.yaml", models__projector__hidden_size=80, export=False)
    combine.combine(settings, combined.parent / "language", combined.parent / "vision", tmp_path / "combined")
    with pytest.raises(ValueError, match="hidden_size: 80 cannot be exported as LLaVA: .* with --part language"):
        export(tmp_path / "combined", tmp_path / "llava")
    with pytest.raises(ValueError, match="is a language model alone; combine it first, or .* --part language"):
        export(combined.parent / "language", tmp_path / "llava")
    assert names(tmp_path) == {"config.yaml", "combined"}


def test_large_models_are_sharded_as_on_the_hub(tmp_path, combined, exported):
    from transformers import LlavaForConditionalGeneration

    export(combined, tmp_path / "llava", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "llava/model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "llava").glob("*.safetensors"))
    assert shards == [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    assert len(shards) > 5 and set(index["weight_map"].values()) == set(shards)
    whole = load_file(exported / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name in shards:
        assert sum(tensor.nbytes for tensor in load_file(tmp_path / "llava" / name).values()) <= 100_000
    theirs, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", output_loading_info=True)
    assert not any(info.values()), info
    one = LlavaForConditionalGeneration.from_pretrained(exported).state_dict()
    assert all(torch.equal(tensor, one[name]) for name, tensor in theirs.state_dict().items())


def test_the_command_writes_what_it_is_asked_for(tmp_path, combined):
    for part, kind in (("llava", "llava"), ("language", "mistral"), ("vision", "clip_vision_model")):
        assert cli.main(["export", str(combined), str(tmp_path / part), "--part", part]) == 0
        assert json.loads((tmp_path / part / "config.json").read_text())["model_type"] == kind
        assert json.loads((tmp_path / part / "provenance.json").read_text())["part"] == part


def test_a_checkpoint_of_other_settings_is_not_exported(tmp_path, combined, capsys):
    arguments = ["export", str(combined), str(tmp_path / "llava"), "--config"]
    other = write_settings(tmp_path / "config.yaml", models__vision__feature_layer=-2)
    assert cli.main([*arguments, str(other)]) == 2
    assert "models.vision.feature_layer: is -2, but the checkpoint" in capsys.readouterr().err
    assert names(tmp_path) == {"config.yaml"}
    assert cli.main([*arguments, str(write_settings(tmp_path / "config.yaml"))]) == 0


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("__0_0.distcp", 1000, r"__0_0.distcp: is truncated, 1000 of \d+ bytes are there"),
        ("__0_0.distcp", None, "__0_0.distcp: is missing, the checkpoint is not complete"),
        (".metadata", 100, ".metadata: is damaged"),
    ],
    ids=["truncated", "missing", "truncated-metadata"],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, combined, name, size, message):
    shutil.copytree(combined, tmp_path / "combined")
    if size is None:
        (tmp_path / "combined" / name).unlink()
    else:
        os.truncate(tmp_path / "combined" / name, size)
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "combined", tmp_path / "llava")
    assert names(tmp_path) == {"combined"}


def test_a_part_that_is_not_there_is_refused(tmp_path, combined):
    with pytest.raises(ValueError, match="vision: is a vision model alone, there is no language model in it"):
        export_language(combined.parent / "vision", tmp_path / "out")
    with pytest.raises(ValueError, match="language: is a language model alone, there is no vision model in it"):
        export_vision(combined.parent / "language", tmp_path / "out")


def test_bfloat16_runs_export_bfloat16(tmp_path, combined):
    settings = write_settings(tmp_path / "config.yaml", dtype="bfloat16", models__vision__feature_layer=-2)
    combine.combine(settings, combined.parent / "language", combined.parent / "vision", tmp_path / "combined")
    export(tmp_path / "combined", tmp_path / "llava")
    config = json.loads((tmp_path / "llava/config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["vision_feature_layer"] == -2
    assert {tensor.dtype for tensor in load_file(tmp_path / "llava/model.safetensors").values()} == {torch.bfloat16}
