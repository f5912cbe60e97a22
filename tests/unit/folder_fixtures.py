"""Hugging Face folders of base models with random weights, large enough that a misplaced one shows in every output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_fixtures import write_config, write_tokenizer
from model_fixtures import LANGUAGE, VISION

VOCABULARY = 400


def write_language(folder: Path, *, llama: bool = False, tied: bool = False, max_shard_size: str = "5GB") -> Path:
    """Mistral with a head_dim of its own, or Llama; fewer key-value heads than heads in both."""
    import transformers

    kind, model = ("Llama", "LlamaForCausalLM") if llama else ("Mistral", "MistralForCausalLM")
    text = {key: value for key, value in LANGUAGE.items() if key not in ("architectures", "rope_theta")}
    text |= {"vocab_size": VOCABULARY, "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": LANGUAGE["rope_theta"]}
    if llama:
        del text["head_dim"], text["sliding_window"]
    config = getattr(transformers, f"{kind}Config")(**text)
    write_tokenizer(folder)
    _randomise(getattr(transformers, model)(config), 1).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def write_vision(folder: Path, *, whole: bool = False) -> Path:
    """A CLIP vision model alone, or inside a whole CLIP with a text tower."""
    import transformers

    vision = {key: value for key, value in VISION.items() if key != "architectures"}
    if whole:
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text |= {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1}
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    else:
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision))
    _randomise(model, 2).save_pretrained(folder)
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder


def _randomise(model: Any, seed: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale, norm = (0.1 if parameter.dim() < 2 else 0.2), parameter.dim() == 1 and "bias" not in name
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + float(norm))
    return model


def write_settings(path: Path, **changes: Any) -> Path:
    """Resolved settings that fit these models; changes as `models__projector__bias=False`."""
    return write_config(path, **({"models__projector__hidden_size": LANGUAGE["hidden_size"]} | changes))


def make_combined(folder: Path, **changes: Any) -> Path:
    """Base models, their conversions and the combined checkpoint under one folder; returns the checkpoint."""
    from vlm.convert import combine, language, vision

    language.convert(write_language(folder / "hub/language"), folder / "language")
    vision.convert(write_vision(folder / "hub/vision"), folder / "vision")
    config = write_settings(folder / "config.yaml", **changes)
    combine.combine(config, folder / "language", folder / "vision", folder / "combined")
    return folder / "combined"


def names(folder: Path) -> set[str]:
    """Everything in a folder, hidden files too."""
    return {path.name for path in folder.iterdir()} if folder.exists() else set()
