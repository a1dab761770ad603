"""Settings and oracles that the tests of all libraries share."""

from __future__ import annotations

import numpy as np

import mlbfgs_core as core
from mlbfgs_core.reference import Reference

FAST = {"adaptive": False, "update_every": 2, "history_size": 3}
"""A pair every other step, so that short tests run on the quasi-Newton path."""
ADAPTIVE = {"update_every": 6, "check_every": 1, "history_size": 3}


def rosenbrock(x):
    """Of NumPy, PyTorch and JAX."""
    return (100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2).sum()


class Descent:
    """The dense twin, with momentum and decoupled weight decay, on one flat vector."""

    def __init__(self, settings, x, lr, momentum=0.0, weight_decay=0.0, nesterov=True):
        self.x, self.velocity = x, np.zeros_like(x)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.nesterov = nesterov
        self.reference = Reference(core.Config(**settings), [len(x)])

    def step(self, grad):
        before = self.reference.skipped
        (direction,) = self.reference.step([self.x], [grad])
        if self.reference.skipped == before:
            self.velocity = self.momentum * self.velocity + direction
            change = direction + self.momentum * self.velocity if self.nesterov else self.velocity
            self.x = self.x - self.lr * (change + self.weight_decay * self.x)
