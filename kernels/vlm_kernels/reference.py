"""Every kernel's plain twin: the same name, signature and result in ordinary PyTorch, on any device.

The `torch` backend trains with these, tests and benches measure against them.

Shapes: B batch, S sequence, T packed tokens, H query heads, G key/value heads, K head dim, N pictures, P patches,
D hidden, F projector hidden, V vocabulary on this rank, R rows that may be trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

Group = Any  # torch.distributed.ProcessGroup, absent from builds without distributed


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    key_ranges: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v per head, query head h reading key/value head h * G // H (grouped-query attention).

    Args:
        q: [S, B, H, K], or packed [T, H, K] with `cu_seqlens`. Or with its heads by group, as [S, B, G, H / G, K] or
            [T, G, H / G, K].
        k, v: [S', B, G, K], or [T, G, K]; H is a multiple of G. `causal` needs S' = S.
        causal: query i of a sequence sees its keys 0..i only.
        cu_seqlens: int32 [n + 1] from 0 to T; tokens attend within [cu_seqlens[i], cu_seqlens[i + 1]) only.
        max_seqlen: upper bound on the segments' lengths; only checked.
        softmax_scale: positive, default K ** -0.5.
        key_ranges: int32 [B, 2], without `causal` and `cu_seqlens`: sample b sees keys key_ranges[b, 0] up to, not
            including, key_ranges[b, 1], as in a cache of prompts of unequal lengths. An empty range gives 0.

    Returns:
        [S, B, H, K] or [T, H, K].

    Raises:
        ValueError: naming the argument and its shape.
    """
    check_attention(q, k, v, causal, cu_seqlens, max_seqlen, softmax_scale, key_ranges)
    if q.dim() > k.dim():
        q = q.flatten(-3, -2)
    if cu_seqlens is None:
        heads = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        return _batched(heads, causal, softmax_scale, key_ranges).permute(2, 0, 1, 3)
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    # One call per segment: on a CPU core it beats padding similar segments into one call (12 segments of about 85
    # tokens, H=4, K=32, forward and backward: 3.4 ms against 6.5 ms).
    segments = zip(*(x.unsqueeze(0).transpose(1, 2).split(lengths, dim=2) for x in (q, k, v)), strict=True)
    out = [_batched(segment, causal, softmax_scale) for segment in segments]
    return torch.cat(out, dim=2).squeeze(0).transpose(0, 1)


def _batched(heads: Iterable[Tensor], causal: bool, scale: float | None, ranges: Tensor | None = None) -> Tensor:
    """PyTorch's attention of q, k, v [B, H, S, K]."""
    q, k, v = heads
    mask = None
    if ranges is not None:
        index = torch.arange(k.shape[2], device=k.device)
        mask = ((index >= ranges[:, :1]) & (index < ranges[:, 1:]))[:, None, None]  # [B, 1, 1, S']
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    softmax_scale: float | None,
    key_ranges: Tensor | None,
) -> None:
    """ValueError, naming the argument and what was received, for what neither twin nor kernel can compute."""
    dims = 3 if cu_seqlens is not None else 4
    layout = "[T, H, K] with cu_seqlens" if cu_seqlens is not None else "[S, B, H, K]"
    shape = tuple(q.shape)
    if q.dim() == dims + 1 and k.dim() == dims and shape[-3] == k.shape[-2]:  # heads by group
        shape = (*shape[:-3], shape[-3] * shape[-2], shape[-1])
    for name, x in (("q", shape), ("k", tuple(k.shape)), ("v", tuple(v.shape))):
        if len(x) != dims:
            raise ValueError(f"{name}: expected {layout}, received {tuple(q.shape) if name == 'q' else x}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: {x.dtype} on {x.device} differs from q, {q.dtype} on {q.device}")
    if k.shape != v.shape:
        raise ValueError(f"v: shape {tuple(v.shape)} differs from k {tuple(k.shape)}")
    if shape[-1] != k.shape[-1] or k.shape[-2] == 0 or shape[-2] % k.shape[-2]:
        raise ValueError(
            f"k: {tuple(k.shape)} must have the head dim of q {shape} and a number of heads that divides its"
        )
    if shape[1:-2] != k.shape[1:-2] or ((causal or cu_seqlens is not None) and shape[0] != k.shape[0]):
        raise ValueError(f"k: {tuple(k.shape)} does not match the tokens of q {shape}")
    if k.shape[0] == 0 < shape[0]:
        raise ValueError(f"k: no keys for the queries {shape}, received {tuple(k.shape)}")
    if softmax_scale is not None and not 0.0 < softmax_scale < float("inf"):
        raise ValueError(f"softmax_scale: must be positive and finite, received {softmax_scale}")
    if cu_seqlens is not None:
        _check_integers("cu_seqlens", cu_seqlens, q, cu_seqlens.dim() == 1 and len(cu_seqlens) > 1, "[n + 1]")
        _check_borders(cu_seqlens, q.shape[0], max_seqlen)
    if key_ranges is not None:
        if causal or cu_seqlens is not None:
            raise ValueError("key_ranges: cannot be combined with causal or cu_seqlens")
        _check_integers("key_ranges", key_ranges, q, key_ranges.shape == (q.shape[1], 2), f"[{q.shape[1]}, 2]")
        _check_ranges(key_ranges, k.shape[0])


