"""`vlm convert verify`: in fp32 the combined checkpoint computes what `transformers` computes from its base models.

Shapes: B batch, S sequence, N pictures, P patches, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm import checkpoint, files, parallel
from vlm import images as pictures
from vlm.checkpoint import Tensors
from vlm.checkpoint.manifest import versions
from vlm.convert.combine import image_token_id
from vlm.convert.vision import read as read_vision
from vlm.model import build_from_checkpoint
from vlm.model.sizes import LanguageSizes, language_sizes, vision_sizes
from vlm.weights import OPENAI, vision_naming, vision_table

BATCH, TEXT_TOKENS, SEED = 2, 24, 20240229
ROUNDING = 3e-5
"""Share of the largest value that may be rounding. Hidden states of SmolLM2-135M reach 26,000, and there `transformers`
itself is 1.1e-4 off its own fp64 logits, which reach 33: a tenth of what is allowed."""


def verify(checkpoint: Path, language: Path, vision: Path, out: Path, tolerance: float = 1e-4) -> int:
    """Compare language logits, vision features and combined logits on random text and pictures from a fixed seed.

    Args:
        checkpoint: a combined checkpoint.
        language, vision: Hugging Face folders of the base models.
        out: JSON report.
        tolerance: largest absolute difference allowed; ROUNDING of the largest value where that is more.

    Returns:
        0 if all three agree, 1 otherwise.

    Raises:
        ValueError: the checkpoint is not one of kind `combined`.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a text tower that is left out is no news
    parallel.initialize(parallel.single(), SEED)
    try:
        results = dict(_compare(Path(checkpoint), Path(language), Path(vision)))
    finally:
        parallel.destroy()
    worst = {name: result["max_abs_difference"] for name, result in results.items()}
    allowed = {name: max(tolerance, ROUNDING * result["max_abs_value"]) for name, result in results.items()}
    passed = all(difference <= allowed[name] for name, difference in worst.items())  # also False for NaN
    report = {"passed": passed, "tolerance": tolerance, "checks": results, "versions": versions()}
    files.write_json(Path(out), report)
    print(f"{'fp32, against transformers':<28}{'max difference':>16}{'largest value':>16}")
    for name, result in results.items():
        verdict = "" if worst[name] <= allowed[name] else f"  above {allowed[name]:g}"
        print(f"{name:<28}{result['max_abs_difference']:>16.2e}{result['max_abs_value']:>16.2f}{verdict}")
    if not passed:
        print(f"vlm: {checkpoint} does not compute what its base models compute, see {out}", file=sys.stderr)
    return 0 if passed else 1


