"""A model, data and comparisons that the tests of all trainers share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mlbfgs_torch import MLBFGS

FAST = {"adaptive": False, "update_every": 2, "history_size": 3}
"""A pair every other step, so that short tests run on the quasi-Newton path."""


def make_model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def make_data(batches, dtype=torch.float64, size=16):
    """Batches of inputs and of noiseless targets, which the model can learn."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(4, 2, generator=generator)
    inputs = [torch.randn(size, 4, generator=generator) for _ in range(batches)]
    return [(batch.to(dtype), torch.sin(batch @ mixing).to(dtype)) for batch in inputs]


def squared_error(model, inputs, targets):
    return (model(inputs) - targets).square().mean()


def mean_loss(model, data):
    with torch.no_grad():
        return sum(squared_error(model, *batch).item() for batch in data) / len(data)


def backward(model, optimizer, batch):
    """The gradients of one batch."""
    optimizer.zero_grad()
    squared_error(model, *batch).backward()


def train(model, optimizer, data, scheduler=None):
    """The plain loop that every trainer must reproduce."""
    for batch in data:
        backward(model, optimizer, batch)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return model


def weights(model):
    return [param.detach().clone() for param in model.parameters()]


def flat(model):
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])


def assert_same(a, b):
    """Equality to the last bit of two lists of tensors."""
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def assert_different(a, b):
    assert not all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_quasi_newton(optimizer):
    """Pairs have been stored, so the steps were not those of plain momentum."""
    assert all(int(count) > 0 for record in optimizer.diagnostics() for count in record.pairs)


def tensors(optimizer):
    """A copy of everything that the optimizer remembers."""
    return copy.deepcopy(optimizer.state_dict()["state"])


EPOCH = 6
"""Batches of an epoch."""


def make_epoch():
    return make_data(EPOCH, torch.float32)


def make_optimizer(model, lr=0.1, **settings):
    return MLBFGS(model.parameters(), lr=lr, weight_decay=0.001, **{**FAST, **settings})


def cosine(optimizer, steps):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


each_build = pytest.mark.parametrize(
    "build",
    [
        make_optimizer,
        lambda model: make_optimizer(model, adaptive=True, check_every=1, update_every=5),
        lambda model: MLBFGS(model.named_parameters(), blocks="layer", **FAST),
        lambda model: make_optimizer(model, preset="fit"),
    ],
    ids=["fixed interval", "adaptive", "blocks", "fit"],
)
