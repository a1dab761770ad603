"""One small problem, trained by one process or by several on their parts of each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlbfgs_torch import MLBFGS

__all__ = ["STEPS", "batches", "deviation", "make_model", "part_of", "train", "trained_alone"]

STEPS = 40
BATCH = 24
# A refresh every few steps, so that a short run has many.
SETTINGS: dict[str, Any] = {"lr": 0.05, "update_every": 6, "history_size": 3}


class Model(nn.Module):
    """Shapes that no number of processes divides; a scale of one value, so that most shards of it are empty."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden = nn.Linear(5, 13, dtype=dtype)
        self.inner = nn.Linear(13, 7, dtype=dtype)
        self.outer = nn.Linear(7, 3, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Three values for each of 5."""
        return self.scale * self.outer(torch.tanh(self.inner(torch.tanh(self.hidden(x)))))


def make_model(dtype: torch.dtype = torch.float64) -> Model:
    """The same start on every process."""
    torch.manual_seed(0)
    return Model(dtype)


def batches(steps: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, with noise."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
        noise = torch.randn(BATCH, 3, generator=generator, dtype=torch.float64)
        yield x.to(dtype), (torch.sin(x[:, :3] + x[:, 2:]) + 0.05 * noise).to(dtype)


def part_of(tensor: Tensor) -> Tensor:
    """This process's part of a batch."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Any,
    part: Callable[[Tensor], Tensor] = part_of,
) -> None:
    """A plain loop."""
    for x, y in data:
        optimizer.zero_grad()
        (model(part(x)) - part(y)).square().mean().backward()
        optimizer.step()


def trained_alone(steps: int = STEPS, blocks: Any = "all", **settings: Any) -> dict[str, Tensor]:
    """Parameters after training in one process."""
    model = make_model()
    optimizer = MLBFGS(model.named_parameters(), blocks=blocks, **{**SETTINGS, **settings})
    train(model, optimizer, batches(steps), part=lambda tensor: tensor)
    return {name: param.detach() for name, param in model.named_parameters()}


def deviation(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference relative to the largest value of a parameter."""
    assert actual.keys() == expected.keys()
    return max(
        float((actual[name] - value).abs().max() / value.abs().max()) for name, value in expected.items()
    )
