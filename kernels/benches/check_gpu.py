"""Are the kernels right and how fast are they, on the GPU at hand? A first look in one command, before the benches.

    PYTHONPATH=kernels python3 kernels/benches/check_gpu.py attention          errors and times beside PyTorch's
    PYTHONPATH=kernels python3 kernels/benches/check_gpu.py attention tune     times of the neighbouring tiles
    PYTHONPATH=kernels python3 kernels/benches/check_gpu.py projector          is it worth keeping the pre-activations?

Errors are of parts of the result that fp64 can hold, beside those of the same formula in the inputs' type; "TOO LARGE"
marks more than twice that. Times are medians over batches of calls between two events, on random data; backward is
forward and backward less forward.
"""

from __future__ import annotations

import inspect
import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import vlm_kernels.attention  # noqa: F401
from vlm_kernels.attention import attention
from vlm_kernels.projector import _first_layer, project_image_tokens


class Shape(NamedTuple):
    """One attention; `lengths` are those of a pack's segments, otherwise the batch of [S, B]."""

    name: str
    length: int
    batch: int
    heads: int
    groups: int
    head_dim: int
    causal: bool
    lengths: tuple[int, ...] = ()

    def flop(self) -> float:
        """Of the two products of the forward pass over live pairs; backward has five."""
        pairs = sum(n * n for n in self.lengths) if self.lengths else self.batch * self.length**2
        return 4 * pairs * self.heads * self.head_dim / (2 if self.causal else 1)


PACK = (591, 640, 577, 613, 589, 602, 655, 580, 598, 620) * 3  # about the pretrain samples' lengths
SHAPES = [
    Shape("CLIP full", 577, 32, 16, 16, 64, False),
    Shape("Mistral causal", 4096, 2, 32, 8, 128, True),
    Shape("packed 16k", 16384, 1, 32, 8, 128, True, (*PACK[:26], 16384 - sum(PACK[:26]))),
]


