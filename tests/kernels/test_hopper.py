"""The kernels that only Hopper runs: what ptxas makes of them, and what they are told about their tiles.

Their errors against fp64 are in kernels/benches/bench_attention.py, since no interpreter runs Gluon.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import aot
import pytest
import torch

from vlm_kernels import hopper
from vlm_kernels.hopper import tiles

FORWARD, BACKWARD = (importlib.import_module(f"vlm_kernels.hopper.{name}") for name in ("forward", "backward"))
BF16, FP16 = torch.bfloat16, torch.float16
COMPILED = {
    "bf16 K=64 full (CLIP)": (577, 32, 16, 1, 64, False, BF16, None),
    "bf16 K=128 causal (Mistral)": (4096, 2, 8, 4, 128, True, BF16, None),
    "bf16 K=128 causal packed": (1300, 1, 8, 4, 128, True, BF16, [600, 700]),
    "fp16 K=64 causal packed": (1300, 1, 8, 4, 64, True, FP16, [600, 700]),
    "bf16 K=128 full": (1024, 4, 8, 4, 128, False, BF16, None),
}


def projection(length, batch, groups, per_group, head_dim, dtype, packed):
    """Queries, keys and values as views of a fused projection."""
    tokens = (length,) if packed else (length, batch)
    fused = torch.empty(*tokens, groups, per_group + 2, head_dim, dtype=dtype)
    return fused[..., :per_group, :], fused[..., -2, :], fused[..., -1, :]


@pytest.mark.compiled
@pytest.mark.parametrize("label", COMPILED)
def test_compiles_for_hopper(label, monkeypatch):
    """Without spills forwards; backwards with a few words of them, as compiled.txt says."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    length, batch, groups, per_group, head_dim, causal, dtype, lengths = COMPILED[label]
    q, k, v = projection(length, batch, groups, per_group, head_dim, dtype, lengths is not None)
    borders = torch.tensor([0, *lengths]).cumsum(0).int() if lengths else None
    out = torch.empty(*q.shape[:-3], groups * per_group, head_dim, dtype=dtype)
    lse = torch.empty(batch, groups * per_group, length)
    name = f"hopper {label}"

    def backward():
        hopper.attention_backward(q, k, v, out, lse, torch.empty_like(out), causal, borders, 0.1)

    forwards = aot.compile_launches(
        name, FORWARD, lambda: hopper.attention_forward(q, k, v, causal, borders, softmax_scale=0.1)
    )
    backwards = aot.compile_launches(name, BACKWARD, backward)
    assert [x.name.split()[0] for x in forwards] == ["forward_kernel"]
    assert [x.name.split()[0] for x in backwards] == ["delta_kernel", "backward_kernel"]
    aot.check(forwards)
    aot.check([backwards[1]], spilled_bytes=320)
    aot.check([backwards[0]], matrix=False)
    for kernel in (forwards[0], backwards[1]):
        assert kernel.waits < kernel.hgmma / 2, f"ptxas puts every product behind the end of the last: {kernel}"
    aot.check_recorded([*forwards, *backwards])


@pytest.fixture
def taken(monkeypatch):
    """The tiles of each forward program, by the kernel's own arithmetic on plain numbers."""
    monkeypatch.setattr(FORWARD, "_tile_of", FORWARD._tile_of.fn)

    def walk(total, programs):
        return [
            [FORWARD._tile_of(turn, mine, programs) for turn in range(FORWARD._num_turns.fn(total, mine, programs))]
            for mine in range(programs)
        ]

    return walk


@pytest.mark.parametrize("programs", [1, 2, 132])
@pytest.mark.parametrize("total", [1, 131, 132, 133, 263, 264, 265, 2048])
def test_forward_programs_take_every_tile_once(total, programs, taken):
    assert sorted(tile for mine in taken(total, programs) for tile in mine) == list(range(total))


