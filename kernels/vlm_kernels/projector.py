# mypy: allow-untyped-defs
# (the arguments of a Triton kernel have no Python types)
"""Vision features to token embeddings, each row written once and where it belongs.

For patch m of picture n (the class token at index 0 is dropped), at row t = positions[m] of the token embeddings,

    u_m = x_m W1^T + b1      a_m = gelu(u_m)      out_t = a_m W2^T + b2      out_t = into_t where no patch lies

and backwards, for the upstream gradient g, y_m = g_t:

    du_m = (y_m W2) gelu'(u_m)    dx_m = du_m W1    dW1 = sum_m du_m x_m^T    dW2 = sum_m y_m a_m^T    db = sums over m

with gelu(u) = u Phi(u) and gelu'(u) = Phi(u) + u Phi'(u). Phi is the normal distribution ("gelu") or
sigmoid(2 sqrt(2 / pi) (u + 0.044715 u^3)), which is (1 + tanh) / 2 ("gelu_tanh"; arXiv:1606.08415).

Forward is three kernels: fc1 with bias and GELU, fc2 with bias and the scatter, and a copy of the rows of `into` that
no patch replaces. Backward fuses gelu' with the product before it, where a is computed again from u and the rows' share
of db1 is summed. u, a and du are laid out like the features, a row per class token included, so that every product is
one of whole tensors: the class tokens cost 1 / (1 + P) of the arithmetic, fc2 writes no rows for them, and backwards
their rows of a and du are zeros. dx, dW1 and dW2 are torch's (cuBLAS), because they have nothing before or behind them
to fuse.

Memory, in elements, with M rows: forward reads x (M D_vision), writes u and a (M F each), reads a, writes M D, and
copies (T - M) D. Saved for backward: u, besides the inputs; a is M F elements that cost one elementwise pass to
rebuild. u could be computed again from x as well: on an H200 at 64 pictures of 576 patches, 1024 -> 4096 -> 4096, that
spares 0.28 GiB for 9 % of the time forward and backward (`check_gpu.py projector`), so it is kept. Backward gathers
y (M D) once for its three readers.

Over a tensor-parallel group (fc1 by rows, fc2 by columns) the rows of fc2 and, backwards, dx are summed by all-reduce.

Shapes: N pictures, P patches, M = N (1 + P) rows, F projector hidden, D hidden, T tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm_kernels import reference
from vlm_kernels.product import PROGRAMS, Tiles, aligned, descriptor, options, product, tile_at

INTERPRETED = triton.knobs.runtime.interpret  # as the decorators below read it
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROOT_HALF = tl.constexpr(math.sqrt(0.5))
DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))
TANH_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
TANH_CUBIC = tl.constexpr(0.044715)
COPIED = 2048  # elements of a row that one program copies


# By "fp32?". Without spills on sm_90, as tests/kernels/test_projector.py compiles them.
FIRST = {False: Tiles(128, 256, 64, 8, 4), True: Tiles(32, 32, 32, 4, 2)}
SECOND = {False: Tiles(128, 256, 64, 8, 4), True: Tiles(32, 32, 32, 4, 2)}
GRADIENT = {False: Tiles(128, 256, 64, 8, 3), True: Tiles(32, 32, 32, 4, 2)}


@triton.jit
def _distribution(u, TANH: tl.constexpr):
    """Phi(u) and u Phi'(u)."""
    if TANH:
        cubic = u * u * TANH_CUBIC
        phi = 1.0 / (1.0 + tl.exp(-(u * TANH_SLOPE * (1.0 + cubic))))
        slope = u * TANH_SLOPE * phi * (1.0 - phi) * (1.0 + 3.0 * cubic)
    else:
        # 1 - erf(x) = (a1 t + .. + a5 t^5) exp(-x^2) with t = 1 / (1 + p x), to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
        # The exponential is that of the slope: together half of the instructions, and fewer registers, than tl.erf.
        density = tl.exp(-0.5 * u * u)
        t = 1.0 / (1.0 + 0.3275911 * ROOT_HALF * tl.abs(u))
        tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        tail = 0.5 * tail * density
        phi = tl.where(u < 0.0, tail, 1.0 - tail)
        slope = u * DENSITY * density
    return phi, slope


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right columns: on the whole tile, GELU and its slope need more registers than there are."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _activate(
    u, bias_ptr, u_out, a_out, row, column, num_columns,
    HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, TANH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Finish fc1 for some of a tile's columns, from `row` and `column` on."""
    if HAS_BIAS:
        place = column + tl.arange(0, COLUMNS)
        u += tl.load(bias_ptr + place, mask=place < num_columns, other=0.0)[None, :].to(tl.float32)
    # Rounded before the activation: backward has no more than that, and so differentiates what was computed.
    u = u.to(a_out.dtype)
    if KEEP:
        u_out.store([row, column], u)
    u = u.to(tl.float32)
    phi, _ = _distribution(u, TANH)
    a_out.store([row, column], (u * phi).to(a_out.dtype))


