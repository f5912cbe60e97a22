"""The projector kernels, in Triton's interpreter, against the projector written out in fp64.

Outputs and gradients (of a random upstream gradient) may be twice as far from the fp64 result as the same formula
evaluated in the tensors' own type, plus a few units in the last place.
"""

from __future__ import annotations

import aot
import pytest
import torch
from torch import distributed, multiprocessing

from vlm_kernels import projector as module
from vlm_kernels import reference
from vlm_kernels.projector import project_image_tokens

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("features", "fc1", "fc2", "into", "bias1", "bias2")


def random(*shape, dtype=FP32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def tensors(pictures, patches, vision, hidden, out, tokens, dtype=FP32, bias=True):
    """The differentiable arguments, in the order of NAMES, with pre-activations of a few units either way."""
    given = [
        random(pictures, 1 + patches, vision, dtype=dtype),
        random(hidden, vision, dtype=dtype, seed=1, scale=2 * vision**-0.5),
        random(out, hidden, dtype=dtype, seed=2, scale=hidden**-0.5),
        random(tokens, out, dtype=dtype, seed=3),
    ]
    return given + ([random(hidden, dtype=dtype, seed=4), random(out, dtype=dtype, seed=5)] if bias else [])


def scattered(rows, tokens, seed=7):
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:rows]


def written_out(positions, activation):
    def run(x, fc1, fc2, into, bias1=0.0, bias2=0.0):
        u = x[:, 1:].reshape(-1, x.shape[-1]) @ fc1.T + bias1
        if activation == "gelu":
            a = 0.5 * u * (1 + torch.erf(u / 2**0.5))
        else:
            a = 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
        rows = list(into.unbind())
        for row, position in zip((a @ fc2.T + bias2).unbind(), positions.tolist(), strict=True):
            rows[position] = row
        return torch.stack(rows) + 0 * into  # so that `into` is used even where every row is replaced

    return run


def kernel(positions, activation="gelu", call=project_image_tokens, **options):
    def run(x, fc1, fc2, into, bias1=None, bias2=None):
        biases = {"bias1": bias1, "bias2": bias2}
        return call(x, fc1, fc2, **biases, activation=activation, into=into, positions=positions, **options)

    return run


def results(call, inputs, dtype=None, seed=9):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = call(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(inputs[0].dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def compare(got, oracle, inputs):
    exact, eager = results(oracle, inputs, torch.float64), results(oracle, inputs)
    for name, mine, truth, plain in zip(("out", *NAMES), got, exact, eager, strict=False):
        assert mine.shape == truth.shape
        assert mine.dtype == plain.dtype
        ulps = 4 * torch.finfo(mine.dtype).eps * truth.abs().max().item()
        bound = 2 * (plain - truth).abs().max().item() + ulps
        error = (mine - truth).abs().max().item()
        assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"


SHAPES = [
    pytest.param(3, 13, 40, 72, 50, 90, FP32, id="nothing-is-a-multiple-of-its-tile:tiles-across-pictures"),
    pytest.param(2, 32, 64, 64, 96, 64, FP32, id="everything-is:pictures-replace-all-tokens"),
    pytest.param(1, 1, 8, 16, 8, 3, FP32, id="one-patch"),
    pytest.param(5, 1, 8, 16, 2100, 7, FP32, id="one-patch-a-picture:rows-copied-by-two-programs"),
    pytest.param(2, 70, 72, 300, 264, 200, BF16, id="bf16-ragged-tiles-of-128"),
    pytest.param(2, 70, 72, 300, 264, 200, FP16, id="fp16-ragged-tiles-of-128"),
]


@pytest.mark.interpreted
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize(("pictures", "patches", "vision", "hidden", "out", "tokens", "dtype"), SHAPES)
def test_projection(pictures, patches, vision, hidden, out, tokens, dtype, activation):
    positions = scattered(pictures * patches, tokens)
    inputs = tensors(pictures, patches, vision, hidden, out, tokens, dtype)
    compare(results(kernel(positions, activation), inputs), written_out(positions, activation), inputs)


@pytest.mark.interpreted
def test_without_biases_and_with_more_tiles_than_a_band_or_programs(monkeypatch):
    monkeypatch.setattr("vlm_kernels.product.BAND", 2)
    monkeypatch.setattr(module, "PROGRAMS", 3)
    positions = scattered(150, 160)
    inputs = tensors(6, 25, 24, 70, 40, 160, bias=False)
    compare(results(kernel(positions), inputs), written_out(positions, "gelu"), inputs)


@pytest.mark.interpreted
@pytest.mark.parametrize("learns", [*NAMES, "nothing"])
def test_only_one_argument_learns(learns):
    """Pretraining freezes the features and the embeddings; each gradient must come without the others."""
    positions, inputs = scattered(14, 20), tensors(2, 7, 24, 40, 36, 20)
    all_learn = results(kernel(positions), inputs)
    leaves = [x.clone().requires_grad_(name == learns) for name, x in zip(NAMES, inputs, strict=True)]
    out = kernel(positions)(*leaves)
    assert torch.equal(out, all_learn[0])
    assert out.requires_grad == (learns != "nothing")
    if learns != "nothing":
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)))
        for name, leaf, gradient in zip(NAMES, leaves, all_learn[1:], strict=True):
            if name == learns:
                torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-6)
            else:
                assert leaf.grad is None


