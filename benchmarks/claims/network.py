"""A network so small that its Hessian can be computed: digits of 8 x 8 pixels, 64-16-10, tanh."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from .pairs import Array

__all__ = [
    "COUNT",
    "Path",
    "full_gradient",
    "gradient",
    "hessian",
    "hessian_product",
    "loss",
    "start",
    "train",
]

SHAPES = ((16, 64), (16,), (10, 16), (10,))
CUTS = [int(np.prod(shape)) for shape in SHAPES]
COUNT = 1797
"""Number of images."""


Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Path(NamedTuple):
    """The parameters of each step, and the gradients there, of a mini-batch and of all images."""

    params: list[Array]
    gradients: list[Array]
    full: list[Array]
    loss: float
    """The loss over all images at the end."""


@cache
def _data() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.as_tensor(images / 16.0), torch.as_tensor(labels, dtype=torch.int64)


def start(seed: int) -> Tensor:
    """Flat parameters with the usual uniform weights."""
    generator = torch.Generator().manual_seed(seed)
    fan_in = (64, 64, 16, 16)
    draws = [torch.rand(n, generator=generator, dtype=torch.float64) for n in CUTS]
    return torch.cat([(2 * u - 1) / np.sqrt(fan) for u, fan in zip(draws, fan_in, strict=True)])


def loss(flat: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Cross-entropy over the chosen images, by default over all."""
    images, labels = _data()
    if chosen is not None:
        images, labels = images[chosen], labels[chosen]
    w1, b1, w2, b2 = (part.reshape(shape) for part, shape in zip(flat.split(CUTS), SHAPES, strict=True))
    return nn.functional.cross_entropy(torch.tanh(images @ w1.T + b1) @ w2.T + b2, labels)


def gradient(flat: Tensor, chosen: Tensor | None = None) -> Array:
    """Gradient of the loss over the chosen images."""
    flat = flat.detach().requires_grad_()
    return torch.autograd.grad(loss(flat, chosen), flat)[0].numpy()


def full_gradient(x: Array) -> Array:
    """Gradient of the loss over all images."""
    return gradient(torch.as_tensor(x))


def hessian(x: Array) -> Array:
    """The exact Hessian of the loss over all images."""
    return torch.func.jacrev(torch.func.grad(loss), chunk_size=64)(torch.as_tensor(x)).detach().numpy()


def hessian_product(x: Array, v: Array) -> Array:
    """The Hessian of the loss over all images times a vector."""
    flat = torch.as_tensor(x).requires_grad_()
    along = torch.autograd.grad(loss(flat), flat, create_graph=True)[0] @ torch.as_tensor(v)
    return torch.autograd.grad(along, flat)[0].numpy()


def batches(size: int, seed: int) -> Callable[[], Tensor]:
    """Independent draws of distinct images."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randperm(COUNT, generator=generator)[:size]


def train(
    optimizer_of: Optimizers,
    size: int,
    steps: int,
    seed: int = 0,
    *,
    record: bool = True,
    decay: bool = False,
) -> Path:
    """Train with mini-batches of this size; with `decay` the learning rate falls along a cosine."""
    flat = nn.Parameter(start(seed))
    optimizer = optimizer_of([flat])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw, path = batches(size, seed + 1), Path([], [], [], 0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        flat.grad = torch.as_tensor(gradient(flat, draw()))
        if record:
            path.params.append(flat.detach().numpy().copy())
            path.gradients.append(flat.grad.numpy().copy())
            path.full.append(gradient(flat))
        optimizer.step()
        if decay:
            schedule.step()
    return path._replace(loss=float(loss(flat.detach())))


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that determines the paths on which pairs are only observed."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
