"""The cross-entropy kernels, in Triton's interpreter, against the loss written out in fp64.

Losses and gradients (of a random upstream gradient) may be twice as far from the fp64 result as the same formula
evaluated in the tensors' own type, plus a few units in the last place. Logits are large enough for a softmax that is
neither flat nor one word's alone.
"""

from __future__ import annotations

import aot
import pytest
import torch
from torch import distributed, multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm_kernels import cross_entropy as module
from vlm_kernels import reference
from vlm_kernels.cross_entropy import linear_cross_entropy, vocab_parallel_cross_entropy

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def random(*shape, dtype=FP32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def targets(rows, words, trained, seed=3):
    """int64 [R] with `trained` random rows that count."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(words, (rows,), generator=generator)
    target[torch.randperm(rows, generator=generator)[trained:]] = -100
    return target


def loss_of_logits(target):
    def run(logits):
        losses = logits.logsumexp(1) - logits.gather(1, target.clamp(min=0)[:, None])[:, 0]
        return torch.where(target == -100, torch.zeros_like(losses), losses)

    return run


def loss_of_hidden(target):
    return lambda h, w: loss_of_logits(target)(h @ w.T)


def results(call, inputs, dtype=None, seed=9):
    """Losses, and gradients of a random weighting of them."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = call(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def compare(got, oracle, inputs):
    exact, eager = results(oracle, inputs, torch.float64), results(oracle, inputs)
    assert got[0].dtype == FP32
    for name, mine, truth, plain in zip(("loss", "first", "second"), got, exact, eager, strict=False):
        assert mine.shape == truth.shape
        if not truth.numel():
            continue
        ulps = 4 * torch.finfo(mine.dtype).eps * truth.abs().max().item()
        bound = 2 * (plain - truth).abs().max().item() + ulps
        error = (mine - truth).abs().max().item()
        assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"


LINEAR = [
    pytest.param(70, 33, 100, 70, FP32, id="nothing-is-a-multiple-of-its-tile"),
    pytest.param(64, 64, 96, 64, FP32, id="everything-is-a-multiple-of-its-tile"),
    pytest.param(90, 40, 70, 37, FP32, id="37-of-90-rows-trained"),
    pytest.param(50, 40, 70, 1, FP32, id="one-row-trained"),
    pytest.param(50, 40, 70, 0, FP32, id="all-rows-ignored"),
    pytest.param(0, 40, 70, 0, FP32, id="no-rows"),
    pytest.param(1, 8, 1, 1, FP32, id="a-vocabulary-of-one-word-costs-nothing"),
    pytest.param(5, 8, 3, 5, FP32, id="smaller-than-one-tile"),
    pytest.param(140, 72, 300, 131, BF16, id="bf16-ragged-tiles-of-128"),
    pytest.param(140, 72, 300, 131, FP16, id="fp16-ragged-tiles-of-128"),
]


@pytest.mark.interpreted
@pytest.mark.parametrize(("rows", "dim", "words", "trained", "dtype"), LINEAR)
def test_linear(rows, dim, words, trained, dtype):
    target = targets(rows, words, trained)
    inputs = [random(rows, dim, dtype=dtype), random(words, dim, dtype=dtype, seed=1, scale=0.5)]
    compare(results(lambda h, w: linear_cross_entropy(h, w, target), inputs), loss_of_hidden(target), inputs)


@pytest.mark.interpreted
@pytest.mark.parametrize("frozen", [None, 0, 1], ids=["both", "frozen-hidden", "frozen-weight"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_linear_in_pieces(frozen, dtype, monkeypatch):
    """Of one row, or of a quarter of the rows where the weight learns."""
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    target = targets(150, 290, 140)
    inputs = [random(150, 32, dtype=dtype), random(290, 32, dtype=dtype, seed=1, scale=0.5)]
    fixed = inputs.pop(frozen) if frozen is not None else None

    def arrange(call):
        if frozen is None:
            return call
        return lambda x: call(*((fixed.to(x.dtype), x) if frozen == 0 else (x, fixed.to(x.dtype))))

    mine = arrange(lambda h, w: linear_cross_entropy(h, w, target))
    compare(results(mine, inputs), arrange(loss_of_hidden(target)), inputs)


@pytest.mark.interpreted
@pytest.mark.parametrize("factor", [None, 0.25], ids=["sum", "mean"])
@pytest.mark.parametrize("trained", [60, 41], ids=["all-trained", "some-trained"])
@pytest.mark.parametrize("piece_bytes", [module.PIECE_BYTES, 1], ids=["one-piece", "four-pieces"])
def test_linear_of_one_upstream_number(piece_bytes, trained, factor, monkeypatch):
    """As training has it: both gradients come from the forward pass, and a second backward gives them again."""
    monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
    target = targets(60, 130, trained)
    inputs = [random(60, 24), random(130, 24, seed=1, scale=0.5)]

    def run(call, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        losses = call(*leaves)
        total = losses.sum() if factor is None else losses.sum() * factor
        first = torch.autograd.grad(total, leaves, retain_graph=True)
        return [losses.detach(), *first], [losses.detach(), *torch.autograd.grad(total, leaves)]

    exact, plain = (run(loss_of_hidden(target), dtype)[0] for dtype in (torch.float64, FP32))
    for got in run(lambda h, w: linear_cross_entropy(h, w, target), FP32):
        for mine, truth, other in zip(got, exact, plain, strict=True):
            ulps = 4 * torch.finfo(FP32).eps * truth.abs().max()
            assert (mine - truth).abs().max() <= 2 * (other - truth).abs().max() + ulps


@pytest.mark.interpreted
def test_linear_without_gradients_computes_none(monkeypatch):
    monkeypatch.setattr(module, "_gradient_of_logits", None)  # calling it would fail
    target = targets(9, 50, 9)
    with torch.no_grad():
        linear_cross_entropy(random(9, 12).requires_grad_(), random(50, 12, seed=1), target)


@pytest.mark.interpreted
@pytest.mark.parametrize("scale", [30.0, 1e-3], ids=["logits-of-hundreds", "flat"])
def test_linear_at_extreme_scales(scale):
    target = targets(40, 90, 40)
    inputs = [random(40, 32, scale=scale), random(90, 32, seed=1)]
    compare(results(lambda h, w: linear_cross_entropy(h, w, target), inputs), loss_of_hidden(target), inputs)


@pytest.mark.interpreted
def test_linear_reads_rows_with_a_stride_and_ignores_nan_in_ignored_rows():
    wide, target = random(60, 80), targets(60, 50, 30)
    wide[target == -100] = torch.nan
    weight = random(50, 160, seed=1)
    clean = wide.nan_to_num(0.0)
    mine = results(lambda h, w: linear_cross_entropy(h[:, :40], w[:, 16:56], target), [wide, weight])
    compare(mine, lambda h, w: loss_of_hidden(target)(h[:, :40], w[:, 16:56]), [clean, weight])


@pytest.mark.interpreted
def test_another_ignore_index():
    target = targets(40, 50, 30)
    other = target.masked_fill(target == -100, 7)
    hidden, weight = random(40, 32), random(50, 32, seed=1)
    losses = linear_cross_entropy(hidden, weight, other, ignore_index=7)
    assert torch.equal(losses == 0, other == 7)
    logits = hidden @ weight.T
    torch.testing.assert_close(vocab_parallel_cross_entropy(logits, other, ignore_index=7), losses)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("rows", "words", "trained", "dtype"),
    [
        pytest.param(9, 200, 9, FP32, id="smaller-than-one-block"),
        pytest.param(7, 4097, 5, FP32, id="one-word-in-the-second-block"),
        pytest.param(3, 8192, 3, BF16, id="bf16-whole-blocks"),
        pytest.param(5, 5000, 0, FP16, id="fp16-all-rows-ignored"),
        pytest.param(5, 5000, 1, FP16, id="fp16-one-row-trained"),
        pytest.param(0, 50, 0, FP32, id="no-rows"),
    ],
)
def test_given_logits(rows, words, trained, dtype):
    target = targets(rows, words, trained)
    inputs = [random(rows, words, dtype=dtype, scale=3.0)]
    compare(results(lambda x: vocab_parallel_cross_entropy(x, target), inputs), loss_of_logits(target), inputs)


@pytest.mark.interpreted
def test_given_logits_with_forbidden_words_and_a_stride():
    """-inf logits, a whole first block of them; and the logits themselves are left as they were."""
    wide, target = random(4, 6000, scale=3.0), torch.tensor([5500, 4600, 4700, 5999])
    wide[:, :4500] = -torch.inf
    inputs = [wide[:, :6000]]
    before = wide.clone()
    compare(results(lambda x: vocab_parallel_cross_entropy(x, target), inputs), loss_of_logits(target), inputs)
    assert torch.equal(wide, before)
    x = torch.cat([wide, wide], 1)[:, :6000].requires_grad_()
    assert not x.is_contiguous()
    torch.testing.assert_close(vocab_parallel_cross_entropy(x, target), loss_of_logits(target)(wide))


def sharded(rank, size, folder, shapes):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
    group = distributed.group.WORLD
    for rows, dim, words, trained in shapes:
        target = targets(rows, words, trained)
        hidden, weight = random(rows, dim), random(words, dim, seed=1, scale=0.5)
        part = slice(rank * words // size, (rank + 1) * words // size)
        for functions in ((linear_cross_entropy, vocab_parallel_cross_entropy), TWINS):
            losses, dh, dw = results(
                lambda h, w, call=functions[0], t=target: call(h, w, t, group=group), [hidden, weight[part]]
            )
            dws = [torch.empty_like(dw) for _ in range(size)]
            distributed.all_gather(dws, dw)
            compare([losses, dh, torch.cat(dws)], loss_of_hidden(target), [hidden, weight])
            logits = hidden @ weight.T
            losses, dx = results(
                lambda x, call=functions[1], t=target: call(x, t, group=group), [logits[:, part].contiguous()]
            )
            dxs = [torch.empty_like(dx) for _ in range(size)]
            distributed.all_gather(dxs, dx)
            compare([losses, torch.cat(dxs, 1)], loss_of_logits(target), [logits])
    width = 110 + (rank == 1)
    for call in (linear_cross_entropy, TWINS[0]):
        with pytest.raises(ValueError, match=f"group: its ranks hold 110 to 111 entries .* this one {width}"):
            call(random(3, 8), random(width, 8), torch.arange(3), group=group)
    distributed.destroy_process_group()


TWINS = (reference.linear_cross_entropy, reference.vocab_parallel_cross_entropy)


@pytest.mark.interpreted
@pytest.mark.parametrize("ranks", [2, 4])
def test_vocabulary_split_over_ranks(ranks, tmp_path):
    """Ranks equal the fp64 loss of one, whichever of them holds a row's target; also where nothing is trained."""
    shapes = [(50, 24, 120, 31), (33, 24, 4 * 33, 33), (6, 24, 40, 0)]
    # Forked, not spawned: importing torch and triton again would take ten times as long as the test.
    multiprocessing.start_processes(sharded, (ranks, str(tmp_path), shapes), nprocs=ranks, start_method="fork")


@pytest.mark.interpreted
@pytest.mark.parametrize("twin", [False, True], ids=["kernel", "twin"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(7, 9)}, r"hidden: expected \[R, 9\], received \(3, 8\)"),
        ({"weight": torch.zeros(7)}, r"weight: expected \[V, D\], received \(7,\)"),
        ({"weight": torch.zeros(0, 8)}, r"weight: expected \[V, D\], received \(0, 8\)"),
        ({"weight": torch.zeros(7, 8, dtype=BF16)}, r"weight: torch.bfloat16 on cpu differs from hidden"),
        ({"target": torch.zeros(4).long()}, r"target: expected \[3\] for hidden \(3, 8\), received \(4,\)"),
        ({"target": torch.zeros(3).int()}, r"target: expected int64 on cpu, received torch.int32"),
        (
            {"target": torch.tensor([0, 7, 1])},
            "target: received 7, the vocabulary has 7 entries and ignore_index is -1",
        ),
        ({"target": torch.tensor([0, -2, 1])}, "target: received -2, the vocabulary has 7 entries"),
    ],
)
def test_bad_input_is_refused_by_name(change, message, twin):
    arguments = {"hidden": torch.zeros(3, 8), "weight": torch.zeros(7, 8), "target": torch.zeros(3).long()} | change
    functions = TWINS if twin else (linear_cross_entropy, vocab_parallel_cross_entropy)
    with pytest.raises(ValueError, match=message):
        functions[0](*arguments.values(), ignore_index=-1)
    if "weight" not in change:
        with pytest.raises(ValueError, match=message.replace("hidden", "logits").replace("8", "7")):
            functions[1](torch.zeros(3, 7), arguments["target"], ignore_index=-1)


@pytest.mark.interpreted
def test_layouts_and_types_that_the_kernels_do_not_read_are_refused():
    target = torch.zeros(3).long()
    with pytest.raises(ValueError, match=r"weight: the last dimension must be contiguous, received strides \(1, 7\)"):
        linear_cross_entropy(torch.zeros(3, 8), torch.zeros(8, 7).T, target)
    with pytest.raises(ValueError, match="hidden: dtype must be one of .* received torch.float64"):
        linear_cross_entropy(torch.zeros(3, 8).double(), torch.zeros(7, 8).double(), target)
    with pytest.raises(ValueError, match=r"logits: the last dimension must be contiguous, received strides \(1, 3\)"):
        vocab_parallel_cross_entropy(torch.zeros(7, 3).T, target)


@pytest.mark.interpreted
def test_a_target_changed_in_place_is_looked_at_again():
    target = torch.zeros(4).long()
    linear_cross_entropy(torch.zeros(4, 8), torch.zeros(7, 8), target)
    target[1] = 9
    assert reference.values_of(target) == [0, 9, 0, 0]
    with pytest.raises(ValueError, match="target: received 9"):
        linear_cross_entropy(torch.zeros(4, 8), torch.zeros(7, 8), target, ignore_index=0)


class Sizes(TorchDispatchMode):
    """Bytes of the largest tensor that any operation of torch returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel() * x.element_size())
        return out


@pytest.mark.interpreted
def test_logits_are_never_stored(monkeypatch):
    """200 rows, 20 of them trained, 640 words: not even the trained rows' logits exist, forwards or backwards."""
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    target = targets(200, 640, 20)
    hidden, weight = random(200, 8).requires_grad_(), random(640, 8, seed=1).requires_grad_()
    with Sizes() as sizes:
        losses = linear_cross_entropy(hidden, weight, target)
    assert sizes.largest == weight.numel() * 4
    with Sizes() as sizes:
        losses.sum().backward()
    assert sizes.largest == weight.numel() * 4


@pytest.mark.interpreted
def test_second_derivatives_are_refused():
    target = targets(9, 50, 5)
    hidden, weight = random(9, 12).requires_grad_(), random(50, 12, seed=1).requires_grad_()
    logits = random(9, 50).requires_grad_()
    for losses, leaf in (
        (linear_cross_entropy(hidden, weight, target), hidden),
        (vocab_parallel_cross_entropy(logits, target), logits),
    ):
        (gradient,) = torch.autograd.grad(losses.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.interpreted
def test_without_autograd():
    """Inference tensors do not count their changes, so their targets are looked at every time."""
    target, inputs = targets(9, 50, 5), [random(9, 12), random(50, 12, seed=1)]
    learning = linear_cross_entropy(inputs[0].clone().requires_grad_(), inputs[1], target)
    with torch.inference_mode():
        target = target.clone()
        assert torch.equal(linear_cross_entropy(*inputs, target), learning)
        target[0] = 50
        with pytest.raises(ValueError, match="target: received 50"):
            linear_cross_entropy(*inputs, target)


def test_without_a_gpu_it_is_the_twin():
    target = targets(9, 50, 5)
    inputs = [random(9, 12), random(50, 12, seed=1)]
    for mine, twin in zip(
        results(lambda h, w: linear_cross_entropy(h, w, target), inputs),
        results(lambda h, w: TWINS[0](h, w, target), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, twin)


def launches(operation, *leaves):
    """Forward and backward of a Function that is only traced: its results are uninitialised memory."""

    def run():
        operation(*leaves).sum().backward()

    return run


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        pytest.param(BF16, 128, id="bf16"),
        pytest.param(FP16, 128, id="fp16"),
        pytest.param(BF16, 96, id="bf16-hidden-not-a-multiple-of-its-tile"),
        pytest.param(FP32, 128, id="fp32"),
    ],
)
def test_compiled_for_hopper(dtype, dim):
    target = torch.zeros(256).long()
    hidden, weight = (torch.empty(n, dim, dtype=dtype, requires_grad=True) for n in (256, 512))
    label = f"{str(dtype)[6:]} D={dim}"

    def head(h, w):
        return module._LinearCrossEntropy.apply(h, w, target, None, -100, 256, True)

    linear = aot.compile_launches(label, module, launches(head, hidden, weight))
    assert [x.name.split()[0] for x in linear] == ["row_kernel"]
    logits = torch.empty(256, 512, dtype=dtype, requires_grad=True)
    given = aot.compile_launches(
        label, module, launches(lambda x: module._VocabParallelCrossEntropy.apply(x, target, None, -100), logits)
    )
    assert [x.name.split()[0] for x in given] == ["row_statistics_kernel", "row_gradient_kernel"]
    aot.check([*linear, *given], matrix=False)
    aot.check_recorded([*linear, *given])