@pytest.mark.interpreted
def test_tensors_with_strides_are_read_in_place_and_left_alone():
    positions, inputs = scattered(14, 20), tensors(2, 7, 24, 40, 36, 20)
    wide = [torch.cat([x, x + 1], -1) if x.dim() > 1 else x for x in inputs]

    def part(call):
        return lambda *given: call(*(x[..., : x.shape[-1] // 2] if x.dim() > 1 else x for x in given))

    before = [x.clone() for x in wide]
    compare(results(part(kernel(positions)), wide), part(written_out(positions, "gelu")), wide)
    assert all(torch.equal(x, y) for x, y in zip(wide, before, strict=True))
    inputs[0] = inputs[0].transpose(0, 1).contiguous()

    def turned(call):
        return lambda x, *rest: call(x.transpose(0, 1), *rest)

    compare(results(turned(kernel(positions)), inputs), turned(written_out(positions, "gelu")), inputs)


@pytest.mark.interpreted
def test_the_class_token_and_replaced_embeddings_are_never_read():
    positions, inputs = scattered(14, 20), tensors(2, 7, 24, 40, 36, 20)
    clean = results(kernel(positions), inputs)
    dirty = [x.clone() for x in inputs]
    dirty[3][positions] = torch.nan
    dirty[0][:, 0] = torch.nan
    out = kernel(positions)(*(x.requires_grad_() for x in dirty))
    assert torch.equal(out, clean[0])
    gradients = torch.autograd.grad(out.sum(), dirty[:1] + dirty[2:])
    assert not any(x.isnan().any() for x in gradients)
    assert not gradients[0][:, 0].any()


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 1, 5)], ids=["no-pictures", "pictures-of-a-class-token-only"])
def test_nothing_to_project_gives_zero_gradients(shape):
    inputs = [torch.zeros(shape), random(16, 5), random(6, 16), random(4, 6)]
    out, *gradients = results(kernel(torch.zeros(0, dtype=torch.long)), inputs)
    assert torch.equal(out, inputs[3])
    assert not any(x.any() for x in gradients[:3])


