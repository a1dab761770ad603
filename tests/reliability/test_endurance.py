"""Long runs: memory does not grow, and stored quantities do not drift from what they represent."""

from __future__ import annotations

import gc
import multiprocessing
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlbfgs_core as core
from mlbfgs_arrays import MLBFGS
from mlbfgs_core.two_loop import two_loop
from tests.drivers import DRIVERS

from .runs import begin, step

DIM = 6
EPS = np.finfo(np.float32).eps


def peak_memory(kind, connection):
    """Peak memory in kB, after 1,000 and after 11,000 steps."""
    driver = begin(kind)
    for steps in (1_000, 10_000):
        for count in range(steps):
            step(driver, count)
        gc.collect()
        connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@pytest.mark.parametrize("kind", DRIVERS)
def test_memory_is_flat_over_ten_thousand_steps(kind):
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=peak_memory, args=(kind, theirs))
    process.start()
    theirs.close()
    early, late = ours.recv(), ours.recv()
    process.join()
    assert late - early < 1_500  # 150 bytes a step


def noisy(key_or_rng, x):
    curvature = np.geomspace(0.1, 10.0, DIM).astype(np.float32)
    if isinstance(key_or_rng, np.random.Generator):
        return curvature * x + key_or_rng.normal(size=DIM).astype(np.float32) / 20
    return curvature * x + jax.random.normal(key_or_rng, (DIM,), jnp.float32) / 20


def assert_no_drift(config, state):
    """The Gram matrix is that of the stored rows, and the middle matrix that of the Gram matrix, in
    float64."""
    rows = np.asarray(state.history[0], dtype=np.float64).reshape(2 * config.history_size, DIM)
    lengths = np.linalg.norm(rows, axis=1)
    scale = np.outer(lengths, lengths)
    gram = np.asarray(state.gram[0], dtype=np.float64)
    assert np.all(np.abs(gram - rows @ rows.T) <= 4 * DIM * EPS * scale)
    exact, gamma = two_loop(gram[None], np.asarray(state.pairs), np)
    inverse = gamma[0] * np.eye(DIM) + rows.T @ exact[0] @ rows
    stored = (
        float(state.gamma[0]) * np.eye(DIM) + rows.T @ np.asarray(state.middle_matrix[0], np.float64) @ rows
    )
    assert np.linalg.norm(stored - inverse) <= 1e-3 * np.linalg.norm(inverse)
    newest = (int(state.pairs[0]) - 1) % config.history_size
    s, y = rows[newest], rows[config.history_size + newest]
    assert np.linalg.norm(stored @ y - s) <= 1e-3 * np.linalg.norm(s)


@pytest.mark.parametrize("settings", [{}, {"preset": "fit"}], ids=str)
def test_nothing_drifts_in_a_hundred_thousand_steps_of_jax(settings):
    config = core.Config(**settings)

    def one(carry, key):
        x, state = carry
        grad = jnp.where(jax.random.uniform(key) < 0.01, jnp.nan, noisy(key, x))
        update, state = core.Method(config).step(state, [x], [grad], when_due=decide)
        return (x - 0.05 * update[0], state), None

    def decide(predicate, part, operand):
        return jax.lax.cond(predicate, part, lambda same: same, operand)

    @jax.jit
    def ten_thousand(carry, key):
        return jax.lax.scan(one, carry, jax.random.split(key, 10_000))[0]

    x = jnp.ones(DIM, jnp.float32)
    carry = (x, core.Method(config).init([x], xp=jnp))
    for part in range(10):
        carry = ten_thousand(carry, jax.random.key(part))
        assert_no_drift(config, carry[1])
    x, state = carry
    assert np.linalg.norm(x) < 1
    assert int(state.step) + int(state.skipped) == 100_000
    assert int(state.skipped) > 500
    assert int(state.pairs[0]) + int(state.rejected[0]) > 1_000  # "fit" comes to rest, and s is 0 then


def test_nothing_drifts_in_a_hundred_thousand_steps_of_numpy():
    rng, x = np.random.default_rng(0), np.ones(DIM, np.float32)
    optimizer = MLBFGS(x, lr=0.05)
    for count in range(100_000):
        grad = noisy(rng, x)
        if count % 100 == 7:
            grad[count % DIM] = np.nan
        optimizer.step(grad)
        if count % 10_000 == 9_999:
            assert_no_drift(optimizer.config, optimizer.units[0].export()[0])
    (figures,) = optimizer.diagnostics()
    assert (int(figures.step), int(figures.skipped)) == (99_000, 1_000)
    assert int(figures.pairs[0]) > 1_000
    assert np.linalg.norm(x) < 1
