"""`vlm plan`: parameters, memory, time and disk of a run from its configuration and the GPUs that it is to have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm import config as settings
from vlm import resources
from vlm.estimate import layouts
from vlm.estimate.estimate import Question, estimate
from vlm.estimate.text import text


def plan(
    config: Sequence[Path],
    gpu: str = "h100",
    gpus_per_node: int | None = None,
    nodes: int | None = None,
    language: Path | None = None,
    vision: Path | None = None,
    mfu: float | None = None,
    metrics: Path | None = None,
    as_json: bool = False,
) -> int:
    """Print what a run takes, and the smallest layout that fits.

    Args:
        config: settings of the run, whole, and overlays.
        gpu: name of a GPU, or `GiB:TFLOP/s[:GB/s]`.
        gpus_per_node, nodes: where they are not those of the settings, a layout is chosen for them.
        language, vision: Hugging Face folders of the base models, for their sizes.
        mfu: share of the peak to count with.
        metrics: metrics of a stage that ran, to count with their share of the peak.
        as_json: one JSON object instead of tables.

    Returns:
        0 where the run fits, 1 where it does not.

    Raises:
        ValueError: settings, a GPU or a layout that cannot be; sizes of base models that are nowhere.
    """
    run = _load(config)
    chosen = resources.gpu(gpu)
    results = config[0].parent.parent if config[0].resolve().parent.name == run.run else Path("results")
    bases = resources.bases(run, language=language, vision=vision, results=results)
    for name, value in (("--gpus-per-node", gpus_per_node), ("--nodes", nodes)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is not a number of machines or GPUs, which is at least 1")
    per_node, number = gpus_per_node or run.parallel.ranks_per_node, nodes or run.parallel.nodes
    hardware = {"ranks_per_node": per_node, "nodes": number}
    why = "as in the configuration"
    if hardware != {key: getattr(run.parallel, key) for key in hardware}:
        why = f"chosen for these GPUs; the configuration is for {run.parallel.nodes} x {run.parallel.ranks_per_node}"
        run = _choose(run, bases, chosen, per_node, number)
    found = estimate(Question(run, bases, chosen, per_node, results, mfu, metrics)) | {"layout_from": why}
    print(json.dumps(found, indent=2) if as_json else text(found))
    return 0 if found["fits"] else 1


def _load(paths: Sequence[Path]) -> settings.Config:
    merged: Any = {}
    for path in paths:
        merged = _over(merged, settings.read(path))
    return settings.validate(merged, where=" with ".join(map(str, paths)))


def _over(below: Any, above: Any) -> Any:
    """Overlay key by key, as Snakemake's `--configfile`."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _over(below.get(key), value) for key, value in above.items()}


def _choose(
    run: settings.Config, bases: resources.Bases, gpu: resources.Gpu, per_node: int, nodes: int
) -> settings.Config:
    """The fastest layout of so many GPUs, or of the least memory where none fits."""
    gpus = per_node * nodes
    found = layouts.candidates(run, bases, gpu, gpus, per_node, run.ordered_stages)
    if not found:
        raise ValueError(
            f"--gpus-per-node x --nodes: {gpus} GPUs cannot share the run; stages.*.global_batch must be a multiple of "
            "the data-parallel ranks, and the models' sizes of the others"
        )
    best = layouts.best(found, gpu) or min(found, key=lambda one: one.peak_bytes)
    return best.config