# What was already read from the device, by tensor: every layer of a step passes the same borders.
_seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


# What the host was told about tensors on a GPU, by tensor.
_told: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def known_on_host(x: Tensor, values: Tensor) -> None:
    """Tell that x was copied from `values`, so that functions which check x's values need not wait for its device.

    It holds until x is changed in place; `values`, on the CPU, must stay as it is for as long as x lives.

    Raises:
        ValueError: the two cannot be copies of each other.
    """
    if values.device.type != "cpu" or values.shape != x.shape or values.dtype != x.dtype:
        raise ValueError(
            f"values: expected {x.dtype} {tuple(x.shape)} on the cpu, "
            f"received {values.dtype} {tuple(values.shape)} on {values.device}"
        )
    if x.device.type != "cpu" and not x.is_inference():
        _told[x] = (x._version, values)


def values_of(x: Tensor) -> list[Any]:
    """The tensor's values, waiting for its device once per tensor and in-place change, or not at all if told."""
    return _summarised(x, "values", lambda values: values)


def _summarised(x: Tensor, key: object, summary: Callable[[Tensor], Tensor]) -> list[Any]:
    """The values of summary(x), waiting for x's device once per tensor, in-place change and key, or not if told."""
    if x.is_inference():  # it does not count its changes
        return summary(x).tolist()
    known = _seen.get(x)
    if known is None or known[0] != (x._version, key):
        version, values = _told.get(x, (None, x))
        known = _seen[x] = ((x._version, key), summary(values if version == x._version else x).tolist())
    return known[1]


def _check_integers(name: str, x: Tensor, q: Tensor, fits: bool, shape: str) -> None:
    if x.dtype != torch.int32 or x.device != q.device or not fits or not x.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous int32 {shape} on {q.device}, "
            f"received {x.dtype} {tuple(x.shape)} on {x.device}"
        )


def _check_borders(cu_seqlens: Tensor, num_tokens: int, max_seqlen: int | None) -> None:
    borders = values_of(cu_seqlens)
    lengths = [b - a for a, b in itertools.pairwise(borders)]
    if borders[0] != 0:
        raise ValueError(f"cu_seqlens: must start at 0, received {_short(borders)}")
    if borders[-1] != num_tokens:
        raise ValueError(f"cu_seqlens: its segments hold {borders[-1]} tokens, q has {num_tokens}")
    if min(lengths) < 0:
        raise ValueError(f"cu_seqlens: must not decrease, received {_short(borders)}")
    if max_seqlen is not None and max(lengths) > max_seqlen:
        raise ValueError(f"max_seqlen: received {max_seqlen}, the longest segment of cu_seqlens has {max(lengths)}")


def _check_ranges(key_ranges: Tensor, num_keys: int) -> None:
    for sample, (low, high) in enumerate(values_of(key_ranges)):
        if not 0 <= low <= high <= num_keys:
            raise ValueError(f"key_ranges: sample {sample} has [{low}, {high}), which is not within {num_keys} keys")


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 16 else f"{values[:8]} .. {values[-8:]}"


