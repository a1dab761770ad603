"""One run, three frameworks: the same parameters after 200 steps."""

from __future__ import annotations

import array_api_compat.numpy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import mlbfgs_core as core
from mlbfgs_jax import mlbfgs
from mlbfgs_torch import MLBFGS
from tests.helpers import to_numpy

pytestmark = pytest.mark.backends("numpy", "torch", "jax")

STEPS, RATE, MOMENTUM, DECAY = 200, 0.004, 0.9, 0.1
NAMES = ("hidden.weight", "hidden.bias", "out.weight", "out.bias")
SETTINGS = {
    "default": {},
    "every step": {"check_every": 1, "history_size": 4},
    "fixed": {"adaptive": False, "update_every": 7},
    "fit": {"preset": "fit"},
    "paper": {"preset": "paper", "update_every": 20},
    "formulas": {"preset": "formulas"},
    "single history": {"history_dtype": "float32", "preconditioner": "none"},
}


def problem(dtype):
    """Initial parameters and mini-batches of a network with one hidden layer of 16 units."""
    rng = np.random.default_rng(0)
    shapes = [(8, 16), (16,), (16, 3), (3,)]
    params = [(rng.normal(size=shape) / np.sqrt(shape[0])).astype(dtype) for shape in shapes]
    inputs = rng.normal(size=(STEPS, 64, 8))
    targets = np.sin(inputs @ rng.normal(size=(8, 3)))
    return params, inputs.astype(dtype), targets.astype(dtype)


def gradient(params, x, target, tanh):
    """Of half the mean squared error, written out, so that every framework computes the same."""
    weight, bias, out_weight, out_bias = params
    hidden = tanh(x @ weight + bias)
    error = (hidden @ out_weight + out_bias - target) / x.shape[0]
    back = (error @ out_weight.T) * (1 - hidden * hidden)
    return [x.T @ back, back.sum(0), hidden.T @ error, error.sum(0)]


def run_numpy(settings, blocks, dtype):
    params, inputs, targets = problem(dtype)
    config, partition = core.Config(**settings), core.partition(NAMES, blocks)
    ahead = "preset" not in settings  # those of SETTINGS with one have heavy-ball momentum
    state = core.Method(config, partition).init(params, xp=array_api_compat.numpy)
    momentum = [np.zeros_like(param) for param in params]
    for x, target in zip(inputs, targets, strict=True):
        grads = gradient(params, x, target, np.tanh)
        update, state = core.Method(config, blocks=partition).step(state, params, grads)
        momentum = [MOMENTUM * old + new for old, new in zip(momentum, update, strict=True)]
        change = [d + MOMENTUM * u if ahead else u for d, u in zip(update, momentum, strict=True)]
        params = [p - RATE * (u + DECAY * p) for p, u in zip(params, change, strict=True)]
    return params, int(state.pairs[0])


def run_torch(settings, blocks, dtype):
    params, inputs, targets = problem(dtype)
    params = [torch.nn.Parameter(torch.asarray(param)) for param in params]
    optimizer = MLBFGS(zip(NAMES, params, strict=True), RATE, MOMENTUM, DECAY, blocks=blocks, **settings)
    for x, target in zip(torch.asarray(inputs), torch.asarray(targets), strict=True):
        with torch.no_grad():
            grads = gradient(params, x, target, torch.tanh)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    return params, int(optimizer.diagnostics()[0].pairs[0])


def run_jax(settings, blocks, dtype):
    params, inputs, targets = problem(dtype)
    tx = mlbfgs(RATE, MOMENTUM, DECAY, blocks=blocks, **settings)
    params = dict(zip(NAMES, map(jnp.asarray, params), strict=True))

    def step(carry, batch):
        params, state = carry
        grads = gradient([params[name] for name in NAMES], *batch, jnp.tanh)
        updates, state = tx.update(dict(zip(NAMES, grads, strict=True)), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), (inputs, targets))
    return [params[name] for name in NAMES], int(state[0].pairs[0])


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "blocks"), [*((name, "all") for name in SETTINGS), ("default", "layer"), ("fit", "layer")]
)
def test_three_frameworks_reach_the_same_parameters(name, blocks, dtype):
    expected, pairs = run_numpy(SETTINGS[name], blocks, dtype)
    assert pairs >= 4
    for run in (run_torch, run_jax):
        params, count = run(SETTINGS[name], blocks, dtype)
        error = max(np.max(np.abs(to_numpy(a) - to_numpy(b))) for a, b in zip(params, expected, strict=True))
        assert count == pairs
        assert error < (1e-10 if dtype == "float64" else 1e4 * np.finfo(dtype).eps)


def test_the_decay_of_the_published_recipe_is_a_term_of_the_gradient_in_torch_and_in_jax():
    params, inputs, targets = problem("float64")
    settings = {"preset": "paper", "update_every": 20}
    ours = [torch.nn.Parameter(torch.asarray(param)) for param in params]
    optimizer = MLBFGS(
        zip(NAMES, ours, strict=True), weight_decay=DECAY, decoupled_weight_decay=False, **settings
    )
    tx = optax.chain(optax.add_decayed_weights(DECAY), mlbfgs(0.1, **settings))
    theirs = list(map(jnp.asarray, params))
    state, update = tx.init(theirs), jax.jit(tx.update)
    for x, target in zip(inputs[:100], targets[:100], strict=True):
        updates, state = update(gradient(theirs, x, target, jnp.tanh), state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        with torch.no_grad():
            grads = gradient(ours, torch.asarray(x), torch.asarray(target), torch.tanh)
        for param, grad in zip(ours, grads, strict=True):
            param.grad = grad
        optimizer.step()
    assert int(optimizer.diagnostics()[0].pairs[0]) >= 4
    assert max(np.max(np.abs(to_numpy(a) - to_numpy(b))) for a, b in zip(ours, theirs, strict=True)) < 1e-10