@triton.jit
def _differentiate(
    da, u_in, du_out, a_out, db_ptr, row, column, num_rows, num_columns, length,
    TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From da to du for some of a tile's columns, with a computed again and the rows' sum."""
    u = u_in.load([row, column]).to(tl.float32)
    phi, slope = _distribution(u, TANH)
    rows = row + tl.arange(0, ROWS)
    is_patch = ((rows % length != 0) & (rows < num_rows))[:, None]
    a_out.store([row, column], tl.where(is_patch, u * phi, 0.0).to(a_out.dtype))
    du = tl.where(is_patch, da * (phi + slope), 0.0)
    du_out.store([row, column], du.to(du_out.dtype))
    place = column + tl.arange(0, COLUMNS)
    tl.store(db_ptr + row // ROWS * num_columns + place, tl.sum(du, 0), mask=place < num_columns)


@triton.jit(do_not_specialize=["num_rows"])
def _first_layer_kernel(
    x, w, bias_ptr, u_out, a_out,  # [M, D_vision], [F, D_vision], [F], [M, F], [M, F]; u_out may be None
    num_rows, num_columns, dim,
    HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, TANH: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    column_tiles = tl.cdiv(num_columns, BLOCK_N)
    for index in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        row_tile, column_tile = tile_at(index, row_tiles, column_tiles, BAND)
        row = row_tile * BLOCK_M
        column = column_tile * BLOCK_N
        u = product(x, w, row, column, dim, BLOCK_M, BLOCK_N, BLOCK_K)
        left, right = _halves(u, BLOCK_M, BLOCK_N)
        middle = column + BLOCK_N // 2
        _activate(left, bias_ptr, u_out, a_out, row, column, num_columns, HAS_BIAS, KEEP, TANH, BLOCK_N // 2)
        _activate(right, bias_ptr, u_out, a_out, row, middle, num_columns, HAS_BIAS, KEEP, TANH, BLOCK_N // 2)


@triton.jit(do_not_specialize=["num_rows", "length"])
def _second_layer_kernel(
    a, w, bias_ptr, position_ptr,  # [M, F], [D, F], [D], [N * P] int64
    out_ptr,  # [T, D], or [N * P, D] without SCATTER; contiguous
    num_rows, num_columns, dim, length,
    HAS_BIAS: tl.constexpr, SCATTER: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    column_tiles = tl.cdiv(num_columns, BLOCK_N)
    for index in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        row_tile, column_tile = tile_at(index, row_tiles, column_tiles, BAND)
        y = product(a, w, row_tile * BLOCK_M, column_tile * BLOCK_N, dim, BLOCK_M, BLOCK_N, BLOCK_K)
        row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < num_columns
        if HAS_BIAS:
            y += tl.load(bias_ptr + column, mask=inside, other=0.0)[None, :].to(tl.float32)
        is_patch = (row < num_rows) & (row % length != 0)
        out_row = (row - row // length - 1).to(tl.int64)
        if SCATTER:
            out_row = tl.load(position_ptr + out_row, mask=is_patch, other=0)
        out_ptrs = out_ptr + out_row[:, None] * num_columns + column[None, :]
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=is_patch[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["num_rows", "length"])
def _hidden_gradient_kernel(
    y, w, u_in, du_out, a_out,  # [M, D], [D, F], [M, F] three times
    db_ptr,  # [row tiles, F] fp32
    num_rows, num_columns, dim, length,
    TANH: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    column_tiles = tl.cdiv(num_columns, BLOCK_N)
    # Not flattened into one loop over all tiles, which spills; at D = 4096 that costs nothing.
    for index in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS):
        row_tile, column_tile = tile_at(index, row_tiles, column_tiles, BAND)
        row = row_tile * BLOCK_M
        column = column_tile * BLOCK_N
        da = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, dim, BLOCK_K):
            da = tl.dot(y.load([row, k]), w.load([k, column]), da, input_precision="ieee")
        left, right = _halves(da, BLOCK_M, BLOCK_N)
        first, second = _halves(left, BLOCK_M, BLOCK_N // 2)
        third, fourth = _halves(right, BLOCK_M, BLOCK_N // 2)
        for part in tl.static_range(4):
            quarter = (first, second, third, fourth)[part]
            _differentiate(
                quarter, u_in, du_out, a_out, db_ptr, row, column + part * (BLOCK_N // 4),
                num_rows, num_columns, length, TANH, BLOCK_M, BLOCK_N // 4,
            )  # fmt: skip


@triton.jit
def _copy_rows_kernel(
    from_ptr, taken_ptr, to_ptr,  # [T, D], [T] bool, [T, D] contiguous
    num_columns, stride_from,
    ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the rows that are not taken; those that are become zero, or stay as they are."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    taken = tl.load(taken_ptr + row) != 0
    if ZERO or not taken:
        x = tl.load(from_ptr + row * stride_from + column, mask=(column < num_columns) & (not taken), other=0.0)
        tl.store(to_ptr + row * num_columns + column, x, mask=column < num_columns)


@triton.jit(do_not_specialize=["length"])
def _gather_rows_kernel(
    from_ptr, position_ptr, to_ptr,  # [T, D], [N * P] int64, [M, D]
    num_columns, stride_from, stride_to, length,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Row by row what lies at the patches' positions; zeros for the class tokens."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_patch = row % length != 0
    place = tl.load(position_ptr + row - row // length - 1, mask=is_patch, other=0)
    x = tl.load(from_ptr + place * stride_from + column, mask=(column < num_columns) & is_patch, other=0.0)
    tl.store(to_ptr + row.to(tl.int64) * stride_to + column, x, mask=column < num_columns)


class _ProjectImageTokens(torch.autograd.Function):
    """The kernels as one differentiable operation; its caller has checked the arguments."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fc1: Tensor, fc2: Tensor, bias1: Tensor | None, bias2: Tensor | None, into: Tensor,
        positions: Tensor, tanh: bool, group: Any,
    ) -> Tensor:  # fmt: skip
        taken = torch.zeros(len(into), dtype=torch.bool, device=into.device).index_fill_(0, positions, True)
        keep = any(ctx.needs_input_grad[:4])
        u, a = _first_layer(x.flatten(0, 1), fc1, bias1, tanh, keep)
        out = _copy_rows(into, taken, zero=False)
        if _parallel(group):
            rows = _second_layer(a, fc2, None, None, a.new_empty(len(positions), len(fc2)), x.shape[1])
            torch.distributed.all_reduce(rows, group=group)
            out.index_copy_(0, positions, rows if bias2 is None else rows.add_(bias2))
        else:
            _second_layer(a, fc2, bias2, positions, out, x.shape[1])
        ctx.save_for_backward(x, fc1, fc2, positions, taken, u)
        ctx.tanh, ctx.group = tanh, group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, fc1, fc2, positions, taken, u = ctx.saved_tensors
        need_x, need_fc1, need_fc2, need_b1, need_b2, need_into = ctx.needs_input_grad[:6]
        g = g if g.stride(-1) == 1 else g.contiguous()
        dx = dfc1 = dfc2 = db1 = db2 = None
        if need_b2 or u is not None:
            y = _rows_with_class_tokens(g, positions, *x.shape[:2])
        if need_b2:
            db2 = y.sum(0)
        if u is not None:
            du, a, sums = _hidden_gradient(y, fc2, u, x.shape[1], ctx.tanh)
            if need_fc2:
                dfc2 = torch.mm(y.T, a)
            if need_fc1:
                dfc1 = torch.mm(du.T, x.flatten(0, 1))
            if need_b1:
                db1 = sums.sum(0).to(fc1.dtype)
            if need_x:
                dx = torch.mm(du, fc1).view(x.shape)
                if _parallel(ctx.group):
                    torch.distributed.all_reduce(dx, group=ctx.group)
        dinto = _copy_rows(g, taken, zero=True) if need_into else None
        return dx, dfc1, dfc2, db1, db2, dinto, None, None, None


