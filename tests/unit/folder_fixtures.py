"""Hugging Face folders of base models with random weights, large enough that a misplaced one shows in every output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_fixtures import write_config, write_tokenizer
from model_fixtures import LANGUAGE, VISION

VOCABULARY = 400


def write_language(
    folder: Path,
    *,
    llama: bool = False,
    tied: bool = False,
    max_shard_size: str = "5GB",
    dtype: str = "float32",
    **changes: Any,
) -> Path:
    """Mistral with a head_dim of its own, or Llama; fewer key-value heads than heads in both, unless changed."""
    import torch
    import transformers

    kind, model = ("Llama", "LlamaForCausalLM") if llama else ("Mistral", "MistralForCausalLM")
    text = {key: value for key, value in LANGUAGE.items() if key not in ("architectures", "rope_theta")}
    text |= {"vocab_size": VOCABULARY, "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": LANGUAGE["rope_theta"]}
    if llama:
        del text["head_dim"], text["sliding_window"]
    config = getattr(transformers, f"{kind}Config")(**text | changes)
    write_tokenizer(folder)
    made = _randomise(getattr(transformers, model)(config), 1).to(getattr(torch, dtype))
    made.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def write_vision(folder: Path, *, whole: bool = False, projected: bool = False) -> Path:
    """A CLIP vision model alone, with its projection into the joint space, or in a whole CLIP with a text tower."""
    import transformers

    vision = {key: value for key, value in VISION.items() if key != "architectures"}
    if whole:
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text |= {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1}
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    else:
        kind = transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel
        model = kind(transformers.CLIPVisionConfig(**vision))
    _randomise(model, 2).save_pretrained(folder)
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder


OPENAI = {"width": 128, "mlp": 96, "layers": 3, "patch": 8, "grid": 3, "joint": 40}


def write_openai_vision(folder: Path, *, text_tower: bool = True) -> dict[str, Any]:
    """A CLIP as OpenAI's own code names it, in one safetensors file without a config.json; returns its tensors."""
    import torch
    from safetensors.torch import save_file

    width, mlp, patch = OPENAI["width"], OPENAI["mlp"], OPENAI["patch"]
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (width,),
        "positional_embedding": (OPENAI["grid"] ** 2 + 1, width),
        "conv1.weight": (width, 3, patch, patch),
        "proj": (width, OPENAI["joint"]),
    }
    norms = ["ln_pre", "ln_post"]
    for i in range(OPENAI["layers"]):
        block = f"transformer.resblocks.{i}."
        norms += [f"{block}ln_1", f"{block}ln_2"]
        linear = {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width)}
        linear |= {"mlp.c_fc.": (mlp, width), "mlp.c_proj.": (width, mlp)}
        for name, shape in linear.items():
            shapes |= {f"{block}{name}weight": shape, f"{block}{name}bias": shape[:1]}
    shapes |= {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
    generator = torch.Generator().manual_seed(4)
    tensors = {f"visual.{name}": torch.randn(shape, generator=generator) * 0.15 for name, shape in shapes.items()}
    for norm in norms:
        tensors[f"visual.{norm}.weight"] += 1
    if text_tower:
        others = {"positional_embedding": (7, 16), "text_projection": (16, 40), "token_embedding.weight": (30, 16)}
        others |= {"transformer.resblocks.0.ln_1.weight": (16,), "ln_final.bias": (16,)}
        tensors |= {name: torch.randn(shape, generator=generator) for name, shape in others.items()}
        tensors |= {"logit_scale": torch.tensor(4.6), "input_resolution": torch.tensor(24)}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "ViT-tiny.safetensors")
    return tensors


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


def make_combined(folder: Path, text: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Base models, their conversions and the combined checkpoint under one folder; returns the checkpoint.

    Args:
        text: options of `write_language`.
        changes: of the settings.
    """
    from vlm.convert import combine, language, vision

    language.convert(write_language(folder / "hub/language", **text or {}), folder / "language")
    vision.convert(write_vision(folder / "hub/vision"), folder / "vision")
    config = write_settings(folder / "config.yaml", **changes)
    combine.combine(config, folder / "language", folder / "vision", folder / "combined")
    return folder / "combined"


def names(folder: Path) -> set[str]:
    """Everything in a folder, hidden files too."""
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def change_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(read_config(folder) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write the one safetensors file of a folder again after `change` has edited its tensors."""
    from safetensors.torch import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
