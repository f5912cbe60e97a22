# mypy: allow-untyped-defs
# (the arguments of a Triton kernel have no Python types)
"""Vision features to token embeddings, each row written once and where it belongs.

For patch m of picture n (the class token at index 0 is never read), at row t = positions[m] of the token embeddings,

    u_m = x_m W1^T + b1      a_m = gelu(u_m)      out_t = a_m W2^T + b2      out_t = into_t where no patch lies

and backwards, for the upstream gradient g, y_m = g_t:

    du_m = (y_m W2) gelu'(u_m)    dx_m = du_m W1    dW1 = sum_m du_m x_m^T    dW2 = sum_m y_m a_m^T    db = sums over m

with gelu(u) = u Phi(u) and gelu'(u) = Phi(u) + u Phi'(u). Phi is the normal distribution ("gelu") or
sigmoid(2 sqrt(2 / pi) (u + 0.044715 u^3)), which is (1 + tanh) / 2 ("gelu_tanh"; arXiv:1606.08415).

Forward is three kernels: fc1 with bias and GELU, fc2 with bias and the scatter, and a copy of the rows of `into` that
no patch replaces. Backward fuses gelu' with the product before it, where a is computed again from u and the rows' share
of db1 is summed; it lays du out like the features, with a zero row per class token, so that dx and dW1 are plain
products of whole tensors. Those and dW2 are torch's (cuBLAS), because they have nothing before or behind them to fuse.

Memory, in elements, with M patches: forward reads x (M D_vision), writes u and a (M F each), reads a, writes M D, and
copies (T - M) D. Saved for backward: u, besides the inputs; a is M F elements that cost one elementwise pass to
rebuild. u could be computed again from x as well: on an H200 at 64 pictures of 576 patches, 1024 -> 4096 -> 4096, that
spares 0.28 GiB for 9 % of the time forward and backward (8.56 ms, fc1 0.78; `check_gpu.py projector`), so it is kept.
Backward gathers y (M D) once for its three readers.

Over a tensor-parallel group (fc1 by rows, fc2 by columns) the rows of fc2 and, backwards, dx are summed by all-reduce.

Shapes: N pictures, P patches, M = N * P rows, F projector hidden, D hidden, T tokens.
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
from vlm_kernels.product import Tiles, options, product, tile_of_program

INTERPRETED = triton.knobs.runtime.interpret  # as the decorators below read it
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROOT_HALF = tl.constexpr(math.sqrt(0.5))
DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))
TANH_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
TANH_CUBIC = tl.constexpr(0.044715)
COPIED = 2048  # elements of a row that one program copies


# By "fp32?". Without spills on sm_90, as tests/kernels/test_projector.py compiles them: 128 x 256 spills with a GELU
# behind it (32 to 608 bytes); 128 x 128 leaves room for two blocks on a multiprocessor, one of which multiplies while
# the other activates.
FIRST = {False: Tiles(128, 128, 64, 8, 3), True: Tiles(32, 32, 32, 4, 2)}
SECOND = {False: Tiles(128, 256, 64, 8, 3), True: Tiles(32, 32, 32, 4, 2)}
GRADIENT = {False: Tiles(128, 128, 64, 8, 3), True: Tiles(32, 32, 32, 4, 2)}


@triton.jit
def _distribution(u, TANH: tl.constexpr):
    """Phi(u) and u Phi'(u)."""
    if TANH:
        cubic = u * u * TANH_CUBIC
        phi = 1.0 / (1.0 + tl.exp(-(u * TANH_SLOPE * (1.0 + cubic))))
        slope = u * TANH_SLOPE * phi * (1.0 - phi) * (1.0 + 3.0 * cubic)
    else:
        phi = 0.5 + 0.5 * tl.erf(u * ROOT_HALF)
        slope = u * DENSITY * tl.exp(-0.5 * u * u)
    return phi, slope


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right columns. On the whole tile, GELU and its slope spill (300 bytes); on half of it they do not."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _activate(
    u, bias_ptr, u_ptr, a_ptr, row, column, num_rows, num_columns,
    HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """Finish fc1 for some of a tile's columns."""
    if HAS_BIAS:
        u += tl.load(bias_ptr + column, mask=column < num_columns, other=0.0)[None, :].to(tl.float32)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    place = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    # Rounded before the activation: backward has no more than that, and so differentiates what was computed.
    u = u.to(a_ptr.dtype.element_ty)
    if KEEP:
        tl.store(u_ptr + place, u, mask=inside)
    u = u.to(tl.float32)
    phi, _ = _distribution(u, TANH)
    tl.store(a_ptr + place, (u * phi).to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _differentiate(
    da, u_ptr, du_ptr, a_ptr, db_ptr, row, column, num_rows, num_columns, num_patches, TANH: tl.constexpr
):
    """From da to du for some of a tile's columns, with a computed again and the rows' sum."""
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    place = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    u = tl.load(u_ptr + place, mask=inside, other=0.0).to(tl.float32)
    phi, slope = _distribution(u, TANH)
    tl.store(a_ptr + place, (u * phi).to(a_ptr.dtype.element_ty), mask=inside)
    du = tl.where(inside, da * (phi + slope), 0.0)
    du_row = row.to(tl.int64) + row // num_patches + 1  # one class token per picture, the row's own included
    tl.store(du_ptr + du_row[:, None] * num_columns + column[None, :], du.to(du_ptr.dtype.element_ty), mask=inside)
    tl.store(db_ptr + column, tl.sum(du, 0), mask=column < num_columns)


@triton.jit(do_not_specialize=["num_rows", "num_patches"])
def _first_layer_kernel(
    x_ptr, w_ptr, bias_ptr,  # [N, 1 + P, D_vision], [F, D_vision], [F]
    u_ptr, a_ptr,  # [M, F] contiguous; u may be None
    num_rows, num_columns, dim, num_patches, stride_xn, stride_xp, stride_w,
    HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, TANH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of_program(tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N), BAND)
    first_row, first_column = row_tile * BLOCK_M, column_tile * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end repeat the last one, which spares the loads a mask.
    x_row = tl.minimum(row, num_rows - 1).to(tl.int64)
    w_row = tl.minimum(column, num_columns - 1).to(tl.int64)
    x_start = x_row // num_patches * stride_xn + (1 + x_row % num_patches) * stride_xp
    x_ptrs = x_ptr + x_start[:, None] + k[None, :]
    w_ptrs = w_ptr + w_row[None, :] * stride_w + k[:, None]
    u = product(x_ptrs, w_ptrs, dim, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    left, right = _halves(u, BLOCK_M, BLOCK_N)
    column = first_column + tl.arange(0, BLOCK_N // 2)
    _activate(left, bias_ptr, u_ptr, a_ptr, row, column, num_rows, num_columns, HAS_BIAS, KEEP, TANH)
    column += BLOCK_N // 2
    _activate(right, bias_ptr, u_ptr, a_ptr, row, column, num_rows, num_columns, HAS_BIAS, KEEP, TANH)


@triton.jit(do_not_specialize=["num_rows"])
def _second_layer_kernel(
    a_ptr, w_ptr, bias_ptr, position_ptr,  # [M, F] contiguous, [D, F], [D], [M] int64
    out_ptr,  # [T, D], or [M, D] without SCATTER; contiguous
    num_rows, num_columns, dim, stride_w,
    HAS_BIAS: tl.constexpr, SCATTER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of_program(tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N), BAND)
    first_row, first_column = row_tile * BLOCK_M, column_tile * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_row = tl.minimum(row, num_rows - 1).to(tl.int64)
    w_row = tl.minimum(column, num_columns - 1).to(tl.int64)
    a_ptrs = a_ptr + a_row[:, None] * dim + k[None, :]
    w_ptrs = w_ptr + w_row[None, :] * stride_w + k[:, None]
    y = product(a_ptrs, w_ptrs, dim, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    if HAS_BIAS:
        y += tl.load(bias_ptr + w_row)[None, :].to(tl.float32)
    out_row = a_row
    if SCATTER:
        out_row = tl.load(position_ptr + a_row)
    out_ptrs = out_ptr + out_row[:, None] * num_columns + column[None, :]
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_patches"])
def _hidden_gradient_kernel(
    y_ptr, w_ptr, u_ptr,  # [M, D] contiguous, [D, F], [M, F] contiguous
    du_ptr, a_ptr, db_ptr,  # [N, 1 + P, F] contiguous, [M, F] contiguous, [row tiles, F] fp32
    num_rows, num_columns, dim, num_patches, stride_w,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of_program(tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N), BAND)
    first_row, first_column = row_tile * BLOCK_M, column_tile * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    y_row = tl.minimum(row, num_rows - 1).to(tl.int64)
    y_ptrs = y_ptr + y_row[:, None] * dim + k[None, :]
    w_ptrs = w_ptr + k.to(tl.int64)[:, None] * stride_w + column[None, :]
    # Columns are contiguous here: a mask leaves their loads whole, repeating the last one would take them apart.
    known = (column < num_columns)[None, :]
    da = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for low in tl.range(0, dim, BLOCK_K):
        if EVEN_K:
            y = tl.load(y_ptrs)
            w = tl.load(w_ptrs, mask=known, other=0.0)
        else:
            y = tl.load(y_ptrs, mask=(low + k < dim)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=known & (low + k < dim)[:, None], other=0.0)
        da = tl.dot(y, w, da, input_precision="ieee")
        y_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_w
    left, right = _halves(da, BLOCK_M, BLOCK_N)
    db_ptr += first_row // BLOCK_M * num_columns
    column = first_column + tl.arange(0, BLOCK_N // 2)
    _differentiate(left, u_ptr, du_ptr, a_ptr, db_ptr, row, column, num_rows, num_columns, num_patches, TANH)
    column += BLOCK_N // 2
    _differentiate(right, u_ptr, du_ptr, a_ptr, db_ptr, row, column, num_rows, num_columns, num_patches, TANH)


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


class _ProjectImageTokens(torch.autograd.Function):
    """The kernels as one differentiable operation; its caller has checked the arguments."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fc1: Tensor, fc2: Tensor, bias1: Tensor | None, bias2: Tensor | None, into: Tensor,
        positions: Tensor, tanh: bool, group: Any,
    ) -> Tensor:  # fmt: skip
        taken = torch.zeros(len(into), dtype=torch.bool, device=into.device).index_fill_(0, positions, True)
        keep = any(ctx.needs_input_grad[:4])
        u, a = _first_layer(x, fc1, bias1, tanh, keep)
        out = _copy_rows(into, taken, zero=False)
        if _parallel(group):
            rows = _second_layer(a, fc2, None, None, a.new_empty(len(a), len(fc2)))
            torch.distributed.all_reduce(rows, group=group)
            out.index_copy_(0, positions, rows if bias2 is None else rows.add_(bias2))
        else:
            _second_layer(a, fc2, bias2, positions, out)
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
            y = g.index_select(0, positions)
        if need_b2:
            db2 = y.sum(0)
        if u is not None:
            du, a, sums = _hidden_gradient(y, fc2, u, x.shape[:2], ctx.tanh)
            if need_fc2:
                dfc2 = torch.mm(y.T, a)
            if need_fc1:
                dfc1 = torch.mm(du.T, x.reshape(-1, x.shape[-1]))
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


def _first_layer(x: Tensor, fc1: Tensor, bias: Tensor | None, tanh: bool, keep: bool) -> tuple[Tensor | None, Tensor]:
    """u (if it is to be kept) and a, both [M, F]."""
    num_patches, (width, dim) = x.shape[1] - 1, fc1.shape
    a = x.new_empty(x.shape[0] * num_patches, width)
    u = torch.empty_like(a) if keep else None
    grid, options = _launch(FIRST, len(a), width, dim, a.dtype)
    with torch.cuda.device_of(a):
        _first_layer_kernel[grid](
            x, fc1, bias, u, a, len(a), width, dim, num_patches, x.stride(0), x.stride(1), fc1.stride(0),
            HAS_BIAS=bias is not None, KEEP=keep, TANH=tanh, **options,
        )  # fmt: skip
    return u, a


def _second_layer(a: Tensor, fc2: Tensor, bias: Tensor | None, positions: Tensor | None, out: Tensor) -> Tensor:
    """Write a W2^T + b2 to the rows of `out` at `positions`, or from the first on."""
    grid, options = _launch(SECOND, len(a), fc2.shape[0], fc2.shape[1], a.dtype)
    with torch.cuda.device_of(a):
        _second_layer_kernel[grid](
            a, fc2, bias, positions, out, len(a), *fc2.shape, fc2.stride(0),
            HAS_BIAS=bias is not None, SCATTER=positions is not None, **options,
        )  # fmt: skip
    return out


def _hidden_gradient(
    y: Tensor, fc2: Tensor, u: Tensor, pictures: tuple[int, int], tanh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """du [N * (1 + P), F] with zero rows for the class tokens, a [M, F], and sums over row tiles of du, fp32."""
    (num_pictures, length), (num_rows, width) = pictures, u.shape
    du, a = u.new_empty(num_pictures, length, width), torch.empty_like(u)
    du[:, 0] = 0.0
    grid, options = _launch(GRADIENT, num_rows, width, y.shape[1], u.dtype)
    sums = u.new_empty(triton.cdiv(num_rows, options["BLOCK_M"]), width, dtype=torch.float32)
    with torch.cuda.device_of(u):
        _hidden_gradient_kernel[grid](
            y, fc2, u, du, a, sums, num_rows, width, y.shape[1], length - 1, fc2.stride(0), TANH=tanh, **options
        )
    return du.flatten(0, 1), a, sums


def _copy_rows(x: Tensor, taken: Tensor, zero: bool) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(x):
        _copy_rows_kernel[(len(x), triton.cdiv(x.shape[1], COPIED))](
            x, taken, out, x.shape[1], x.stride(0), ZERO=zero, BLOCK=COPIED, num_warps=4
        )
    return out


def _launch(
    table: dict[bool, Tiles], num_rows: int, num_columns: int, dim: int, dtype: torch.dtype
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and constants of a product with num_rows x num_columns results that sums over dim."""
    tiles = table[dtype == torch.float32]
    return (triton.cdiv(num_rows, tiles.block_m) * triton.cdiv(num_columns, tiles.block_n),), options(tiles, dim)


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
        features: [N, 1 + P, D_vision] bf16, fp16 or fp32 of the vision model, class token first; it is dropped. The
            last dimension of this and of every other tensor is contiguous, and all have one type.
        fc1: [F, D_vision], with `group` this rank's rows. fc2: [D, F], with `group` this rank's columns.
        bias1: [F], split like fc1. bias2: [D], whole.
        activation: "gelu" (exact, by erf) or "gelu_tanh".
        into: [T, D] token embeddings; not modified.
        positions: int64 [N * P], rows of `into` in picture order, each at most once. Its values are looked at once per
            tensor, which on a GPU waits for the device.
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
