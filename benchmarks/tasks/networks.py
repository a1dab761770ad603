"""The networks of the tasks; at most about 100,000 parameters."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from .data import CONTEXT, VOCABULARY, WORDS

__all__ = [
    "Residual",
    "autoencoder",
    "bag",
    "classifier",
    "convolutions",
    "digits",
    "factorisation",
    "field",
    "frozen",
    "gru",
    "logistic",
    "low_rank",
    "resnet",
    "small_field",
    "transformer",
    "vit",
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


def small_field() -> nn.Module:
    """2-20-20-20-1, tanh: 921 parameters, few enough for a dense matrix of their curvature."""
    return _layers(2, 20, 20, 20, 1, activation=nn.Tanh)


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


class Residual(nn.Module):
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
        self.around = self.way_around(inputs, outputs, stride)

    def way_around(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        """What the input passes on its way around the body."""
        return nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


def resnet() -> nn.Module:
    """Three residual blocks of 8, 16 and 32 channels."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Residual(8, 8, 1),
        Residual(8, 16, 2),
        Residual(16, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class _Layer(nn.Module):
    """Self-attention and a feed-forward network, normalised first (pre-norm)."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, -1)
        query, key, value = (
            part.reshape(shape).transpose(1, 2) for part in self.inward(self.first(x)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.outward(mixed.transpose(1, 2).flatten(2))
        return x + self.feed(self.second(x))


class _Transformer(nn.Module):
    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.layers = nn.Sequential(*(_Layer(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.tokens(codes) + self.places)))


def transformer() -> nn.Module:
    """Two layers of width 48 with four heads."""
    return _Transformer(48, 4, 2)


class _Recurrent(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.body = nn.GRU(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, VOCABULARY)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.body(self.tokens(codes))[0])


def gru() -> nn.Module:
    """A gated recurrent unit of 64 numbers."""
    return _Recurrent(32, 64)


class _Patches(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) for 28 x 28 pixels in 16 patches."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.places = nn.Parameter(torch.randn(16, width) * 0.02)
        self.layers = nn.Sequential(*(_Layer(width, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images.unflatten(1, (1, 28, 28))).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.layers(patches + self.places).mean(dim=1)))


def vit() -> nn.Module:
    """Two layers of width 32 with four heads."""
    return _Patches(32, 4, 2)


def convolutions() -> nn.Module:
    """Three convolutions without normalisation, of 8, 16 and 32 channels."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def bag() -> nn.Module:
    """The mean of a window's words, 16 numbers each, and 16-32-9."""
    return nn.Sequential(nn.EmbeddingBag(WORDS, 16), *_layers(16, 32, 9, activation=nn.ReLU))


def frozen(trained: nn.Sequential) -> nn.Module:
    """The trained classifier, of which only the last two layers go on learning."""
    trained[0].requires_grad_(False)
    return trained


class _Adapted(nn.Module):
    """A layer that is kept, and a product of two thin matrices that is added (LoRA, Hu et al. 2022)."""

    def __init__(self, kept: nn.Linear, rank: int) -> None:
        super().__init__()
        self.kept = kept.requires_grad_(False)
        self.down = nn.Linear(kept.in_features, rank, bias=False)
        self.up = nn.Linear(rank, kept.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.kept(x) + self.up(self.down(x))


def low_rank(trained: nn.Sequential) -> nn.Module:
    """The trained classifier with an adapter of rank 4 in each layer, and nothing else that learns."""
    return nn.Sequential(*(_Adapted(part, 4) if isinstance(part, nn.Linear) else part for part in trained))
