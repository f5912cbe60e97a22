"""Weight tables place every number where megatron-core looks for it, and folders are read and written byte for byte."""

from __future__ import annotations

import json

import pytest
import torch
from model_fixtures import LANGUAGE, VISION

from vlm.weights import Folder, language_table, projector_table, vision_table, write_sharded
from vlm.weights.tables import grouped


def test_queries_keys_and_values_interleave_per_group():
    # 2 groups, 2 heads each, head_dim 1: rows of q, k, v carry their own name as a number
    q, k, v = (torch.tensor(rows).view(-1, 1) for rows in ([10, 11, 12, 13], [20, 21], [30, 31]))
    layout = grouped(2)
    joined = layout.join([q, k, v])
    assert joined.flatten().tolist() == [10, 11, 20, 30, 12, 13, 21, 31]
    assert [part.flatten().tolist() for part in layout.split(joined, [(4, 1), (2, 1), (2, 1)])] == [
        [10, 11, 12, 13],
        [20, 21],
        [30, 31],
    ]


@pytest.mark.parametrize(
    "table",
    [
        language_table(LANGUAGE),
        language_table(LANGUAGE | {"tie_word_embeddings": True}),
        vision_table(VISION),
        projector_table(32, 56, 48, bias=True),
        projector_table(32, 56, 48, bias=False),
    ],
    ids=["mistral", "tied", "clip", "projector", "projector-without-bias"],
)
def test_every_row_joins_to_its_shape_and_splits_back(table):
    names = [name for row in table.rows for name in row.theirs]
    assert len(names) == len(set(names))
    assert len({row.ours for row in table.rows}) == len(table.rows)
    for row in table.rows:
        theirs = [torch.randn(shape) for shape in row.shapes]
        ours = row.join(theirs)
        assert tuple(ours.shape) == row.shape
        for name, tensor in zip(row.theirs, theirs, strict=True):
            assert torch.equal(row.split(ours)[name], tensor), name


def test_padding_of_the_vocabulary_is_cut_off():
    row = next(row for row in language_table(LANGUAGE).rows if row.ours.endswith("output_layer.weight"))
    padded = torch.randn(row.shape[0] + 13, row.shape[1])
    assert torch.equal(row.split(padded)["lm_head.weight"], padded[: row.shape[0]])


@pytest.mark.parametrize("max_shard_bytes, files", [(10**9, 1), (300, 3)], ids=["one-file", "shards-and-index"])
def test_written_shards_are_what_safetensors_reads(tmp_path, max_shard_bytes, files):
    from safetensors.torch import load_file

    tensors = {
        "wide": torch.randn(8, 8),
        "half": torch.randn(5, 7).bfloat16(),
        "scalar": torch.tensor(3.0),
        "last": torch.randn(60),
    }
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    written: list[int] = []
    write_sharded(tmp_path, specs, iter(tensors.items()), max_shard_bytes, written.append)
    assert sum(written) == sum(tensor.nbytes for tensor in tensors.values())
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        found.update(load_file(path))
    folder = Folder(tmp_path)
    assert len(folder.files) == files
    assert found.keys() == tensors.keys() == folder.entries.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        assert torch.equal(folder.read(name), tensor)
    if files > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
