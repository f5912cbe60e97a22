"""The language model: megatron-core's GPTModel with positions given per token and a head that sees only chosen rows."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from vlm.model.cache import KeyValueCache, Tokens
from vlm.model.layers import PackedSequence, rotary_table
from vlm.model.sizes import LanguageSizes
from vlm.model.specs import TorchSpecs


class LanguageModel(GPTModel):
    """A Mistral or Llama decoder.

    Shapes: B batch, S sequence, D hidden, K head dim, R chosen rows, V vocabulary.
    """

    def __init__(
        self,
        sizes: LanguageSizes,
        config: TransformerConfig,
        specs: TorchSpecs,
        *,
        pre_process: bool = True,
        post_process: bool = True,
    ) -> None:
        super().__init__(
            config,
            specs.block(config.num_layers // config.pipeline_model_parallel_size, causal=True, gated=True),
            vocab_size=sizes.vocab_size,
            max_sequence_length=sizes.max_positions,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=sizes.tied_embeddings,
            position_embedding_type="none",  # rotary_table is ours; nothing is added to the embeddings
            scatter_embedding_sequence_parallel=False,  # pictures are placed before the sequence is sharded
        )
        self.sizes = sizes
        self._specs = specs

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """Token embeddings [B, S, D]."""
        return self.embedding.word_embeddings(tokens_BS)

    def hidden(
        self,
        embeddings_SBD: Tensor | None,
        positions_BS: Tensor,
        *,
        packed: PackedSequence | None = None,
        cached: Tokens | None = None,
    ) -> Tensor:
        """Run the layers.

        Args:
            embeddings_SBD: None on a pipeline stage that receives its input.
            positions_BS: int64, for rotation only; attention follows the order of the sequence.
            packed: borders of the samples where B = 1 sequence holds many, and which rows are wanted.
            cached: in generation, where these tokens belong in a cache; see `cache`.

        Returns:
            [S, B, D], or [R, 1, D] of the wanted rows, normed on the last pipeline stage; sharded along S under
            sequence parallelism.
        """
        if embeddings_SBD is not None and self.config.sequence_parallel:
            embeddings_SBD = scatter_to_sequence_parallel_region(embeddings_SBD)
        sizes = self.sizes
        table = rotary_table(
            positions_BS, sizes.head_dim, sizes.rope_theta, self.config.params_dtype, sizes.rope_scaling
        )
        return self.decoder(
            hidden_states=embeddings_SBD,
            attention_mask=None,
            inference_context=cached,
            rotary_pos_emb=table,
            packed_seq_params=packed,
        )

    def losses(self, hidden_SBD: Tensor, rows_R: Tensor, targets_R: Tensor) -> Tensor:
        """Cross-entropy, float32 [R], of the flat rows s * B + b alone: the head never sees the others.

        Under sequence parallelism `hidden_SBD` is this rank's share of the sequence, and only the chosen rows travel.
        Otherwise it is [R, 1, D], since the last layer computed no others.
        """
        hidden_TD = hidden_SBD.flatten(0, 1)
        if self.config.sequence_parallel:
            local_R = rows_R - self.pg_collection.tp.rank() * len(hidden_TD)
            mine_R1 = ((local_R >= 0) & (local_R < len(hidden_TD))).unsqueeze(1)
            chosen_RD = hidden_TD.index_select(0, local_R.clamp(0, len(hidden_TD) - 1)) * mine_R1
            # The loss returns the complete gradient on every rank; each takes that of its own rows.
            chosen_RD = reduce_from_tensor_model_parallel_region(chosen_RD)
        else:
            chosen_RD = hidden_TD
        return self._specs.linear_cross_entropy(chosen_RD, self._head(), targets_R, group=self.pg_collection.tp)

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., D] to float32 [.., V] over the whole vocabulary, on every tensor-parallel rank."""
        parts = functional.linear(hidden, self._head())
        if self.pg_collection.tp.size() > 1:
            parts = gather_from_tensor_model_parallel_region(parts)
        return parts.float()

    def cache(self, num_samples: int, num_slots: int) -> KeyValueCache:
        """Memory for the keys and values of `num_samples` samples of at most `num_slots` tokens each."""
        config = self.config
        groups = config.num_query_groups // config.tensor_model_parallel_size
        heads = (groups, config.kv_channels)
        return KeyValueCache(config.num_layers, num_samples, num_slots, heads, config.params_dtype)

    def _head(self) -> Tensor:
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Layers by number, `decoder.layers.3.mlp...`, instead of stacked, so that names equal the parameters'."""
        return super().sharded_state_dict(prefix, sharded_offsets, numbered(metadata))


def numbered(metadata: dict[str, Any] | None) -> dict[str, Any]:
    """Checkpoint metadata under which megatron-core names every layer by its number."""
    return {**(metadata or {}), "non_homogeneous_layers": True}


def packed_sequence(cu_seqlens: Tensor, max_seqlen: int, rows: Tensor | None = None) -> PackedSequence:
    """Samples laid one after the other, of which these `rows` [R] are wanted, or all."""
    return PackedSequence(
        rows=rows,
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )
