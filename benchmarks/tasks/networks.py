"""The networks of the tasks; at most about 100,000 parameters."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from .data import CONTEXT, VOCABULARY

__all__ = [
    "autoencoder",
    "classifier",
    "digits",
    "factorisation",
    "field",
    "logistic",
    "resnet",
    "transformer",
]


def _layers(*widths: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Linear layers with activations between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def autoencoder() -> nn.Module:
    """784-64-32-8 and back, tanh."""
    return _layers(784, 64, 32, 8, 32, 64, 784, activation=nn.Tanh)


def classifier() -> nn.Module:
    """784-64-64-10, ReLU."""
    return _layers(784, 64, 64, 10, activation=nn.ReLU)


def digits() -> nn.Module:
    """64-32-32-10, ReLU."""
    return _layers(64, 32, 32, 10, activation=nn.ReLU)


def field() -> nn.Module:
    """2-32-32-32-1, tanh: a function of two coordinates."""
    return _layers(2, 32, 32, 32, 1, activation=nn.Tanh)


def logistic(features: int) -> Callable[[], nn.Module]:
    """Logistic regression of two classes."""
    return lambda: nn.Linear(features, 2)


class _Factorisation(nn.Module):
    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(rows, rank) * 0.1)
        self.columns = nn.Parameter(torch.randn(columns, rank) * 0.1)

    def forward(self, places: Tensor) -> Tensor:
        return (self.rows[places[:, 0]] * self.columns[places[:, 1]]).sum(dim=1)


def factorisation() -> nn.Module:
    """1,797 x 64, rank 8."""
    return _Factorisation(1_797, 64, 8)


class _Residual(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


def resnet() -> nn.Module:
    """Three residual blocks of 8, 16 and 32 channels."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        _Residual(8, 8, 1),
        _Residual(8, 16, 2),
        _Residual(16, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class _Layer(nn.Module):
    """Causal self-attention and a feed-forward network, normalised first (pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, -1)
        query, key, value = (
            part.reshape(shape).transpose(1, 2) for part in self.inward(self.first(x)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.outward(mixed.transpose(1, 2).flatten(2))
        return x + self.feed(self.second(x))


class _Transformer(nn.Module):
    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.layers = nn.Sequential(*(_Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.tokens(codes) + self.places)))


def transformer() -> nn.Module:
    """Two layers of width 48 with four heads."""
    return _Transformer(48, 4, 2)
