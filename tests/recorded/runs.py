"""The recorded runs, by each backend."""

from __future__ import annotations

from functools import cache
from typing import Any

import array_api_strict
import jax
import numpy as np

import mlbfgs_core as core
import mlbfgs_jax
import mlbfgs_torch
from tests.drivers import DRIVERS, counts

from .problem import Case, arguments, start

__all__ = ["KINDS", "begin", "readers"]


class CoreDriver:
    """`mlbfgs_core.Method` in the strict namespace, with the end of a step written out."""

    def __init__(self, named, *, lr, momentum, weight_decay, nesterov, blocks="all", **settings):
        self.method = core.Method(core.Config(**settings), core.partition(list(named), blocks))
        self.params = [array_api_strict.asarray(array) for array in named.values()]
        self.state = self.method.init(self.params)
        self.buffers = [array_api_strict.zeros_like(param) for param in self.params]
        self.lr, self.momentum, self.weight_decay, self.nesterov = lr, momentum, weight_decay, nesterov

    def values(self):
        return [np.asarray(param).copy() for param in self.params]

    def step(self, grads):
        if all(grad is None for grad in grads):
            return
        given = [None if grad is None else array_api_strict.asarray(grad) for grad in grads]
        update, self.state = self.method.step(self.state, self.params, given)
        if not bool(self.state.accepted):
            return
        for i, d in enumerate(update):
            if d is not None:
                self.buffers[i] = self.momentum * self.buffers[i] + d
                u = d + self.momentum * self.buffers[i] if self.nesterov else self.buffers[i]
                self.params[i] = self.params[i] - self.lr * (u + self.weight_decay * self.params[i])

    def counts(self):
        return counts(core.diagnostics(self.state))


class PlainJaxDriver(DRIVERS["jax"]):
    """`mlbfgs_jax.mlbfgs` with its settings given once and for all, and its step compiled."""

    def __init__(self, named, *, blocks="all", **settings):
        tx, self.update = _jax_training(blocks, tuple(settings.items()))
        self.params = jax.tree.map(jax.numpy.array, dict(named))
        self.names, self.blocks, self.state = list(named), blocks, tx.init(self.params)

    def counts(self):
        return counts(core.diagnostics(self.state[0]))


class GroupsDriver(DRIVERS["torch"]):
    """`mlbfgs_torch.MLBFGS` with two groups; the second has settings of its own."""

    def __init__(self, named, *, lr, blocks="all", **settings):
        super().__init__(named, lr=lr, blocks=blocks, **settings)
        first = [(name, param) for name, param in self.params.items() if name.startswith("first")]
        second = [(name, param) for name, param in self.params.items() if not name.startswith("first")]
        groups = [{"params": first}, {"params": second, "history_size": 2, "lr": lr / 2}]
        self.optimizer = mlbfgs_torch.MLBFGS(groups, lr, blocks=blocks, **settings)


@cache
def _jax_training(blocks, settings):
    settings = dict(settings)
    tx = mlbfgs_jax.mlbfgs(settings.pop("lr"), blocks=blocks, **settings)

    @jax.jit
    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return {name: x if updates[name] is None else x + updates[name] for name, x in params.items()}, state

    return tx, update


KINDS = {**DRIVERS, "jax": PlainJaxDriver, "groups": GroupsDriver, "strict": CoreDriver}


def begin(kind: str, case: Case, named: dict[str, np.ndarray] | None = None) -> Any:
    """A run before its first step."""
    return KINDS[kind](start() if named is None else named, **arguments(case))


def readers(case: Case) -> list[str]:
    """The adapters that can run a case, the one that is recorded first."""
    return ["torch", "jax"] if case.settings == "bfloat16 history" else ["numpy", "torch", "jax"]