def _compare(path: Path, language: Path, vision: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Differences by name. `transformers`' language and vision model are joined for the third, not loaded again."""
    from transformers import AutoModelForCausalLM

    path = checkpoint.resolve(path)
    manifest = checkpoint.read_manifest(path)
    if manifest.kind != "combined":
        raise ValueError(f"{path}: is a {manifest.kind} checkpoint; only the combined one equals its base models")
    sides = {part: checkpoint.huggingface(path, part) for part in ("language", "vision")}
    sizes = language_sizes(files.read_json(sides["language"] / "config.json"))
    layer = manifest.models["vision"]["feature_layer"]
    token = image_token_id(path, manifest.models["language"]["image_token"])
    generator = torch.Generator().manual_seed(SEED)
    ours = build_from_checkpoint(path, dtype="float32")
    device = next(ours.parameters()).device

    with torch.no_grad():
        text_BS = _text(sizes, token, generator).to(device)
        positions_BS = torch.arange(TEXT_TOKENS, device=device).expand(BATCH, -1)
        their_language = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32).to(device).eval()
        ours_BSV = ours.logits(text_BS, positions_BS, last_only=False)
        yield "language logits", _difference(ours_BSV, their_language(text_BS).logits)

        images = _pictures(files.read_json(sides["vision"] / "config.json"), generator).to(device)
        their_vision = _vision_model(vision).to(device).eval()
        pixels = pictures.normalise(images, ours.image_mean, ours.image_std, torch.float32)
        features_NPD = their_vision(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
        yield "vision features", _difference(ours.image_features(images), features_NPD)

        their_llava = _join(their_language, their_vision, path, layer, token, ours.num_image_tokens).to(device)
        mixed_BS, slots = _with_pictures(text_BS, token, ours.num_image_tokens)
        positions_BS = torch.arange(mixed_BS.shape[1], device=device).expand(BATCH, -1)
        ours_BSV = ours.logits(mixed_BS, positions_BS, images=images, image_positions=slots, last_only=False)
        theirs_BSV = their_llava(input_ids=mixed_BS, pixel_values=pixels).logits
        yield "combined logits", _difference(ours_BSV, theirs_BSV)


def _vision_model(folder: Path) -> Any:
    """`transformers`' model of a vision folder, in fp32.

    OpenAI's names `transformers` does not read; there each tensor is Hugging Face's, but for [q; k; v] in one.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    weights, config, table = read_vision(folder)
    if vision_naming(weights.entries)[0] is not OPENAI:
        return CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
    names = {row.ours: row.theirs for row in vision_table(config).rows}
    state: dict[str, Tensor] = {}
    for row in table.rows:
        pieces = weights.read(row.theirs[0]).float().chunk(len(names[row.ours]))
        state.update(zip(names[row.ours], pieces, strict=True))
    model = CLIPVisionModel(CLIPVisionConfig(**config))
    model.load_state_dict(state)
    return model


def _text(sizes: LanguageSizes, image_token: int, generator: torch.Generator) -> Tensor:
    """Random tokens [B, S] of the whole vocabulary but the image token."""
    tokens_BS = torch.randint(sizes.vocab_size - 1, (BATCH, TEXT_TOKENS), generator=generator)
    return tokens_BS + (tokens_BS >= image_token)


def _pictures(config: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Random pictures, uint8 [B, 3, H, W]."""
    side = vision_sizes(config).image_size
    return torch.randint(256, (BATCH, 3, side, side), generator=generator).to(torch.uint8)


def _with_pictures(text_BS: Tensor, token: int, num_image_tokens: int) -> tuple[Tensor, Tensor]:
    """A picture in the middle of each text: tokens [B, S + P] and the flat slots of the patches [B * P]."""
    before = TEXT_TOKENS // 2
    image_BP = torch.full((BATCH, num_image_tokens), token, device=text_BS.device)
    mixed_BS = torch.cat([text_BS[:, :before], image_BP, text_BS[:, before:]], dim=1)
    return mixed_BS, (mixed_BS.flatten() == token).nonzero().squeeze(1)


def _join(language: Any, vision: Any, path: Path, layer: int, token: int, num_image_tokens: int) -> Any:
    """`LlavaForConditionalGeneration` around two loaded models and our projector, without a second copy of them."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=token,
        image_seq_length=num_image_tokens,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default",
    )
    with torch.device("meta"):
        joined = LlavaForConditionalGeneration(config)
    joined.model.vision_tower = vision
    joined.model.language_model = language.model
    joined.lm_head = language.lm_head
    joined.model.multi_modal_projector = _projector(Tensors(path))
    return joined.eval()


def _projector(tensors: Tensors) -> nn.Module:
    """Our projector in plain PyTorch; `transformers`' own class cannot express every width."""
    layers: list[nn.Module] = []
    for name in ("linear_fc1", "linear_fc2"):
        weight = tensors.read(f"vision_projection.encoder.{name}.weight").float()
        bias_key = f"vision_projection.encoder.{name}.bias"
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias_key in tensors.specs)
        layer.weight = nn.Parameter(weight)
        if bias_key in tensors.specs:
            layer.bias = nn.Parameter(tensors.read(bias_key).float())
        layers.append(layer)
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


def _difference(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return {
        "max_abs_difference": float((ours.double() - theirs.double()).abs().max()),
        "max_abs_value": float(theirs.abs().max()),
    }
