"""One small problem, trained by one process, or by several that share each batch."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from mlbfgs_torch import MLBFGS

__all__ = [
    "LAYOUTS",
    "SETTINGS",
    "STEPS",
    "Model",
    "batches",
    "deviation",
    "digest",
    "make_model",
    "parallel",
    "train",
    "trained_alone",
    "whole",
]

STEPS = 24
BATCH = 24
SETTINGS: dict[str, Any] = {"lr": 0.003, "update_every": 4, "history_size": 3}
"""A refresh every few steps, so that a short run has many."""
TENSOR_PARALLEL = {"hidden": ColwiseParallel(), "inner": RowwiseParallel()}
LAYOUTS = ("ddp", "fsdp", "hsdp", "tensor", "fsdp_tensor", "offload", "mixed")
Part = Callable[[Tensor], Tensor]


class Model(nn.Module):
    """Most shapes are divided by no number of processes; of one value, most processes hold nothing."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden = nn.Linear(5, 12, dtype=dtype)
        self.inner = nn.Linear(12, 7, dtype=dtype)
        self.outer = nn.Linear(7, 3, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x: Tensor, *, shallow: bool = False) -> Tensor:
        """Three values for each of 5; a shallow pass leaves out one layer."""
        x = torch.tanh(self.hidden(x))
        return self.scale * self.outer(x[:, :7] if shallow else torch.tanh(self.inner(x)))


def make_model(dtype: torch.dtype = torch.float64) -> Model:
    """The same start on every process."""
    torch.manual_seed(0)
    return Model(dtype)


def batches(
    steps: int, *, first: int = 0, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of steps, with noise."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
        noise = torch.randn(BATCH, 3, generator=generator, dtype=torch.float64)
        yield x.to(dtype), (torch.sin(x[:, :3] + x[:, 2:]) + 0.05 * noise).to(dtype)


def parallel(model: Model, layout: str, device: str = "cpu") -> tuple[nn.Module, Part]:
    """The model in a layout over all processes, and which part of a batch this process takes."""
    world = dist.get_world_size()
    if layout == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True), _part(
            init_device_mesh(device, (world,))
        )
    if layout == "tensor":
        mesh = init_device_mesh(device, (world,))
        return parallelize_module(model, mesh, TENSOR_PARALLEL), lambda tensor: tensor
    if layout == "fsdp_tensor":
        mesh = init_device_mesh(device, (2, world // 2), mesh_dim_names=("data", "model"))
        parallelize_module(model, mesh["model"], TENSOR_PARALLEL)
        fully_shard(model, mesh=mesh["data"])
        return model, _part(mesh["data"])
    if layout == "hsdp":
        mesh = init_device_mesh(device, (2, world // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
        return model, lambda tensor: tensor.chunk(world)[dist.get_rank()]
    mesh = init_device_mesh(device, (world,))
    if layout == "mixed":  # the plain parameter's gradient is not reduced: all see the whole batch
        fully_shard(model, mesh=mesh, ignored_params={model.scale})
        return model, lambda tensor: tensor
    offload = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if layout == "offload" else {}
    fully_shard(model.inner, mesh=mesh, **offload)
    fully_shard(model, mesh=mesh, **offload)
    return model, _part(mesh)


def _part(mesh: DeviceMesh) -> Part:
    return lambda tensor: tensor.chunk(mesh.size())[mesh.get_local_rank()]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterable[tuple[Tensor, Tensor]],
    part: Part = lambda tensor: tensor,
) -> None:
    """A plain loop."""
    for x, y in data:
        optimizer.zero_grad()
        (model(part(x)) - part(y)).square().mean().backward()
        optimizer.step()


@functools.cache
def trained_alone(steps: int = STEPS, blocks: Any = "all", **settings: Any) -> dict[str, Tensor]:
    """Parameters after training in one process."""
    model = make_model()
    train(model, MLBFGS(model.named_parameters(), blocks=blocks, **{**SETTINGS, **settings}), batches(steps))
    return whole(model)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, gathered where they are sharded."""
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in model.named_parameters()
    }


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A digest of the bits of all parameters and state that this process holds."""
    found = hashlib.sha256()
    for param in model.parameters():
        values = {"": param, **optimizer.state.get(param, {})}
        for name, value in sorted(values.items()):
            if isinstance(value, Tensor):
                value = value.to_local() if isinstance(value, DTensor) else value
                value = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            found.update(f"{name}={value!r}".encode())
    return found.hexdigest()


def deviation(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference relative to the largest value of a parameter."""
    assert actual.keys() == expected.keys()
    return max(
        float((actual[name] - value).abs().max() / value.abs().max()) for name, value in expected.items()
    )
