"""Memory of a GPU in training, by what it holds.

Weights, gradients and optimizer state follow from the parameters (`vlm.resources.parameters`): the weights in the run's
type, and for what learns a gradient in fp32, under bfloat16 a master in fp32, and Adam's two moments in fp32. The
distributed optimizer shares masters and moments, not gradients, among the data-parallel ranks (ZeRO 1).

Activations are what autograd keeps from forward to backward. The method is that of Korthikanti et al.
(arXiv:2205.05198, section 4), the terms are those of this model: attention keeps queries, keys, values, its output and
one fp32 statistic per query and head instead of their 5 a s / h; there is no dropout, and the layer is gated; what is
frozen keeps the input of nonlinear operations alone, since no weight asks for a gradient. In elements per slot of a
sequence, D hidden, H and G query and key/value heads of K channels, F inside the MLP, t tensor-parallel ranks:

    kept by                           always                            and where the layer learns
    norms: their inputs               2 D      / t under sequence       outputs 2 D, / t under sequence
    attention                         ((H + 2 G) K + H K) / t
    SwiGLU: gate and up               2 F / t                           output F / t
    without our kernels               F / t, silu of the gate
    plain PyTorch's attention         (2 H + G) K / t, copies           H K / t
                                      (H + G) K / t where t = G

The last layer keeps what follows its attention for the trained tokens alone, except under sequence parallelism.
`recompute` keeps D per layer, and all of the above for one layer at a time. The first of p pipeline stages has p
micro-batches under way (1F1B; Narayanan et al., arXiv:2104.04473), the last one.

`working` is what backward needs besides, at its worst: in the loss, or in an MLP.

Against `max_memory_allocated` on an H200 the sum was within 0.4 % for both stages and two backends, on one rank
(tests/benches/bench_training_step.py; tests/unit/test_plan_memory.py compares them). Sharded layouts were compared with
what autograd saves on a CPU (tests/distributed/test_plan_layouts.py), not with a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from vlm.config import Config, Stage
from vlm.resources import parameters
from vlm.resources.bases import Bases
from vlm.resources.workload import Workload, of_sequence

FP32 = 4
NORM_STATISTIC = FP32
LOGIT_BYTES = {"triton": 0, "transformer_engine": 2, "torch": 10}
"""Per logit of a trained position in the loss: none are stored, the logits in bfloat16, or their softmax in fp32 and
its gradient in fp32 and bfloat16."""
ENGINE_ATTENTION_BYTES = 30
"""Per channel of a query, what Transformer Engine's attention takes backwards for packed samples: keys and values once
per query head, sums in fp32. From the peak of a pretraining step on an H200, where nothing else explains 1.2 GiB."""
EAGER_LOGIT_BYTES = 12
"""What plain PyTorch takes per logit, forward and backward: kernels/README.md, 3.00 GiB for 8192 x 32768."""


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU at the worst moment of a step, on one stage of the pipeline."""

    weights: int
    gradients: int
    masters: int
    moments: int
    activations: int
    """Of the language model's layers, all micro-batches under way."""
    image_activations: int
    """Of vision model and projector."""
    working: int
    """Temporary, in backward."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def of_training(config: Config, stage: str, bases: Bases) -> list[Memory]:
    """Memory per GPU on each stage of the pipeline, for the layout of the configuration."""
    sequence = of_sequence(config, stage, bases)
    return [on_stage(config, config.stages[stage], bases, sequence, i) for i in range(config.parallel.pipeline)]


def peak(config: Config, stage: str, bases: Bases) -> Memory:
    """Of the fullest GPU."""
    return max(of_training(config, stage, bases), key=lambda memory: memory.total)


def logits_avoided(config: Config, stage: str, bases: Bases) -> int:
    """Bytes that a head over all positions would take in plain PyTorch; this one sees trained positions alone."""
    vocabulary = bases.language.vocab_size // config.parallel.tensor
    return config.stages[stage].sequence_length * vocabulary * EAGER_LOGIT_BYTES


def on_stage(config: Config, settings: Stage, bases: Bases, sequence: Workload, index: int) -> Memory:
    """Memory per GPU of pipeline stage `index`, for packed sequences of the given content."""
    parallel, trainable = config.parallel, settings.trainable
    size = 2 if config.dtype == "bfloat16" else 4
    counts = {
        part: count.on(parallel.tensor) for part, count in parameters.of_stage(bases, config, parallel, index).items()
    }
    trained = sum(count for part, count in counts.items() if part in trainable)
    shared = -(-trained // parallel.data) if parallel.distributed_optimizer else trained
    layers = bases.language.num_layers // parallel.pipeline
    learns = "language" in trainable
    of_layer = layer(config, bases, sequence.slots, learns)
    stream = sequence.slots * bases.language.hidden_size * size // (parallel.tensor if parallel.sequence else 1)
    kept = layers * stream if parallel.recompute else layers * of_layer
    in_mlp, in_attention = _mlp(config, bases, sequence.slots, learns), 0
    if index == parallel.pipeline - 1:
        wanted = sequence.slots if parallel.sequence else int(sequence.trained_tokens)
        final = stream * wanted // sequence.slots  # the input of the final norm
        kept += final
        if wanted < sequence.slots:
            last = stream if parallel.recompute else layer(config, bases, sequence.slots, learns, wanted)
            kept += last - (stream if parallel.recompute else of_layer)
            # The largest MLP is that of the layer before, and by then the last layer has let go of what it kept. When
            # its attention comes, what followed that is gone.
            in_mlp -= last + final
            if config.kernels.backend == "transformer_engine" and not parallel.recompute:
                channels = bases.language.num_heads * bases.language.head_dim // parallel.tensor
                followed = last - layer(config, bases, sequence.slots, learns, 0)
                in_attention = sequence.slots * channels * ENGINE_ATTENTION_BYTES - followed - final
    if index == 0 and parallel.sequence:
        kept += (parallel.tensor - 1) * stream  # the first layer's shard is a view of all embeddings
    micro_batches = settings.global_batch // parallel.data
    under_way = min(parallel.pipeline - index, micro_batches)
    return Memory(
        weights=sum(counts.values()) * size,
        gradients=trained * FP32,
        masters=shared * FP32 if config.dtype == "bfloat16" else 0,
        moments=shared * 2 * FP32,
        activations=under_way * kept + (of_layer if parallel.recompute else 0),
        image_activations=0 if index else under_way * _images(config, bases, sequence, trainable),
        working=max(in_mlp, in_attention, _loss(config, bases, sequence, learns)),
    )


def layer(config: Config, bases: Bases, slots: int, learns: bool, wanted: int | None = None) -> int:
    """Bytes that one layer of the language model keeps for backward, on a rank; the last one goes on after its
    attention with the `wanted` slots alone."""
    sizes, parallel = bases.language, config.parallel
    size = 2 if config.dtype == "bfloat16" else 4
    norm = (1 + learns) * sizes.hidden_size
    heads = 2 * sizes.num_heads + 2 * sizes.num_kv_heads
    if config.kernels.backend == "torch":
        copied = sizes.num_kv_heads > parallel.tensor  # queries of a single group lie side by side as they are
        heads += (1 + copied + learns) * sizes.num_heads + sizes.num_kv_heads
    attention = heads * sizes.head_dim
    gated = (2 + learns + (config.kernels.backend != "triton")) * sizes.ffn_hidden_size
    across = parallel.tensor if parallel.sequence else 1
    before = (norm / across + attention / parallel.tensor) * size
    before += NORM_STATISTIC / across + sizes.num_heads * FP32 / parallel.tensor
    after = (norm / across + gated / parallel.tensor) * size + NORM_STATISTIC / across
    if wanted is None:
        return int(slots * (before + after))
    chosen = learns * sizes.num_heads * sizes.head_dim / parallel.tensor * size  # a copy of attention's output
    return int(slots * before + wanted * (after + chosen))


def _mlp(config: Config, bases: Bases, slots: int, learns: bool) -> int:
    """The largest of what backward through an MLP has at once beside what was kept: the gradient of the residual
    stream, and either those of SwiGLU's output and input, or that of its input, fc1's weight gradient and the gradient
    of fc1's input."""
    sizes, tensor = bases.language, config.parallel.tensor
    size = 2 if config.dtype == "bfloat16" else 4
    inside = slots * sizes.ffn_hidden_size // tensor
    stream = slots * sizes.hidden_size
    weight = 2 * sizes.ffn_hidden_size // tensor * sizes.hidden_size if learns else 0
    return size * (stream + max(3 * inside, 2 * inside + stream + weight))