@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore:overflow")  # exp in 1 / (1 + exp), whose limit 0 is meant
@pytest.mark.parametrize("scale", [60.0, 1e-3], ids=["saturated", "linear"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations_at_extreme_scales(activation, scale):
    positions, inputs = scattered(14, 20), tensors(2, 7, 24, 40, 36, 20)
    inputs[0] *= scale
    compare(results(kernel(positions, activation), inputs), written_out(positions, activation), inputs)


def sharded(rank, size, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    group = distributed.group.WORLD
    positions, inputs = scattered(2 * 9, 30), tensors(2, 9, 24, 64, 36, 30)
    part = slice(rank * 64 // size, (rank + 1) * 64 // size)
    mine = list(inputs)
    mine[1], mine[2], mine[4] = inputs[1][part], inputs[2][:, part].contiguous(), inputs[4][part]
    for call in (project_image_tokens, reference.project_image_tokens):
        got = results(kernel(positions, call=call, group=group), mine)
        for index, dim in ((2, 0), (3, 1), (5, 0)):
            parts = [torch.empty_like(got[index]) for _ in range(size)]
            distributed.all_gather(parts, got[index])
            got[index] = torch.cat(parts, dim)
        compare(got, written_out(positions, "gelu"), inputs)
    distributed.destroy_process_group()


@pytest.mark.interpreted
@pytest.mark.parametrize("ranks", [2, 4])
def test_split_over_ranks(ranks, tmp_path):
    """fc1 by rows, fc2 by columns: ranks equal the fp64 result of one, kernel and twin."""
    # Forked, not spawned: importing torch and triton again would take ten times as long as the test.
    multiprocessing.start_processes(sharded, (ranks, str(tmp_path)), nprocs=ranks, start_method="fork")


@pytest.mark.interpreted
@pytest.mark.parametrize("call", [project_image_tokens, reference.project_image_tokens], ids=["kernel", "twin"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(2, 4, 6)}, r"features: expected \[N, 1 \+ P, 5\], received \(2, 4, 6\)"),
        ({"features": torch.zeros(2, 0, 5)}, r"features: expected \[N, 1 \+ P, 5\], received \(2, 0, 5\)"),
        ({"fc1": torch.zeros(7)}, r"fc1: expected \[F, D_vision\], received \(7,\)"),
        ({"fc2": torch.zeros(6, 8)}, r"fc2: expected \[D, 7\] after fc1 \(7, 5\), received \(6, 8\)"),
        ({"into": torch.zeros(9, 7)}, r"into: expected \[T, 6\] for fc2 \(6, 7\), received \(9, 7\)"),
        ({"bias1": torch.zeros(6)}, r"bias1: expected \[7\], received \(6,\)"),
        ({"bias2": torch.zeros(7)}, r"bias2: expected \[6\], received \(7,\)"),
        ({"fc2": torch.zeros(6, 7, dtype=BF16)}, "fc2: torch.bfloat16 on cpu differs from features, torch.float32"),
        ({"into": torch.zeros(9, 6, dtype=FP16)}, "into: torch.float16 on cpu differs from features"),
        ({"positions": torch.arange(5)}, r"positions: expected \[6\] for features \(2, 4, 5\), received \(5,\)"),
        ({"positions": torch.arange(6).int()}, "positions: expected int64 on cpu, received torch.int32 on cpu"),
        ({"positions": torch.arange(6) + 4}, r"positions: received 4 .. 9, into has the rows 0 .. 8"),
        ({"positions": torch.arange(6) - 1}, r"positions: received -1 .. 4, into has the rows 0 .. 8"),
        ({"positions": torch.tensor([0, 1, 2, 3, 3, 4])}, "positions: each may appear once, received 6 with 5 differ"),
        ({"activation": "relu"}, r"activation: expected .*one of \['gelu', 'gelu_tanh'\], received 'relu'"),
    ],
)
def test_bad_input_is_refused_by_name(change, message, call):
    given = {
        "features": torch.zeros(2, 4, 5),
        "fc1": torch.zeros(7, 5),
        "fc2": torch.zeros(6, 7),
        "into": torch.zeros(9, 6),
        "positions": torch.arange(6),
    }
    with pytest.raises(ValueError, match=message):
        call(**(given | change))


@pytest.mark.interpreted
def test_second_derivatives_are_refused():
    inputs = [x.requires_grad_() for x in tensors(2, 7, 24, 40, 36, 20)]
    out = kernel(scattered(14, 20))(*inputs)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["features", "fc1", "fc2", "into"])
def test_layouts_and_types_that_the_kernels_do_not_read_are_refused(name):
    given = {
        "features": torch.zeros(2, 4, 5),
        "fc1": torch.zeros(7, 5),
        "fc2": torch.zeros(6, 7),
        "into": torch.zeros(9, 6),
    }
    with pytest.raises(ValueError, match="features: dtype must be one of .* received torch.float64"):
        project_image_tokens(**{n: x.double() for n, x in given.items()}, positions=torch.arange(6))
    given[name] = given[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.raises(ValueError, match=f"{name}: the last dimension must be contiguous, received strides"):
        project_image_tokens(**given, positions=torch.arange(6))


def test_without_a_gpu_it_is_the_twin():
    positions, inputs = scattered(14, 20), tensors(2, 7, 24, 40, 36, 20)
    twin = results(kernel(positions, call=reference.project_image_tokens), inputs)
    for mine, plain in zip(results(kernel(positions), inputs), twin, strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("dtype", "vision", "hidden", "tanh"),
    [
        pytest.param(BF16, 128, 256, False, id="bf16-gelu"),
        pytest.param(BF16, 128, 256, True, id="bf16-gelu_tanh"),
        pytest.param(FP16, 128, 256, False, id="fp16-gelu"),
        pytest.param(BF16, 96, 288, False, id="bf16-gelu-widths-not-a-multiple-of-their-tiles"),
        pytest.param(FP32, 128, 256, False, id="fp32-gelu"),
    ],
)
def test_compiled_for_hopper(dtype, vision, hidden, tanh):
    inputs = [x.requires_grad_() for x in tensors(2, 16, vision, hidden, hidden, 64, dtype)]
    x, fc1, fc2, into, bias1, bias2 = inputs

    def run():
        out = module._ProjectImageTokens.apply(x, fc1, fc2, bias1, bias2, into, torch.arange(32), tanh, None)
        out.backward(torch.ones_like(out))

    label = f"{str(dtype)[6:]} {'gelu_tanh' if tanh else 'gelu'} {vision} -> {hidden}"
    compiled = aot.compile_launches(label, module, run)
    products = [c for c in compiled if "rows" not in c.name]
    assert [c.name.split()[0] for c in products] == [
        "first_layer_kernel",
        "second_layer_kernel",
        "hidden_gradient_kernel",
    ]
    aot.check(products, matrix=dtype != FP32)
    aot.check([c for c in compiled if "rows" in c.name], matrix=False)
    aot.check_recorded(compiled)


@pytest.mark.compiled
def test_compiled_for_hopper_without_options():
    """No biases, nothing to keep for backward, and rows that a group sums before they are placed."""
    x, fc1, fc2, into = tensors(2, 16, 128, 256, 256, 64, BF16, bias=False)

    def run():
        module._ProjectImageTokens.apply(x, fc1, fc2, None, None, into, torch.arange(32), False, None)
        module._second_layer(x.new_empty(34, 256), fc2, None, None, x.new_empty(32, 256), 17)

    compiled = aot.compile_launches("bfloat16 plain", module, run)
    products = [c for c in compiled if "rows" not in c.name]
    assert len(products) == 3
    aot.check(products)
    aot.check_recorded(products)