def milliseconds(call: Callable[[], object], calls: int = 10, repeats: int = 7) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def inputs_of(shape: Shape, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """q, k, v as views of Megatron's fused projection, the upstream gradient, the borders."""
    torch.manual_seed(0)
    tokens = (shape.length,) if shape.lengths else (shape.length, shape.batch)
    per_group = shape.heads // shape.groups
    fused = torch.randn(*tokens, shape.groups, per_group + 2, shape.head_dim, device="cuda", dtype=dtype)
    views = [x.requires_grad_() for x in (fused[..., :per_group, :], fused[..., -2, :], fused[..., -1, :])]
    upstream = torch.randn(*tokens, shape.heads, shape.head_dim, device="cuda", dtype=dtype)
    borders = torch.tensor([0, *shape.lengths], device="cuda").cumsum(0).int() if shape.lengths else None
    return views, upstream, borders


def one_group(q: Tensor, k: Tensor, v: Tensor, w: Tensor, causal: bool, dtype: torch.dtype) -> list[Tensor]:
    """Attention of q [S, M, K] to one key/value head [S, K] written out in `dtype`: output and gradients."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    scores = torch.einsum("smk,tk->mst", q, k) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
    out = torch.einsum("mst,tk->smk", scores.softmax(-1), v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), w.to(dtype))]


def errors(shape: Shape, dtype: torch.dtype) -> None:
    (q, k, v), w, borders = inputs_of(shape, dtype)
    out = attention(q, k, v, causal=shape.causal, cu_seqlens=borders)
    gradients = torch.autograd.grad(out, (q, k, v), w)
    per_group = shape.heads // shape.groups
    mine_all = [out.unflatten(-2, (shape.groups, per_group)), *gradients]
    w_all = w.unflatten(-2, (shape.groups, per_group))
    ends = [0, *torch.tensor(shape.lengths).cumsum(0).tolist()] if shape.lengths else []
    parts = [slice(ends[i], ends[i + 1]) for i in (0, 1, len(ends) - 2)] if ends else [0, shape.batch - 1]
    worst: dict[str, tuple[float, float]] = {}
    for part in parts:
        for group in (0, shape.groups - 1):
            pick = (part, group) if ends else (slice(None), part, group)
            arguments = [x[pick] for x in (q, k, v, w_all)]
            exact = one_group(*arguments, shape.causal, torch.float64)
            eager = one_group(*arguments, shape.causal, dtype)
            for name, a, b, c in zip(("out", "dq", "dk", "dv"), mine_all, exact, eager, strict=True):
                error, allowed = (a[pick] - b).abs().max().item(), (c - b).abs().max().item()
                worst[name] = max(worst.get(name, (0.0, 1.0)), (error, allowed), key=lambda pair: pair[0] / pair[1])
    text = "  ".join(f"{n} {e:.2e}/{a:.2e}{' TOO LARGE' * (e > 2 * a)}" for n, (e, a) in worst.items())
    print(f"  {str(dtype)[6:]:9} max error ours/eager: {text}", flush=True)


def peers(shape: Shape, views: list[Tensor], borders: Tensor | None) -> dict[str, Callable[[], Tensor]]:
    """PyTorch's kernels on contiguous copies in the layout each likes best, copied outside the timing."""
    q, k, v = views[0].detach().flatten(-3, -2), views[1].detach(), views[2].detach()
    if borders is not None:
        from torch.nn.attention.varlen import varlen_attn

        per_group, longest = shape.heads // shape.groups, max(shape.lengths)
        q, k, v = (x.contiguous().requires_grad_() for x in (q, *(y.repeat_interleave(per_group, 1) for y in (k, v))))
        named = "is_causal" in inspect.signature(varlen_attn).parameters  # PyTorch 2.10; a window since then
        causal = {"is_causal": True} if named else {"window_size": (-1, 0)}
        lengths = (borders, borders, longest, longest)
        return {"varlen (FA2, KV repeated)": lambda: varlen_attn(q, k, v, *lengths, **causal)}
    q, k, v = (x.permute(1, 2, 0, 3).contiguous().requires_grad_() for x in (q, k, v))

    def sdpa(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(
                    q, k, v, is_causal=shape.causal, enable_gqa=shape.heads != shape.groups
                )

        return call

    return {"SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION), "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION)}


def timed(name: str, shape: Shape, forward: Callable[[], Tensor]) -> None:
    try:
        out = forward()
        leaves, w = _leaves(out), torch.randn_like(out)
        ahead = milliseconds(forward)
        back = milliseconds(lambda: torch.autograd.grad(forward(), leaves, w)) - ahead
    except Exception as error:  # a peer that this PyTorch or GPU lacks is a line, not the end
        print(f"  {name:28} failed: {type(error).__name__}: {str(error).splitlines()[0][:150]}", flush=True)
        return
    rate = shape.flop() / 1e9
    print(
        f"  {name:28} forward {ahead:7.3f} ms {rate / ahead:6.0f} TFLOP/s   "
        f"backward {back:7.3f} ms {2.5 * rate / back:6.0f} TFLOP/s",
        flush=True,
    )


def _leaves(out: Tensor) -> list[Tensor]:
    found, queue, seen = [], [out.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        queue += [following for following, _ in node.next_functions]
    return found


def check_attention() -> None:
    for shape in SHAPES:
        print(f"{shape}" if not shape.lengths else f"{shape.name}: {len(shape.lengths)} segments", flush=True)
        errors(shape, torch.bfloat16)
        errors(shape, torch.float16)
        views, _, borders = inputs_of(shape, torch.bfloat16)
        timed("ours", shape, lambda v=views, b=borders, s=shape: attention(*v, causal=s.causal, cu_seqlens=b))
        try:
            others = peers(shape, views, borders)
        except ImportError as error:
            print(f"  no peer: {error}", flush=True)
            continue
        for name, call in others.items():
            timed(name, shape, call)
    decode()
    small = SHAPES[1]._replace(name="fp32", length=600)
    print("fp32 causal 600", flush=True)
    errors(small, torch.float32)


def decode(batch: int = 32, keys: int = 2048, groups: int = 8, per_group: int = 4, head_dim: int = 128) -> None:
    """One query row per sample against a cache whose prompts were padded on the left."""
    torch.manual_seed(0)
    q = torch.randn(1, batch, groups, per_group, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(keys, batch, groups, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    starts = torch.randint(0, keys // 2, (batch,), device="cuda", dtype=torch.int32)
    ranges = torch.stack([starts, torch.full_like(starts, keys)], 1).contiguous()
    out = attention(q, k, v, causal=False, key_ranges=ranges).unflatten(2, (groups, per_group))
    worst = 0.0
    for sample in (0, batch - 1):
        seen = slice(int(starts[sample]), keys)
        scores = torch.einsum("gmk,tgk->gmt", q[0, sample].double(), k[seen, sample].double()) * head_dim**-0.5
        exact = torch.einsum("gmt,tgk->gmk", scores.softmax(-1), v[seen, sample].double())
        worst = max(worst, (out[0, sample] - exact).abs().max().item())
    gigabytes = 4 * int((keys - starts).sum()) * groups * head_dim / 1e9
    took = milliseconds(lambda: attention(q, k, v, causal=False, key_ranges=ranges))
    mask = (torch.arange(keys, device="cuda") >= starts[:, None])[:, None, None]
    heads = [x.permute(1, 2, 0, 3) for x in (q.flatten(2, 3), k, v)]
    sdpa = milliseconds(lambda: functional.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True))
    print(
        f"decode B={batch}, {keys} keys: max error {worst:.2e}, {took:.3f} ms ({gigabytes / took * 1e3:.0f} GB/s of "
        f"live keys and values), SDPA with a mask {sdpa:.3f} ms",
        flush=True,
    )


NEIGHBOURS = {
    ("forward", 64): [(128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)],
    ("forward", 128): [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 4)],
    ("query gradient", 64): [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (128, 128, 8, 2)],
    ("query gradient", 128): [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (128, 128, 8, 1)],
    ("key gradient", 64): [(64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (128, 128, 8, 2)],
    ("key gradient", 128): [(32, 128, 8, 3), (32, 128, 8, 4), (64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 3)],
}


def tune_attention() -> None:
    module = sys.modules[attention.__module__]
    for shape in SHAPES:
        views, w, borders = inputs_of(shape, torch.bfloat16)

        def forward(v=views, b=borders, s=shape) -> Tensor:
            return attention(*v, causal=s.causal, cu_seqlens=b)

        for part in ("forward", "query gradient", "key gradient"):
            key = (part, shape.head_dim, False)
            if shape.lengths and (packed := (f"packed {part}", *key[1:])) in module.TILES:
                key = packed
            chosen = module.TILES[key]
            for candidate in NEIGHBOURS[part, shape.head_dim]:
                module.TILES[key] = module.Tiles(*candidate)
                try:
                    out = forward()
                    call = (
                        forward
                        if part == "forward"
                        else lambda o=out, v=views, g=w: torch.autograd.grad(o, v, g, retain_graph=True)
                    )
                    took = f"{milliseconds(call):.3f} ms"
                except triton.runtime.errors.OutOfResources as error:
                    took = str(error).splitlines()[0]
                mark = " (as is)" if candidate == tuple(chosen) else ""
                print(f"{shape.name:16} {part:16} {candidate!s:20} {took}{mark}", flush=True)
            module.TILES[key] = chosen


def check_projector(patches: int = 576, vision: int = 1024, hidden: int = 4096, language: int = 4096) -> None:
    """What keeping u costs (bytes, and the time to write them) beside what computing it again would (one product)."""
    for num_pictures in (16, 64):
        torch.manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale

        x, bias = random(num_pictures, 1 + patches, vision), random(hidden)
        rows = x.flatten(0, 1)
        fc1, fc2 = random(hidden, vision, scale=vision**-0.5), random(language, hidden, scale=hidden**-0.5)
        into = random(num_pictures * 1024, language)
        starts = torch.arange(num_pictures, device="cuda")[:, None] * 1024 + 1
        positions = (starts + torch.arange(patches, device="cuda")).flatten()
        leaves = [fc1.requires_grad_(), fc2.requires_grad_(), bias.requires_grad_()]
        upstream = random(*into.shape)

        def both(x=x, leaves=leaves, into=into, positions=positions, upstream=upstream) -> object:
            fc1, fc2, bias = leaves
            out = project_image_tokens(x, fc1, fc2, bias1=bias, into=into, positions=positions)
            return torch.autograd.grad(out, leaves, upstream)

        with torch.no_grad():
            first = {
                keep: milliseconds(lambda k=keep, x=rows, w=fc1, b=bias: _first_layer(x, w, b, False, k))
                for keep in (True, False)
            }
        whole = milliseconds(both)
        again = whole + first[False]
        print(
            f"N {num_pictures}: u kept {whole:.3f} ms and {2 * num_pictures * patches * hidden / 2**30:.3f} GiB, "
            f"computed again {again:.3f} ms; fc1 {first[True]:.3f} ms writing u, {first[False]:.3f} ms not",
            flush=True,
        )


CHECKS = {("attention",): check_attention, ("attention", "tune"): tune_attention, ("projector",): check_projector}


def main() -> None:
    arguments = tuple(sys.argv[1:])
    if arguments not in CHECKS:
        raise SystemExit(
            f"check_gpu.py: expected one of {[' '.join(c) for c in CHECKS]}, received {' '.join(arguments)!r}"
        )
    if not torch.cuda.is_available():
        raise SystemExit("check_gpu.py: needs a GPU, and PyTorch sees none; the tests in tests/kernels need none")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    CHECKS[arguments]()


if __name__ == "__main__":
    main()
