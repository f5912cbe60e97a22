"""A model of one frozen and one trainable layer, and packed sequences with few and many trained positions.

D features, R trained positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml

from vlm import config as configuration
from vlm.batch import PackedBatch, Sample, pack

ROOT = Path(__file__).parents[2]
DIM = 6
ITERATIONS = 5
TRAINED = (1, 7, 3)  # positions of the micro-batches: a mean of means would differ


def settings(dtype: str = "float32", **optimizer):
    tree = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    tree["dtype"] = dtype
    tree["parallel"] |= {"ranks_per_node": 1, "tensor": 1}
    stage = tree["stages"]["sft"]
    stage["iterations"] = ITERATIONS
    stage["optimizer"] |= {"lr": 0.1, "min_lr": 0.01, "warmup_share": 0.4, "weight_decay": 0.5} | optimizer
    return configuration.validate(tree)


def toy(dtype=torch.float32):
    from megatron.core.enums import ModelType
    from megatron.core.transformer import MegatronModule, TransformerConfig

    class Toy(MegatronModule):
        """A frozen and a trainable layer; tokens choose the rows of a fixed table of inputs."""

        def __init__(self):
            super().__init__(
                TransformerConfig(
                    num_layers=1,
                    hidden_size=DIM,
                    num_attention_heads=1,
                    use_cpu_initialization=True,
                    bf16=dtype == torch.bfloat16,
                    params_dtype=dtype,
                )
            )
            self.model_type = ModelType.encoder_or_decoder
            generator = torch.Generator().manual_seed(3)
            self.table_VD = torch.randn(16, DIM, generator=generator).to(dtype)
            self.frozen = torch.nn.Linear(DIM, DIM, dtype=dtype).requires_grad_(False)
            self.trained = torch.nn.Linear(DIM, 4, dtype=dtype)

        def set_input_tensor(self, tensor):
            pass

        def forward(self, batch: PackedBatch) -> torch.Tensor:
            rows_RD = self.table_VD[batch.tokens_S[batch.trained_positions]]
            out = self.trained(torch.tanh(self.frozen(rows_RD))).float()
            labels_R = batch.labels_R % 4
            return torch.nn.functional.cross_entropy(out, labels_R, reduction="none")

    torch.manual_seed(2)
    return Toy()


def batches(seed: int = 0) -> Iterator[PackedBatch]:
    generator = np.random.default_rng(seed)
    while True:
        for trained in TRAINED:
            tokens = generator.integers(1, 16, 12)
            mask = np.zeros(12, bool)
            mask[1 : 1 + trained] = True
            sample = Sample(tokens, mask, np.zeros(0, np.int64))
            yield pack([sample], [], [f"set/{generator.integers(1000)}"], 14, 8)