def _images(config: Config, bases: Bases, sequence: Workload, trainable: tuple[str, ...]) -> int:
    """Vision model and projector, for one micro-batch; nothing where neither learns, since no graph is built."""
    vision, tensor = bases.vision, config.parallel.tensor
    size = 2 if config.dtype == "bfloat16" else 4
    if not {"vision", "projector"} & set(trainable):
        return 0
    inside = config.models.projector.hidden_size / tensor
    of_patch = vision.hidden_size + inside
    if tensor > 1 or config.kernels.backend != "triton":  # GELU's output, and the rows before they are placed
        of_patch += inside + bases.language.hidden_size
    elements = vision.num_image_tokens * of_patch
    if "vision" in trainable:
        # Norms' inputs and outputs; qkv and attention's output; fc1's output, quick GELU's sigmoid and product.
        block = 4 * vision.hidden_size + (4 * vision.hidden_size + 3 * vision.ffn_hidden_size) / tensor
        elements += (1 + vision.num_image_tokens) * vision.num_built_layers(config.models.vision.feature_layer) * block
    return int(sequence.pictures * elements * size)


def _loss(config: Config, bases: Bases, sequence: Workload, learns: bool) -> int:
    """The head's input at trained positions and its gradient, logits where a backend stores them, and the gradient of
    the head's weight."""
    size = 2 if config.dtype == "bfloat16" else 4
    width, words = bases.language.hidden_size, bases.language.vocab_size // config.parallel.tensor
    rows = sequence.trained_tokens * (2 * width * size + words * LOGIT_BYTES[config.kernels.backend])
    return int(rows + learns * words * width * size)
