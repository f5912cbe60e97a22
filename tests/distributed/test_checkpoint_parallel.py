"""A checkpoint does not know how many ranks wrote it: weights, optimizer and logits are the same at another split."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import distributed, multiprocessing

FIXTURES = Path(__file__).parents[1] / "unit"
sys.path.insert(0, str(FIXTURES))


def logits(model):
    import model_fixtures as fixtures

    batch = fixtures.packed([(31, 1), (20, 0), (33, 2)])
    model.eval()
    tokens_BS = batch.tokens_S[:40].view(2, 20)
    return model.logits(tokens_BS, torch.arange(20).repeat(2, 1), last_only=False)


def build(folder: Path, tensor: int):
    import model_fixtures as fixtures

    from vlm.model import build_from_checkpoint

    fixtures.initialize(tensor)
    return build_from_checkpoint(folder / "combined", parallel=fixtures.settings(tensor=tensor).parallel)


def train(model, folder: Path, settings: Path, saved: Path | None):
    """Two steps with gradients that are the same on every split; saves in the middle, or resumes there."""
    from vlm import checkpoint, config
    from vlm.train import optimizer

    model.freeze(("projector", "language"))
    wrapped = optimizer.wrap(model)
    run = config.load(settings)
    adam, schedule = optimizer.build(wrapped, run, next(iter(run.stages.values())))
    parts = {"model": wrapped, "optimizer": adam, "scheduler": schedule}
    if saved is None:
        step(model, adam, schedule)
        saved = checkpoint.save_stage(
            folder / "stage",
            stage="sft",
            iteration=1,
            parent=folder / "combined",
            trainable=("projector", "language"),
            identity="x",
            loader=b"the place of the first rank",
            **parts,
        )
    else:
        resumed = checkpoint.load_stage(saved, **parts)
        assert resumed.loader == b"the place of the first rank"
    step(model, adam, schedule)
    return logits(model)


def step(model, adam, schedule) -> None:
    schedule.step(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.main_grad.fill_(0.5)
    adam.step()


def worker(rank: int, folder: Path, settings: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT="0")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    from vlm import parallel, weights

    model = build(folder, 2)
    loaded = logits(model)
    weights.load_exported(model, folder / "exported")
    from_export = logits(model)
    trained = train(model, folder, settings, None)
    resumed = train(build(folder, 2), folder, settings, folder / "stage")
    torch.save((loaded, from_export, trained, resumed), folder / f"{rank}.pt")
    parallel.destroy()


def test_two_tensor_parallel_ranks_and_one(tmp_path):
    from folder_fixtures import make_combined

    from vlm import checkpoint, parallel
    from vlm.export.llava import export
    from vlm.model import build_from_checkpoint

    combined = make_combined(tmp_path)
    export(combined, tmp_path / "exported")
    model = build(tmp_path, 1)
    alone = logits(model)
    multiprocessing.spawn(worker, args=(tmp_path, tmp_path / "config.yaml"), nprocs=2)
    for rank in (0, 1):
        loaded, from_export, trained, resumed = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(loaded, alone, atol=1e-4, rtol=0)
        assert torch.equal(loaded, from_export)
        assert torch.equal(trained, resumed)
        assert (trained - alone).abs().max() > 0.1
    # One rank goes on from what two wrote: as a model.
    continued = build_from_checkpoint(tmp_path / "stage")
    step_one = checkpoint.Tensors(tmp_path / "stage")
    for name, tensor in continued.state_dict().items():
        if "_extra_state" not in name:
            stored = step_one.read(name)
            assert torch.equal(stored[: len(tensor)], tensor), name
    # And as a resumed stage: there is one data-parallel rank before and after.
    resumed_alone = train(continued, tmp_path, tmp_path / "config.yaml", tmp_path / "stage")
    torch.testing.assert_close(resumed_alone, trained, atol=1e-4, rtol=0)
    parallel.destroy()
