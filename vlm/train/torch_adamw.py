"""Saving and resuming megatron-core's distributed optimizer around torch's AdamW.

megatron-core 0.16.1 is used with the FusedAdam of Transformer Engine or Apex, which counts steps per group. torch
counts them per parameter, and what megatron-core has for that case cannot be loaded, or trains on with wrong numbers.
The lines below are those of megatron/core/optimizer/distrib_optimizer.py. With a FusedAdam nothing here acts.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, distributed

from vlm import parallel

_load_state_dict = DistributedOptimizer.load_state_dict


def install() -> None:
    """Replace three methods; a no-op where Transformer Engine or Apex is installed, and when called again."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states


def state_dict(self: DistributedOptimizer) -> dict[str, Any]:
    """Groups with the number of steps; parameters come apart. Called by all ranks.

    Lines 640-643 want a step of every rank: there is none before the first, and on a rank without a parameter of its
    own (a pipeline stage whose part is frozen, more ranks than elements) there never is.
    """
    done = max((float(state["step"]) for state in self.optimizer.state.values()), default=0.0)
    step = torch.tensor(done, device=parallel.device())
    distributed.all_reduce(step, op=distributed.ReduceOp.MAX)
    groups = [
        {**{key: value for key, value in group.items() if key != "params"}, "step": step.item()}
        for group in self.optimizer.state_dict()["param_groups"]
    ]
    return {"optimizer": {"param_groups": groups}}


def load_state_dict(self: DistributedOptimizer, state: dict[str, Any]) -> None:
    """Lines 818-824 give all parameters one tensor, which each of them then counts up."""
    _load_state_dict(self, state)
    for of_parameter in self.optimizer.state.values():
        of_parameter["step"] = of_parameter["step"].clone()


def set_main_param_and_optimizer_states(
    self: DistributedOptimizer, model_param: Tensor, tensors: dict[str, Tensor]
) -> None:
    """Lines 937-940 look for the step among the loaded tensors; it came with the groups."""
    group, order = self.model_param_group_index_map[model_param]
    main = self.optimizer.param_groups[group]["params"][order]
    for key, value in {"param": main, **self.optimizer.state[main]}.items():
        if key != "step":
            value.detach().copy_(tensors[key])
