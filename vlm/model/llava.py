"""Vision model, projector and language model as one trainable module.

Attribute names are those of Megatron-LM's LLaVAModel, so that parameters and checkpoints carry the same names.
Shapes: B batch, S sequence, T packed tokens, N pictures, P patches, D hidden, R trained positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from vlm import images as pictures
from vlm.batch import PackedBatch
from vlm.config import PARTS
from vlm.model.cache import KeyValueCache, Tokens
from vlm.model.language import LanguageModel, packed_sequence
from vlm.model.specs import TorchSpecs
from vlm.model.vision import VisionModel


class Llava(MegatronModule):
    """Build it with `vlm.model.build`.

    Args:
        vision_model, vision_projection: None on a pipeline stage after the first.
        language_model: the layers of this stage.
        specs: provider of the functions that join them.
        image_mean, image_std: pixel statistics per channel.
    """

    def __init__(
        self,
        vision_model: VisionModel | None,
        vision_projection: MultimodalProjector | None,
        language_model: LanguageModel,
        specs: TorchSpecs,
        *,
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> None:
        super().__init__(language_model.config)
        self.vision_model: VisionModel = vision_model  # type: ignore[assignment]  # read where it is there
        self.vision_projection: MultimodalProjector = vision_projection
        self.language_model = language_model
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = language_model.pre_process, language_model.post_process
        self.share_embeddings_and_output_weights = language_model.share_embeddings_and_output_weights
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self._specs = specs
        self._frozen: tuple[torch.nn.Module, ...] = ()

    @property
    def parts(self) -> dict[str, MegatronModule]:
        """The parts on this pipeline stage by the names the settings use."""
        parts = zip(PARTS, (self.vision_model, self.vision_projection, self.language_model), strict=True)
        return {name: part for name, part in parts if part is not None}

    @property
    def num_image_tokens(self) -> int:
        """Tokens per picture in the language model, P."""
        return self.vision_model.num_patches

    def forward(self, batch: PackedBatch) -> Tensor:
        """Losses of one packed sequence.

        Returns:
            float32 [R], the cross-entropy at `batch.trained_positions`, in their order; on a pipeline stage before the
            last its activations [S, 1, D], sharded along S under sequence parallelism.

        Raises:
            ValueError: pictures of another size than the vision model's, or not as many as the positions say.
        """
        rows_R = batch.trained_positions
        # Shards of a sequence cannot choose: each rank would have another number of rows.
        hidden_SBD = self.hidden(batch, rows=None if self.config.sequence_parallel else rows_R)
        if not self.post_process:
            return hidden_SBD
        return self.language_model.losses(hidden_SBD, rows_R, batch.labels_R)

    def hidden(self, batch: PackedBatch, *, cached: Tokens | None = None, rows: Tensor | None = None) -> Tensor:
        """Activations [S, 1, D] of one packed sequence after this stage's layers; `cached` if they are to be kept.

        After the last layer [R, 1, D] of these `rows` [R], if given.
        """
        embeddings_SBD = None
        if self.pre_process:
            tokens_SD = self.language_model.embed(batch.tokens_S.unsqueeze(0)).flatten(0, 1)
            embeddings_SBD = self._place(tokens_SD, batch.images, batch.image_positions).unsqueeze(1)
        return self.language_model.hidden(
            embeddings_SBD,
            batch.positions_S.unsqueeze(0),
            packed=packed_sequence(batch.cu_seqlens, batch.max_seqlen, rows),
            cached=cached,
        )

    def logits(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        *,
        images: Tensor | None = None,
        image_positions: Tensor | None = None,
        last_only: bool = True,
    ) -> Tensor:
        """Predictions of the next token from whole sequences of one length. Builds no graph and keeps nothing.

        Args:
            tokens_BS: int64.
            positions_BS: int64.
            images: uint8 [N, 3, H, W], with `image_positions`, int64 [N * P], the flat slots b * S + s.
            last_only: only the last position's logits.

        Returns:
            float32 [B, V], or [B, S, V] with last_only=False.

        Raises:
            ValueError: shapes that do not fit, or a layout that cannot generate.
        """
        self._check_layout()
        with torch.no_grad():
            embeddings = self.language_model.embed(tokens_BS)
            if images is not None and len(images):
                flat = self._place(embeddings.flatten(0, 1), images, image_positions)
                embeddings = flat.view(*tokens_BS.shape, -1)
            hidden_SBD = self.language_model.hidden(embeddings.transpose(0, 1).contiguous(), positions_BS)
            return self.language_model.logits(hidden_SBD[-1] if last_only else hidden_SBD.transpose(0, 1))

    def prefill(self, prompts: PackedBatch, tokens: Tokens) -> Tensor:
        """Logits, float32 [B, V], of what follows each of B packed prompts, whose keys and values are kept.

        Args:
            prompts: without padding at the end.
            tokens: `KeyValueCache.prompts` of their lengths.

        Raises:
            ValueError: as `logits`.
        """
        self._check_layout()
        with torch.no_grad():
            last_B = prompts.cu_seqlens[1:].long() - 1
            return self.language_model.logits(self.hidden(prompts, cached=tokens, rows=last_B).squeeze(1))

    def step(self, tokens_B: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits, float32 [B, V], of what follows one more token, int64, of every sample in the cache.

        Raises:
            ValueError: the cache is full.
        """
        with torch.no_grad():
            tokens = cache.next()
            embeddings_1BD = self.language_model.embed(tokens_B.unsqueeze(0))
            hidden_1BD = self.language_model.hidden(embeddings_1BD, tokens.positions_T.unsqueeze(1), cached=tokens)
            return self.language_model.logits(hidden_1BD[0])

    def _check_layout(self) -> None:
        if not (self.pre_process and self.post_process):
            stages = self.config.pipeline_model_parallel_size
            raise ValueError(f"parallel.pipeline: is {stages}, generation needs all layers in one stage; set it to 1")
        if self.config.sequence_parallel:
            raise ValueError("parallel.sequence: generation cannot shard single tokens; set it to false")

    def image_features(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] to the features [N, P, D_vision] that the projector reads, without the class token."""
        return self._encode(images)[:, 1:]

    def freeze(self, trainable: Iterable[str]) -> None:
        """Let the named parts learn (of vision, projector, language); the others keep their weights and eval mode."""
        wanted = set(trainable)
        if unknown := wanted - set(PARTS):
            raise ValueError(f"trainable: {sorted(unknown)} are not parts, allowed are {', '.join(PARTS)}")
        for name, part in self.parts.items():
            part.requires_grad_(name in wanted)
        self._frozen = tuple(part for name, part in self.parts.items() if name not in wanted)
        self.train(self.training)

    def train(self, mode: bool = True) -> Llava:
        super().train(mode)
        for part in self._frozen:
            part.eval()
        # megatron-core recomputes in training mode only (transformer_block.py:735), and a frozen language model passes
        # gradients on; nothing else of the block itself depends on the mode.
        self.language_model.decoder.training = mode
        return self

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Called by megatron-core's schedules with the activations of the pipeline stage before."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied embedding, whose gradients megatron-core sums over a pipeline's ends."""
        return self.language_model.shared_embedding_or_output_weight()

    def _encode(self, images: Tensor) -> Tensor:
        """Features [N, 1 + P, D_vision]; no graph where the vision model is frozen."""
        vision = self.vision_model
        expected = (3, vision.img_h, vision.img_w)
        if images.dtype != torch.uint8 or images.shape[1:] != expected:
            received = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images: expected uint8 [N, 3, {vision.img_h}, {vision.img_w}], received {received}")
        if not len(images):
            return torch.empty(
                0, vision.seq_length, vision.visual_hidden_size, dtype=vision.dtype, device=images.device
            )
        return vision(pictures.normalise(images, self.image_mean, self.image_std, vision.dtype))

    def _place(self, embeddings_TD: Tensor, images: Tensor, positions: Tensor) -> Tensor:
        """Write projected features over the embeddings at flat `positions`, in picture order.

        A batch without pictures runs the projector on no rows, so that its parameters get their (zero) gradients.
        """
        features = self._encode(images)
        encoder = self.vision_projection.encoder
        if self.config.tensor_model_parallel_size == 1:
            return self._specs.project_image_tokens(
                features,
                encoder.linear_fc1.weight,
                encoder.linear_fc2.weight,
                bias1=encoder.linear_fc1.bias,
                bias2=encoder.linear_fc2.bias,
                into=embeddings_TD,
                positions=positions,
            )
        rows = self.vision_projection(features[:, 1:].flatten(0, 1).unsqueeze(1)).squeeze(1)
        return embeddings_TD.index_copy(0, positions, rows)