def test_forward_programs_have_equal_shares(taken):
    """At S 4096 the longest tiles see 32 times as many keys as the shortest; straight on, one program had 6 % more."""
    keys = [32 - tile // 64 for tile in range(32 * 64)]
    shares = [sum(keys[tile] for tile in mine) for mine in taken(len(keys), 132)]
    assert max(shares) <= 1.005 * sum(shares) / 132


@pytest.mark.parametrize(("sequences", "num_tiles"), [(64, 8), (16, 32), (8, 64), (8, 48), (24, 24), (8, 1), (1, 300)])
def test_backward_programs_wait_for_older_ones_alone(sequences, num_tiles, monkeypatch):
    """Key tiles of a sequence begin in their order, each once, and the longest of a window together."""
    monkeypatch.setattr(BACKWARD.gl, "minimum", min)
    together = BACKWARD.window(sequences, num_tiles, 132)
    places = [
        BACKWARD._place.fn(ticket, None, num_tiles, 1, sequences, together, 0, True, False)
        for ticket in range(sequences * num_tiles)
    ]
    begun = [(group, first) for group, batch, _, _, _, first, last in places]
    assert sorted(begun) == [(group, tile) for group in range(sequences) for tile in range(num_tiles)]
    for group in range(sequences):
        assert [tile for other, tile in begun if other == group] == list(range(num_tiles))
    assert [tile for _, tile in begun[:together]] == [0] * together


def test_a_window_is_what_runs_at_once_or_everything():
    assert BACKWARD.window(16, 32, 132) == 4
    assert BACKWARD.window(8, 48, 132) == 8, "two would leave 36 of 132 programs without a first tile"
    assert BACKWARD.window(15, 32, 132) == 15, "four would leave three for the end"
    assert BACKWARD.window(8, 300, 132) == 8


def test_tables_of_a_pack_hold_every_row_once():
    borders = torch.tensor([0, 300, 301, 429]).int()
    forwards, backwards = (tiles.table_of(borders, backward) for backward in (False, True))
    for table in (forwards, backwards):
        rows = [start + number * tiles.TILE for start, _, number, _ in table.tolist()]
        assert sorted(rows) == [0, 128, 256, 300, 301]
        assert {start: (length, first) for start, length, _, first in table.tolist()} == {
            0: (300, 0), 300: (1, 3), 301: (128, 4)
        }  # fmt: skip
    assert [number for _, _, number, _ in forwards.tolist()] == [2, 1, 0, 0, 0]
    assert [row[:3] for row in backwards.tolist()] == [
        [0, 300, 0], [0, 300, 1], [0, 300, 2], [300, 1, 0], [301, 128, 0]
    ]  # fmt: skip


def test_tables_are_made_anew_when_the_borders_change():
    borders = torch.tensor([0, 300]).int()
    assert tiles.table_of(borders, False) is not None and len(tiles.table_of(borders, False)) == 3
    borders[1] = 500
    assert len(tiles.table_of(borders, False)) == 4
    with torch.inference_mode():
        borders = torch.tensor([0, 100]).int()
        assert len(tiles.table_of(borders, False)) == 1
        borders[1] = 200
        assert len(tiles.table_of(borders, False)) == 2


def test_a_head_is_columns_of_a_matrix_of_rows():
    q, k, _ = projection(9, 3, 2, 4, 64, BF16, False)
    descriptor, strides = tiles.rows_of(k, 8), tiles.strides_of(q=q, k=k)
    matrix = k.as_strided(descriptor.shape, descriptor.strides)
    column = 2 * strides["stride_kb"] + 1 * strides["stride_kh"]
    torch.manual_seed(0)
    k.copy_(torch.randn(k.shape))
    assert torch.equal(matrix[:, column : column + 64], k[:, 2, 1])
    assert strides["stride_qg"] == q.stride(2) and strides["stride_qh"] == q.stride(3)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        pytest.param(torch.empty(4, 2, 64, dtype=BF16), True, id="contiguous"),
        pytest.param(torch.empty(4, 2, 65, dtype=BF16)[..., :64], False, id="rows-of-130-words"),
        pytest.param(torch.empty(2 * 64 + 1, dtype=BF16)[1:].view(1, 2, 64), False, id="first-word-unaligned"),
        pytest.param(torch.empty(1, 2, 64, dtype=BF16).expand(4, 2, 64), False, id="one-row-for-all"),
        pytest.param(torch.empty(64, 2, 4, dtype=BF16).permute(2, 1, 0), False, id="columns-first"),
        pytest.param(torch.empty(4, 2, 68, dtype=BF16)[..., :64], False, id="heads-of-136-bytes"),
        pytest.param(torch.empty(4, 1, 2, 72, dtype=BF16)[..., :64], True, id="heads-of-144-bytes"),
        pytest.param(torch.empty(8, 2, 64, dtype=BF16, device="meta").transpose(0, 1), True, id="batch-first"),
        pytest.param(
            torch.empty(129, 2**17, 128, dtype=BF16, device="meta").transpose(0, 1), False, id="columns-beyond-32-bits"
        ),
    ],
)
def test_what_the_copy_engine_can_address(x, expected):
    assert tiles.copyable(x) is expected


def test_without_hopper_the_portable_kernels_run():
    q, k, v = projection(128, 1, 2, 1, 64, BF16, False)
    assert not hopper.usable(q, k, v, True, None, None)
