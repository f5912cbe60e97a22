"""A whole run up to training, with models of random weights: base models, combined checkpoint, indexed data."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from data_fixtures import IMAGE_SIZE, PATCH_SIZE, SETS, write_config, write_source, write_tokenizer

OPTIMIZER = {
    "lr": 1.0e-2,
    "min_lr": 1.0e-3,
    "warmup_share": 0.2,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1.0e-8,
    "clip_grad": 1.0,
}
ITERATIONS = 10


@dataclass(frozen=True)
class Workspace:
    folder: Path

    @property
    def combined(self) -> Path:
        return self.folder / "combined"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def config(self, path: Path, **changes: Any) -> Path:
        """Settings with the stages `pretrain` (projector) and `sft` (projector and language); see `write_config`."""
        return write_config(path, **({"stages": stages(), **PROJECTOR} | changes))


PROJECTOR = {"models__projector__hidden_size": 32}


def stages() -> dict[str, Any]:
    shared = {
        "data": {"captions": 1.0, "dialogues": 3.0},
        "prompt": "instruction",
        "sequence_length": 256,
        "global_batch": 2,
        "iterations": ITERATIONS,
        "save_interval": 3,
        "log_interval": 2,
        "optimizer": OPTIMIZER,
    }
    return {
        "pretrain": shared | {"start_from": "combined", "trainable": ["projector"]},
        "sft": shared | {"start_from": "pretrain", "trainable": ["projector", "language"]},
    }


def write_language(folder: Path, *, tied: bool = False) -> Path:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=400,
        max_position_embeddings=512,
        rope_theta=1e6,
        sliding_window=None,
        tie_word_embeddings=tied,
    )
    write_tokenizer(folder)
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


def write_vision(folder: Path) -> Path:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


def make(folder: Path) -> Workspace:
    """Write everything that `vlm train` reads; takes some seconds."""
    from vlm.convert.combine import combine
    from vlm.convert.language import convert as convert_language
    from vlm.convert.vision import convert as convert_vision
    from vlm.data.index import index
    from vlm.data.shard import shard

    workspace = Workspace(folder)
    config = workspace.config(folder / "config.yaml")
    convert_language(write_language(folder / "hub/language"), folder / "language")
    convert_vision(write_vision(folder / "hub/vision"), folder / "vision")
    combine(config, folder / "language", folder / "vision", workspace.combined)
    for number, name in enumerate(SETS):
        write_source(folder / "sources" / name, 120, seed=number, text_only_share=0.3 * number, max_words=12)
        shard(config, name, folder / "sources" / name, workspace.data / name)
        index(workspace.data / name)
    return workspace


def changed(config: Path, out: Path, **changes: Any) -> Path:
    """A copy of settings with other values; keys as `stages__sft__seed`."""
    tree = yaml.safe_load(config.read_text())
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        branch = tree
        for parent in parents:
            branch = branch[parent]
        branch[leaf] = value
    out.write_text(yaml.safe_dump(tree))
    return out
