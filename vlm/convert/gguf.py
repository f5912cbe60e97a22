"""`vlm convert gguf`: a Llama-shaped GGUF file to the Hugging Face folder of a `MistralForCausalLM`.

Some weights are published only as GGUF, the format of llama.cpp. `transformers` reads it, tokenizer and chat template
included; a Llama without biases is a Mistral whose attention sees everything, so what is written is nothing special.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlm import files

MAGIC = b"GGUF"
READERS = ("gguf", "accelerate")
"""Packages that `transformers` reads GGUF files with."""
KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
"""What a Llama's configuration says that a Mistral's says too."""


def convert(source: Path, out: Path) -> None:
    """Write the model in bfloat16, with its tokenizer and its chat template.

    Args:
        source: GGUF file of a Llama architecture, quantised or not.
        out: the folder. Complete or absent; what was there before is replaced at the end.

    Raises:
        ValueError: no GGUF file, another architecture than Llama, or one with biases.
        RuntimeError: the packages that read it are not installed.
    """
    source = Path(source)
    if not source.is_file():
        raise ValueError(f"{source}: there is no such file")
    with open(source, "rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{source}: is not a GGUF file")
    if missing := [name for name in READERS if find_spec(name) is None]:
        raise RuntimeError(f"{source}: reading GGUF needs {' and '.join(missing)}; pip install 'vlm[small]'")
    import torch
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    llama = load(source)
    theirs = llama.config
    if theirs.model_type != "llama" or theirs.attention_bias or theirs.mlp_bias:
        raise ValueError(f"{source}: is a {theirs.model_type} or has biases; only a Llama without biases is a Mistral")
    config = MistralConfig(**{name: getattr(theirs, name) for name in KEPT}, sliding_window=None)
    with torch.device("meta"):
        model = MistralForCausalLM(config)
    model.load_state_dict(llama.state_dict(), strict=True, assign=True)
    model.tie_weights()
    model.generation_config = llama.generation_config
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    with files.writing(out, reads=[source]) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def load(source: Path) -> Any:
    """What `transformers` makes of a GGUF file: the model in bfloat16, its weights as ordinary tensors."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
