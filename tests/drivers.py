"""The adapters behind one interface: named float64 parameters in, gradients in, parameters out."""

from __future__ import annotations

import copy
from functools import cache

import jax
import numpy as np
import optax
import torch

import mlbfgs_arrays
import mlbfgs_core as core
import mlbfgs_jax
import mlbfgs_torch
from mlbfgs_core import adapter

_STATIC = (
    "history_size",
    "adaptive",
    "step_length",
    "history_dtype",
    "preconditioner",
    "max_preconditioner_dim",
    "preset",
)
"""Settings that determine the state or the program."""
HYPERPARAMETERS = {"lr": "learning_rate"}
"""Arguments that optax calls by another name."""


def counts(figures=None):
    """Accepted steps, skipped steps, and each block's pairs."""
    if figures is None:
        return 0, 0, []
    return int(figures.step), int(figures.skipped), [int(n) for n in figures.pairs]


class TorchDriver:
    """`mlbfgs_torch.MLBFGS`."""

    def __init__(self, named, *, lr=0.1, blocks="all", **settings):
        self.params = {name: torch.nn.Parameter(torch.asarray(a.copy())) for name, a in named.items()}
        self.optimizer = mlbfgs_torch.MLBFGS(self.params.items(), lr, blocks=blocks, **settings)

    def values(self):
        return [param.detach().numpy().copy() for param in self.params.values()]

    def put(self, name, index, value):
        with torch.no_grad():
            self.params[name].view(-1)[index] = value

    def step(self, grads):
        for param, grad in zip(self.params.values(), grads, strict=True):
            param.grad = None if grad is None else torch.asarray(grad.copy())
        self.optimizer.step()

    def set(self, name, value):
        for group in self.optimizer.param_groups:
            group[name] = value

    def add(self, name, array):
        self.params[name] = torch.nn.Parameter(torch.asarray(array.copy()))
        group = {
            k: v for k, v in self.optimizer.param_groups[0].items() if k not in ("params", "param_names")
        }
        self.optimizer.add_param_group({**group, "params": [(name, self.params[name])]})

    def save(self, path):
        self.optimizer.save_state(path)

    def load(self, path):
        self.optimizer.load_state(path)

    def native(self):
        return copy.deepcopy(self.optimizer.state_dict())

    def load_native(self, state):
        self.optimizer.load_state_dict(state)

    def counts(self):
        return counts(*self.optimizer.diagnostics())  # nothing before the first step

    def copied(self):
        return copy.deepcopy(self)


class ArrayDriver:
    """`mlbfgs_arrays.MLBFGS`."""

    def __init__(self, named, *, lr=0.1, blocks="all", **settings):
        self.params = {name: array.copy() for name, array in named.items()}
        self.optimizer = mlbfgs_arrays.MLBFGS(self.params, lr, blocks=blocks, **settings)

    def values(self):
        return [param.copy() for param in self.params.values()]

    def put(self, name, index, value):
        self.params[name].flat[index] = value

    def step(self, grads):
        self.optimizer.step(dict(zip(self.params, grads, strict=True)))

    def set(self, name, value):
        if name in ("lr", "momentum", "weight_decay"):
            setattr(self.optimizer, name, value)
        else:
            old = self.optimizer.config
            settings = {field: getattr(old, field) for field in adapter.SETTINGS}
            self.optimizer.config = core.Config(**{**settings, name: value})

    def save(self, path):
        self.optimizer.save_state(path)

    def load(self, path):
        self.optimizer.load_state(path)

    def native(self):
        return self.optimizer.state_dict()

    def load_native(self, state):
        self.optimizer.load_state_dict(state)

    def counts(self):
        return counts(*self.optimizer.diagnostics())

    def copied(self):
        return copy.deepcopy(self)


class JaxDriver:
    """`mlbfgs_jax.mlbfgs`, whose numbers are traced, so that one compiled step serves every change."""

    def __init__(self, named, *, lr=0.1, blocks="all", **settings):
        self.tx, self.update = _jax_training(blocks, tuple(settings.items()))
        self.params = jax.tree.map(jax.numpy.array, dict(named))
        self.names, self.blocks = list(named), blocks
        self.state = self.tx.init(self.params)
        self.set("lr", lr)

    def values(self):
        return [np.array(self.params[name]) for name in self.names]

    def put(self, name, index, value):
        flat = self.params[name].reshape(-1).at[index].set(value)
        self.params[name] = flat.reshape(self.params[name].shape)

    def step(self, grads):
        grads = dict(zip(self.names, grads, strict=True))
        self.params, self.state = self.update(grads, self.state, self.params)

    def set(self, name, value):
        numbers = self.state.hyperparams
        name = HYPERPARAMETERS.get(name, name)
        value = jax.numpy.asarray(value, numbers[name].dtype)
        self.state = self.state._replace(hyperparams={**numbers, name: value})

    def save(self, path):
        mlbfgs_jax.save_state(path, self.params, self.state, blocks=self.blocks)

    def load(self, path):
        self.params, self.state = mlbfgs_jax.load_state(path, self.params, self.state, blocks=self.blocks)

    def native(self):
        return jax.tree.map(np.array, (self.params, self.state))

    def load_native(self, state):
        self.params, self.state = jax.tree.map(jax.numpy.array, state)

    def counts(self):
        return counts(core.diagnostics(self.state.inner_state[0]))

    def copied(self):
        return copy.copy(self)


@cache
def _jax_training(blocks, settings):
    """The transformation, every number of which is traced, and its compiled step."""
    static = ("blocks", "mask", "nesterov", *_STATIC)
    given = dict(settings)
    config = core.Config(**{name: given[name] for name in ("preset", *adapter.SETTINGS) if name in given})
    explicit = {name: getattr(config, name) for name in adapter.SETTINGS}
    explicit = {name: value for name, value in explicit.items() if value is not None}
    factory = optax.inject_hyperparams(mlbfgs_jax.mlbfgs, static_args=static)
    tx = factory(0.1, blocks=blocks, **{**given, **explicit})

    @jax.jit
    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return {name: x if updates[name] is None else x + updates[name] for name, x in params.items()}, state

    return tx, update


DRIVERS = {"torch": TorchDriver, "numpy": ArrayDriver, "jax": JaxDriver}
