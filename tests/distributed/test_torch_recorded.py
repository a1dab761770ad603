"""The trajectories that one process recorded, by several."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mlbfgs_torch import MLBFGS
from tests.recorded.problem import DATA, NONE_AT, STRIDE, Case, arguments, deviation, follow, start, tolerance

from .processes import on_ranks

ONE_BLOCK = [
    Case("default", "all", "missing"),
    Case("clip", "all", "not finite"),
    Case("power 0.3", "all"),
    Case("paper", "all"),
    Case("lbfgs", "all"),
]
BLOCKS = [Case("default", "layer", "missing"), Case("power 0", "parameter")]
KINDS = {"replicated": [*ONE_BLOCK, *BLOCKS], "sharded": [*ONE_BLOCK, *BLOCKS], "owned": ONE_BLOCK}
"""Owners know no names of parameters, hence no layers."""


class Spread:
    """A run that all processes share; each computes the whole gradient from the whole parameters."""

    def __init__(self, kind, case):
        self.mesh, self.kind = init_device_mesh("cpu", (dist.get_world_size(),)), kind
        self.params = {name: nn.Parameter(self.place(array)) for name, array in start().items()}
        settings = arguments(case)
        if kind == "owned":
            from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns of what it uses itself

            blocks = settings.pop("blocks")
            owned = partial(MLBFGS, shard_group=dist.group.WORLD, blocks=blocks)
            self.optimizer = ZeroRedundancyOptimizer(self.params.values(), owned, **settings)
        else:
            self.optimizer = MLBFGS(self.params.items(), **settings)

    def place(self, array):
        tensor = torch.asarray(np.array(array))
        if self.kind != "sharded":
            return tensor
        return distribute_tensor(tensor, self.mesh, [Shard(0) if tensor.ndim else Replicate()])

    def values(self):
        params = [param.detach() for param in self.params.values()]
        return [(p.full_tensor() if isinstance(p, DTensor) else p).numpy().copy() for p in params]

    def step(self, grads):
        for param, grad in zip(self.params.values(), grads, strict=True):
            param.grad = None if grad is None else self.place(grad)
        self.optimizer.step()


def followed(kind):
    return [follow(Spread(kind, case), case) for case in KINDS[kind]]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_trajectories_are_those_recorded(kind, count):
    with np.load(DATA / "trajectories.npz") as recorded:
        for runs in on_ranks(count, followed, kind):
            for case, actual in zip(KINDS[kind], runs, strict=True):
                expected = recorded[str(case)]
                # Owners count a step at which all gradients are missing, one process does not.
                if kind == "owned" and case.gradients == "missing":
                    actual, expected = (rows[: NONE_AT // STRIDE] for rows in (actual, expected))
                assert deviation(actual, expected) <= tolerance(case), str(case)