def _parallel(group: Any) -> bool:
    return group is not None and group.size() > 1


def _rows_with_class_tokens(g: Tensor, positions: Tensor, num_pictures: int, length: int) -> Tensor:
    """The patches' rows of g as [M, D], with zeros where the class tokens are."""
    y = aligned(g.new_empty(num_pictures * length, 0), g.shape[1])
    with torch.cuda.device_of(g):
        _gather_rows_kernel[(len(y), triton.cdiv(g.shape[1], COPIED))](
            g, positions, y, g.shape[1], g.stride(0), y.stride(0), length, BLOCK=COPIED, num_warps=4
        )
    return y


def _first_layer(x: Tensor, fc1: Tensor, bias: Tensor | None, tanh: bool, keep: bool) -> tuple[Tensor | None, Tensor]:
    """u (if it is to be kept) and a, both [M, F]."""
    (num_rows, dim), width = x.shape, len(fc1)
    tiles = FIRST[x.dtype == torch.float32]
    a = aligned(x, width)
    u = aligned(x, width) if keep else None
    half = tiles.block_n // 2
    with torch.cuda.device_of(a):
        _first_layer_kernel[_grid(tiles, num_rows, width)](
            descriptor(x, tiles.block_m, tiles.block_k), descriptor(fc1, tiles.block_n, tiles.block_k), bias,
            None if u is None else descriptor(u, tiles.block_m, half), descriptor(a, tiles.block_m, half),
            num_rows, width, dim,
            HAS_BIAS=bias is not None, KEEP=keep, TANH=tanh, PROGRAMS=PROGRAMS, **options(tiles),
        )  # fmt: skip
    return u, a


