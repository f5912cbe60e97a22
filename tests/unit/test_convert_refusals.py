"""Model folders that are damaged, foreign or unfitting are refused by name, and nothing is written."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from folder_fixtures import change_config, change_weights, names, write_language, write_openai_vision, write_vision
from safetensors.torch import load_file, save_file

from vlm.checkpoint import Tensors
from vlm.convert import language, vision


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_language(folder / "language")
    write_vision(folder / "vision")
    return folder


def truncated(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_shard(folder):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def sharded(folder, change):
    """The same weights in two shards, with an index that `change` edits before it is written."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half, shards = len(tensors) // 2, {}
    for number, some in enumerate((list(tensors)[:half], list(tensors)[half:]), 1):
        shards[f"model-{number:05d}-of-00002.safetensors"] = {name: tensors[name] for name in some}
    weight_map = {name: file for file, part in shards.items() for name in part}
    change(shards, weight_map)
    for file, part in shards.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


FIRST, SECOND = (f"model-{number:05d}-of-00002.safetensors" for number in (1, 2))


def with_header(folder, change):
    """The file with an edited header, its data as they were."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


def another_head(folder):
    change_weights(folder, lambda t: t["lm_head.weight"].add_(1))
    change_config(folder, tie_word_embeddings=True)


UP = "model.layers.1.mlp.up_proj.weight"
BAD_LANGUAGE = {
    "missing-weight": (lambda f: change_weights(f, lambda t: t.pop(UP)), f"{UP} is missing from model.safetensors"),
    "unexpected-weight": (
        lambda f: change_weights(f, lambda t: t.update({"model.layers.9.x": torch.zeros(2)})),
        "model.layers.9.x is unexpected",
    ),
    "shape-against-config": (
        lambda f: change_weights(f, lambda t: t.update({UP: torch.zeros(80, 48)})),
        rf"{UP} has shape \[80, 48\], config.json gives \[88, 48\] \(intermediate_size, hidden_size\)",
    ),
    "config-against-shapes": (
        lambda f: change_config(f, intermediate_size=64),
        r"gate_proj.weight has shape \[88, 48\]",
    ),
    "truncated": (truncated, "model.safetensors: is truncated"),
    "truncated-in-the-header": (lambda f: os.truncate(f / "model.safetensors", 99), "truncated inside its header"),
    "truncated-to-nothing": (lambda f: os.truncate(f / "model.safetensors", 0), "is truncated or not a safetensors"),
    "longer-than-described": (
        lambda f: os.truncate(f / "model.safetensors", (f / "model.safetensors").stat().st_size + 4),
        r"model.safetensors: is damaged, it has \d+ bytes and its header describes \d+",
    ),
    "overlapping-weights": (
        lambda f: with_header(f, lambda h: h[UP].update(data_offsets=h["lm_head.weight"]["data_offsets"])),
        "model.safetensors: is damaged, .* begins at byte",
    ),
    "shape-against-bytes": (
        lambda f: with_header(f, lambda h: h[UP].update(shape=[88, 47])),
        rf"{UP} has 16896 bytes, its shape \[88, 47\] needs 16544",
    ),
    "header-of-something-else": (
        lambda f: with_header(f, lambda h: h.update({UP: "here"})),
        "not a safetensors file \\(its header describes no tensors",
    ),
    "quantised": (
        lambda f: change_weights(f, lambda t: t.update({UP: t[UP].to(torch.int8)})),
        f"{UP} has type I8, supported are F32, BF16, F16, F64",
    ),
    "head-unlike-the-embedding-it-shares": (
        another_head,
        "lm_head.weight differs from model.embed_tokens.weight, but config.json says tie_word_embeddings: true",
    ),
    "index-names-what-its-shard-lacks": (
        lambda f: sharded(f, lambda shards, index: shards[index[UP]].pop(UP)),
        f"index.json: names {UP} in model-0000.-of-00002.safetensors, which does not hold it",
    ),
    "index-names-another-shard": (
        lambda f: sharded(f, lambda shards, index: index.update({UP: FIRST if index[UP] == SECOND else SECOND})),
        f"index.json: names {UP} in model-0000.-of-00002.safetensors, which does not hold it",
    ),
    "weight-in-two-shards": (
        lambda f: sharded(
            f, lambda shards, index: [shard.update({"twice": torch.ones(2)}) for shard in shards.values()]
        ),
        f"twice is in {FIRST} and in {SECOND}",
    ),
    "index-without-names": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        "index.json: has no weight_map",
    ),
    "two-files-without-index": (
        lambda f: (
            (f / "model.safetensors").rename(f / "a.safetensors"),
            (f / "b.safetensors").write_bytes((f / "a.safetensors").read_bytes()),
        ),
        "holds a.safetensors, b.safetensors but no model.safetensors.index.json",
    ),
    "pickle-under-the-name": (
        lambda f: torch.save({"x": torch.ones(3)}, f / "model.safetensors"),
        "model.safetensors: is a pickle, not a safetensors file; .* can run any code",
    ),
    "stretched-positions-of-another-kind": (
        lambda f: change_config(f, rope_scaling={"type": "linear", "factor": 2.0}),
        "rope_scaling.rope_type 'linear' is not supported",
    ),
    "not-safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x02" * 40), "not a safetensors file"),
    "pickle": (pickled, "pytorch_model.bin but no safetensors"),
    "missing-shard": (without_shard, "model-00001-of-00002.safetensors"),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors"),
    "no-tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
    "no-config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "hidden-size-does-not-divide": (
        lambda f: change_config(f, head_dim=None, num_attention_heads=7),
        "hidden_size 48 is not a multiple of num_attention_heads 7",
    ),
    "another-architecture": (lambda f: change_config(f, architectures=["MixtralForCausalLM"]), "MixtralForCausalLM"),
}


@pytest.mark.parametrize("case", BAD_LANGUAGE)
def test_bad_language_folder_is_refused_and_nothing_is_left(tmp_path, hub, case):
    break_it, message = BAD_LANGUAGE[case]
    shutil.copytree(hub / "language", tmp_path / "source")
    break_it(tmp_path / "source")
    before = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    with pytest.raises(ValueError, match=message):
        language.convert(tmp_path / "source", tmp_path / "out/language")
    assert names(tmp_path / "out") == set()
    assert {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()} == before


def test_bad_vision_folder_is_refused(tmp_path, hub):
    shutil.copytree(hub / "vision", tmp_path / "source")
    change_weights(tmp_path / "source", lambda t: t.pop("pre_layrnorm.bias"))
    with pytest.raises(ValueError, match="pre_layrnorm.bias is missing"):
        vision.convert(tmp_path / "source", tmp_path / "out")
    change_config(tmp_path / "source", patch_size=5)
    with pytest.raises(ValueError, match="image_size 24 is not a multiple of patch_size 5"):
        vision.convert(tmp_path / "source", tmp_path / "out")


BAD_OPENAI = {
    "missing-weight": (lambda t: t.pop("visual.ln_pre.bias"), "visual.ln_pre.bias is missing"),
    "missing-block": (
        lambda t: [t.pop(name) for name in list(t) if ".resblocks.1." in name and name.startswith("visual")],
        r"resblocks.1.attn.in_proj_bias, .* and 8 more are missing",
    ),
    "unexpected-weight": (lambda t: t.update({"visual.gate": torch.ones(2)}), "visual.gate is unexpected"),
    "misshapen": (
        lambda t: t.update({"visual.transformer.resblocks.2.attn.in_proj_bias": torch.ones(128)}),
        r"in_proj_bias has shape \[128\], config.json gives \[384\] \(3 x hidden_size\)",
    ),
    "no-square": (
        lambda t: t.update({"visual.positional_embedding": torch.ones(12, 128)}),
        "openai: without a config.json .*: 11 patch positions in visual.positional_embedding are no square",
    ),
    "a-resnet": (
        lambda t: t.update({"visual.conv1.weight": torch.ones(32)}),
        "openai: without a config.json .*, and there is no visual.conv1.weight of 4 dimensions",
    ),
    "odd-width": (
        lambda t: t.update({"visual.class_embedding": torch.ones(100)}),
        "a width of 100 is no multiple of 64, the head dim of OpenAI's CLIP",
    ),
}


@pytest.mark.parametrize("case", BAD_OPENAI)
def test_bad_openai_weights_are_refused(tmp_path, case):
    break_it, message = BAD_OPENAI[case]
    tensors = write_openai_vision(tmp_path / "openai")
    break_it(tensors)
    save_file(tensors, tmp_path / "openai/ViT-tiny.safetensors")
    with pytest.raises(ValueError, match=message):
        vision.convert(tmp_path / "openai", tmp_path / "out")
    assert names(tmp_path) == {"openai"}


def test_open_clips_unknown_activation_is_not_guessed(tmp_path):
    write_openai_vision(tmp_path / "openai")
    (tmp_path / "openai/open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match="open_clip_config.json, whose activation may be another"):
        vision.convert(tmp_path / "openai", tmp_path / "out")


def test_openais_own_file_is_refused_with_the_command_that_converts_it(tmp_path, monkeypatch):
    """TorchScript, as OpenAI publishes CLIP. The command in the message is run."""
    tensors = write_openai_vision(tmp_path / "openai")
    archive = torch.nn.Module()
    for name, tensor in tensors.items():
        module = archive
        *path, last = name.split(".")
        for step in path:
            if not hasattr(module, step):
                module.add_module(step, torch.nn.Module())
            module = getattr(module, step)
        module.register_buffer(last, tensor)
    (tmp_path / "pt").mkdir()
    torch.jit.save(torch.jit.script(archive), tmp_path / "pt/ViT-tiny.pt")
    with pytest.raises(ValueError, match="holds ViT-tiny.pt but no safetensors; .* can run any code") as refused:
        vision.convert(tmp_path / "pt", tmp_path / "out")
    with pytest.raises(ValueError, match="ViT-tiny.pt: is a pickle, which is not read; what is converted is a folder"):
        vision.convert(tmp_path / "pt/ViT-tiny.pt", tmp_path / "out")
    command = re.search(r'python -c "(.*)"', str(refused.value))[1]
    monkeypatch.chdir(tmp_path / "pt")
    exec(command, {})
    for source, out in (("pt", "out"), ("openai", "wanted")):
        vision.convert(tmp_path / source, tmp_path / out)
    found, wanted = Tensors(tmp_path / "out"), Tensors(tmp_path / "wanted")
    assert found.specs == wanted.specs
    assert all(torch.equal(found.read(key), wanted.read(key)) for key in wanted.specs)