def project_image_tokens(
    features: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    *,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str | Callable[[Tensor], Tensor] = "gelu",
    into: Tensor,
    positions: Tensor,
    group: Group | None = None,
) -> Tensor:
    """Two-layer projector whose rows replace the token embeddings at `positions`.

    Args:
        features: [N, 1 + P, D_vision] of the vision model, class token first; it is dropped.
        fc1: [F, D_vision], with `group` this rank's rows. fc2: [D, F], with `group` this rank's columns.
        bias1: [F], split like fc1. bias2: [D], whole.
        activation: "gelu" (exact, by erf), "gelu_tanh", or a function.
        into: [T, D] token embeddings; not modified.
        positions: int64 [N * P], rows of `into` in picture order, each at most once.
        group: tensor-parallel process group, None for one rank. All but the weights and bias1 is equal on its ranks.

    Returns:
        [T, D], differentiable in features, weights, biases and `into`.

    Raises:
        ValueError: naming the argument and what was received.
    """
    check_project_image_tokens(features, fc1, fc2, bias1, bias2, into, positions)
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected a function or one of {list(ACTIVATIONS)}, received {activation!r}")
        activation = ACTIVATIONS[activation]
    if _parallel(group):
        features = _ReduceGradient.apply(features, group)
    hidden = activation(functional.linear(features[:, 1:].flatten(0, 1), fc1, bias1))
    if not _parallel(group):
        return into.index_copy(0, positions, functional.linear(hidden, fc2, bias2))
    rows = _Reduce.apply(functional.linear(hidden, fc2), group)
    return into.index_copy(0, positions, rows if bias2 is None else rows + bias2)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def check_project_image_tokens(
    features: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    bias1: Tensor | None,
    bias2: Tensor | None,
    into: Tensor,
    positions: Tensor,
) -> None:
    """ValueError, naming the argument and what was received, for what neither twin nor kernel can compute."""
    if fc1.dim() != 2:
        raise ValueError(f"fc1: expected [F, D_vision], received {tuple(fc1.shape)}")
    if features.dim() != 3 or features.shape[1] == 0 or features.shape[-1] != fc1.shape[-1]:
        raise ValueError(f"features: expected [N, 1 + P, {fc1.shape[-1]}], received {tuple(features.shape)}")
    if fc2.dim() != 2 or fc2.shape[1] != fc1.shape[0]:
        raise ValueError(f"fc2: expected [D, {fc1.shape[0]}] after fc1 {tuple(fc1.shape)}, received {tuple(fc2.shape)}")
    if into.dim() != 2 or into.shape[1] != fc2.shape[0]:
        raise ValueError(f"into: expected [T, {fc2.shape[0]}] for fc2 {tuple(fc2.shape)}, received {tuple(into.shape)}")
    for name, bias, weight in (("bias1", bias1, fc1), ("bias2", bias2, fc2)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}: expected [{weight.shape[0]}], received {tuple(bias.shape)}")
    for name, x in (("fc1", fc1), ("fc2", fc2), ("bias1", bias1), ("bias2", bias2), ("into", into)):
        if x is not None and (x.dtype != features.dtype or x.device != features.device):
            wanted = f"{features.dtype} on {features.device}"
            raise ValueError(f"{name}: {x.dtype} on {x.device} differs from features, {wanted}")
    rows = features.shape[0] * (features.shape[1] - 1)
    if positions.shape != (rows,):
        raise ValueError(
            f"positions: expected [{rows}] for features {tuple(features.shape)}, received {tuple(positions.shape)}"
        )
    if positions.dtype != torch.int64 or positions.device != into.device:
        raise ValueError(
            f"positions: expected int64 on {into.device}, received {positions.dtype} on {positions.device}"
        )
    if rows:
        _check_positions(positions, len(into))


def _check_positions(positions: Tensor, num_tokens: int) -> None:
    def summary(values: Tensor) -> Tensor:
        ends = torch.stack(values.aminmax())
        taken = values.new_zeros(max(num_tokens, 1)).index_fill_(0, values.clamp(0, max(num_tokens - 1, 0)), 1)
        return torch.cat([ends, taken.sum(0, keepdim=True)])

    low, high, different = _summarised(positions, ("positions", num_tokens), summary)
    if low < 0 or high >= num_tokens:
        raise ValueError(f"positions: received {low} .. {high}, into has the rows 0 .. {num_tokens - 1}")
    if different != len(positions):
        raise ValueError(f"positions: each may appear once, received {len(positions)} with {different} different ones")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, group: Group | None = None, ignore_index: int = -100
) -> Tensor:
    """Loss of the language-model head, logsumexp(h W^T) - (h W^T)[target], row by row.

    Args:
        hidden: [R, D], equal on all ranks of `group`; so is its gradient.
        weight: [V, D], this rank's slice of the vocabulary, in rank order.
        target: int64 [R], indices into the whole vocabulary; `ignore_index` rows give 0 and no gradient.
        group: tensor-parallel process group, None for one rank.

    Returns:
        float32 [R].

    Raises:
        ValueError: naming the argument and what was received; also for a target outside the vocabulary.
    """
    check_linear_cross_entropy(hidden, weight, target, group, ignore_index)
    if _parallel(group):
        hidden = _ReduceGradient.apply(hidden, group)
    return vocab_parallel_cross_entropy(
        functional.linear(hidden, weight), target, group=group, ignore_index=ignore_index
    )