def _second_layer(
    a: Tensor, fc2: Tensor, bias: Tensor | None, positions: Tensor | None, out: Tensor, length: int
) -> Tensor:
    """Write a W2^T + b2 of the patches to the rows of `out` at `positions`, or from the first on."""
    tiles = SECOND[a.dtype == torch.float32]
    with torch.cuda.device_of(a):
        _second_layer_kernel[_grid(tiles, len(a), len(fc2))](
            descriptor(a, tiles.block_m, tiles.block_k), descriptor(fc2, tiles.block_n, tiles.block_k), bias,
            positions, out, len(a), *fc2.shape, length,
            HAS_BIAS=bias is not None, SCATTER=positions is not None, PROGRAMS=PROGRAMS, **options(tiles),
        )  # fmt: skip
    return out


def _hidden_gradient(y: Tensor, fc2: Tensor, u: Tensor, length: int, tanh: bool) -> tuple[Tensor, Tensor, Tensor]:
    """du and a, both [M, F] with zero rows for the class tokens, and sums over row tiles of du, fp32."""
    num_rows, width = u.shape
    tiles = GRADIENT[u.dtype == torch.float32]
    du, a = aligned(u, width), aligned(u, width)
    sums = u.new_empty(triton.cdiv(num_rows, tiles.block_m), width, dtype=torch.float32)
    quarter = tiles.block_n // 4
    with torch.cuda.device_of(u):
        _hidden_gradient_kernel[_grid(tiles, num_rows, width)](
            descriptor(y, tiles.block_m, tiles.block_k), descriptor(fc2, tiles.block_k, tiles.block_n),
            *(descriptor(x, tiles.block_m, quarter) for x in (u, du, a)), sums,
            num_rows, width, y.shape[1], length, TANH=tanh, PROGRAMS=PROGRAMS, **options(tiles),
        )  # fmt: skip
    return du, a, sums