def vocab_parallel_cross_entropy(
    logits: Tensor, target: Tensor, *, group: Group | None = None, ignore_index: int = -100
) -> Tensor:
    """Cross-entropy from logits whose vocabulary is split over `group`.

    Args:
        logits: [R, V], this rank's slice. Not modified.
        target: int64 [R], indices into the whole vocabulary; `ignore_index` rows give 0 and no gradient.
        group: tensor-parallel process group, None for one rank.

    Returns:
        float32 [R], equal on all ranks.

    Raises:
        ValueError: naming the argument and what was received; also for a target outside the vocabulary.
    """
    check_vocab_parallel_cross_entropy(logits, target, group, ignore_index)
    if not _parallel(group):
        return functional.cross_entropy(logits.float(), target, ignore_index=ignore_index, reduction="none")
    return _VocabParallelCrossEntropy.apply(logits, target, group, ignore_index)


def check_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, group: Group | None, ignore_index: int
) -> int:
    """The number of rows that count; ValueError, naming the argument, for what cannot be computed."""
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight: expected [V, D], received {tuple(weight.shape)}")
    if hidden.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden: expected [R, {weight.shape[-1]}], received {tuple(hidden.shape)}")
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise ValueError(
            f"weight: {weight.dtype} on {weight.device} differs from hidden, {hidden.dtype} on {hidden.device}"
        )
    return _check_targets("hidden", hidden, target, weight.shape[0], group, ignore_index)


def check_vocab_parallel_cross_entropy(logits: Tensor, target: Tensor, group: Group | None, ignore_index: int) -> int:
    """The number of rows that count; ValueError, naming the argument, for what cannot be computed."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected [R, V], received {tuple(logits.shape)}")
    return _check_targets("logits", logits, target, logits.shape[1], group, ignore_index)


def _check_targets(name: str, x: Tensor, target: Tensor, width: int, group: Group | None, ignore_index: int) -> int:
    if target.shape != x.shape[:1]:
        raise ValueError(f"target: expected [{len(x)}] for {name} {tuple(x.shape)}, received {tuple(target.shape)}")
    if target.dtype != torch.int64 or target.device != x.device:
        raise ValueError(f"target: expected int64 on {x.device}, received {target.dtype} on {target.device}")
    if not len(target):
        return 0

    def summary(values: Tensor) -> Tensor:
        kept = values != ignore_index
        return torch.stack([*values.masked_fill(~kept, 0).aminmax(), kept.sum()])

    low, high, num_kept = _summarised(target, ("targets", ignore_index), summary)
    num_words = width * (group.size() if group is not None else 1)
    if low < 0 or high >= num_words:
        wrong = low if low < 0 else high
        raise ValueError(
            f"target: received {wrong}, the vocabulary has {num_words} entries and ignore_index is {ignore_index}"
        )
    return num_kept


def reduce_maxima(top: Tensor, width: int, group: Group) -> Tensor:
    """Maximum over the group of top, float32 [R]. The slices' widths travel in the same message.

    Raises:
        ValueError: the widths differ, though a rank's first entry of the vocabulary is rank * width. A rank looks, and
            waits for the device, only when its own width is new.
    """
    sent = top.new_empty(len(top) + 2)
    sent[:-2] = top
    sent[-2].fill_(width)
    sent[-1].fill_(-width)
    torch.distributed.all_reduce(sent, op=torch.distributed.ReduceOp.MAX, group=group)
    known = _widths.setdefault(group, set())
    if width not in known:
        high, low = (int(x) for x in sent[-2:].tolist())
        if high != -low:
            raise ValueError(f"group: its ranks hold {-low} to {high} entries of the vocabulary, this one {width}")
        known.add(width)
    return sent[:-2]


_widths: WeakKeyDictionary = WeakKeyDictionary()  # widths found equal, by group


def _parallel(group: Group | None) -> bool:
    return group is not None and group.size() > 1


class _ReduceGradient(torch.autograd.Function):
    """Identity whose gradient is summed over the group: each rank's slice of a weight adds its share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # it may be another consumer's, too
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Reduce(torch.autograd.Function):
    """Sum over the group, whose gradient is that of every term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Two all-reduces of O(R): the maximum, then the sum of exponentials beside the target's logit."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: Group, ignore_index: int) -> Tensor:
        x = logits.float()
        size = x.shape[1]
        top = reduce_maxima(x.max(dim=1).values, size, group)
        local = target - group.rank() * size
        mine = (local >= 0) & (local < size) & (target != ignore_index)
        column = local.clamp(0, size - 1).unsqueeze(1)
        shifted = x - top.unsqueeze(1)
        picked = shifted.gather(1, column).squeeze(1).masked_fill(~mine, 0.0)
        exponentials = shifted.exp_()
        sums = torch.stack([exponentials.sum(dim=1), picked])
        torch.distributed.all_reduce(sums, group=group)
        kept = target != ignore_index
        ctx.save_for_backward(exponentials.div_(sums[0].unsqueeze(1)), column, mine, kept)
        ctx.dtype = logits.dtype
        return (sums[0].log() - sums[1]).masked_fill(~kept, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, column, mine, kept = ctx.saved_tensors
        gradient = gradient.float().masked_fill(~kept, 0.0).unsqueeze(1)
        out = softmax * gradient
        out.scatter_add_(1, column, -(gradient * mine.unsqueeze(1)))
        return out.to(ctx.dtype), None, None, None


def rotate_heads(qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of Megatron's fused projection, queries and keys turned by their positions' angles.

    Args:
        qkv: [.., G, H / G + 2, K]: per group its query heads, its key and its value.
        table: [2, .., K / 2] of the same type, cosines and sines of each token's angles; not differentiated. Channels i
            and i + K / 2 turn by angle i.

    Returns:
        [.., G, H / G, K], [.., G, K] and [.., G, K].

    Raises:
        ValueError: naming the argument and its shape.
    """
    check_rotate_heads(qkv, table)
    turned = _Rotate.apply(qkv[..., :-1, :], table[..., None, None, :])
    return turned[..., :-1, :], turned[..., -1, :], qkv[..., -1, :]