def _grid(tiles: Tiles, num_rows: int, num_columns: int) -> tuple[int]:
    return (min(PROGRAMS, triton.cdiv(num_rows, tiles.block_m) * triton.cdiv(num_columns, tiles.block_n)),)


def _copy_rows(x: Tensor, taken: Tensor, zero: bool) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(x):
        _copy_rows_kernel[(len(x), triton.cdiv(x.shape[1], COPIED))](
            x, taken, out, x.shape[1], x.stride(0), ZERO=zero, BLOCK=COPIED, num_warps=4
        )
    return out


def project_image_tokens(
    features: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    *,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str = "gelu",
    into: Tensor,
    positions: Tensor,
    group: Any = None,
) -> Tensor:
    """Two-layer projector whose rows replace the token embeddings at `positions`.

    On a CPU this is `reference.project_image_tokens`, unless triton was imported with TRITON_INTERPRET=1.

    Args:
        features: [N, 1 + P, D_vision] bf16, fp16 or fp32 of the vision model, class token first; it is dropped. Copied
            unless contiguous. The last dimension of every other tensor is contiguous, and all have one type.
        fc1: [F, D_vision], with `group` this rank's rows. fc2: [D, F], with `group` this rank's columns.
        bias1: [F], split like fc1. bias2: [D], whole.
        activation: "gelu" (exact, by erf) or "gelu_tanh".
        into: [T, D] token embeddings; not modified.
        positions: int64 [N * P], rows of `into` in picture order, each at most once. Its values are looked at once per
            tensor, which on a GPU waits for the device unless they are `known_on_host`.
        group: tensor-parallel process group, None for one rank. All but the weights and bias1 is equal on its ranks.

    Returns:
        [T, D], contiguous, differentiable in features, weights, biases and `into`.

    Raises:
        ValueError: naming the argument and what was received.
    """
    reference.check_project_image_tokens(features, fc1, fc2, bias1, bias2, into, positions)
    # Without pictures there is nothing to multiply, and the twin's gradients are zeros, not absent.
    if len(positions) == 0 or (features.device.type == "cpu" and not INTERPRETED):
        return reference.project_image_tokens(
            features, fc1, fc2, bias1=bias1, bias2=bias2, activation=activation, into=into, positions=positions,
            group=group,
        )  # fmt: skip
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation: expected one of {list(reference.ACTIVATIONS)}, received {activation!r}")
    if features.dtype not in DTYPES:
        raise ValueError(f"features: dtype must be one of {DTYPES}, received {features.dtype}")
    named = {"features": features, "fc1": fc1, "fc2": fc2, "bias1": bias1, "bias2": bias2, "into": into}
    for name, x in named.items():
        if x is not None and x.stride(-1) != 1:
            raise ValueError(f"{name}: the last dimension must be contiguous, received strides {x.stride()}")
    return _ProjectImageTokens.apply(
        features, fc1, fc2, bias1, bias2, into, positions.contiguous(), activation == "gelu_tanh", group
    )