class _Rotate(torch.autograd.Function):
    """Turn channel pairs by the angles of a table; the gradient turns back, so nothing else is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _turn(x, table[0], table[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        return _turn(gradient, table[0], -table[1]), None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    low, high = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
    return out


def check_rotate_heads(qkv: Tensor, table: Tensor) -> None:
    """Refuse what `rotate_heads` cannot turn, naming the argument and what was received."""
    if qkv.dim() < 4 or qkv.shape[-2] < 3 or qkv.shape[-1] % 2:
        raise ValueError(f"qkv: expected [.., G, H / G + 2, K] with K even, received {tuple(qkv.shape)}")
    wanted = (2, *qkv.shape[:-3], qkv.shape[-1] // 2)
    if table.shape != wanted:
        raise ValueError(f"table: expected {wanted} for qkv {tuple(qkv.shape)}, received {tuple(table.shape)}")
    if table.dtype != qkv.dtype or table.device != qkv.device:
        raise ValueError(f"table: {table.dtype} on {table.device} differs from qkv, {qkv.dtype} on {qkv.device}")


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of x [.., 2F], gate and up side by side; [.., F].

    Raises:
        ValueError: an odd last dimension.
    """
    check_swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def check_swiglu(x: Tensor) -> None:
    """Refuse what has no two halves."""
    if not x.dim() or x.shape[-1] % 2:
        raise ValueError(f"x: expected [.., 2F], received {tuple(x.shape)}")


def add_rms_norm(x: Tensor, update: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The stream x + update [.., D], or x where that is None, and its RMSNorm times the gain [D].

    Raises:
        ValueError: an update or a gain of another shape or type.
    """
    check_add_rms_norm(x, update, gain)
    stream = x if update is None else x + update
    return stream, functional.rms_norm(stream, gain.shape, gain, eps)


def check_add_rms_norm(x: Tensor, update: Tensor | None, gain: Tensor) -> None:
    """Refuse what cannot be added or multiplied."""
    for name, y, shape in (("update", update, x.shape), ("gain", gain, x.shape[-1:])):
        if y is not None and y.shape != shape:
            raise ValueError(f"{name}: expected {tuple(shape)} for x {tuple(x.shape)}, received {tuple(y.shape)}")
        if y is not None and (y.dtype != x.dtype or y.device != x.device):
            raise ValueError(f"{name}: {y.dtype} on {y.device} differs from x, {x.dtype} on {x.device}")


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), CLIP's approximation of the GELU."""
    return x * torch.sigmoid(1.702 * x)
