"""The method's claims on noisy quadratics: stability, Newton's speed, Newton's noise floor.

Curvature log-spaced in [10 / condition, 10], learning rate 0.1, 300 steps, 20 seeds; exact Newton
runs on the same noise. JAX maps the core over the seeds.
"""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlbfgs_core as core
from benchmarks.claims.quadratics import PROBLEMS, RATE, SEEDS, STEPS

FIT = core.Config(preset="fit")
LBFGS = core.Config(preset="lbfgs")
LBFGS_10 = core.Config(preset="lbfgs", update_every=10)
FORMULAS_10 = core.Config(preset="formulas", update_every=10)
RECIPE = core.Config(preset="paper")


@cache
def run(config, dim, problems):
    """Losses of problems ``((condition, sigma), ...)`` of one dimension, each with all seeds.

    At the start (problems, seeds), and after each step with the optimizer and with exact Newton.
    """

    def one(condition, sigma, key):
        curvature = 10 * condition ** -jnp.linspace(1, 0, dim)
        start_key, noise_key = jax.random.split(key)
        start = jax.random.normal(start_key, (dim,))

        def loss(x):
            return 0.5 * jnp.sum(curvature * x * x)

        def body(carry, noise):
            x, newton, state = carry
            update, state = core.Method(config).step(state, [x], [curvature * x + noise])
            x = x - RATE * update[0]
            newton = newton - RATE * (curvature * newton + noise) / curvature
            return (x, newton, state), (loss(x), loss(newton))

        carry = (start, start, core.Method(config).init([start]))
        noise = sigma * jax.random.normal(noise_key, (STEPS, dim))
        return loss(start), *jax.lax.scan(body, carry, noise)[1]

    conditions, sigmas = (jnp.asarray(column, dtype=float) for column in zip(*problems, strict=True))
    keys = jax.random.split(jax.random.PRNGKey(0), SEEDS)
    over_seeds = jax.vmap(one, in_axes=(None, None, 0))
    return tuple(
        map(np.asarray, jax.jit(jax.vmap(over_seeds, in_axes=(0, 0, None)))(conditions, sigmas, keys))
    )


def runs(config, dims=(2, 20, 200, 1000)):
    """`run` for each dimension."""
    for dim in dims:
        yield run(config, dim, tuple(problem[1:] for problem in PROBLEMS if problem[0] == dim))


def diverged(config, **dims):
    """How many runs exceed ten times their first loss."""
    return sum(
        int(np.sum(np.any(~(losses <= 10 * start[..., None]), axis=-1)))
        for start, losses, _ in runs(config, **dims)
    )


def test_no_run_of_fit_diverges_under_noise():
    assert diverged(FIT) == 0


def test_no_run_of_the_published_recipe_diverges_under_noise():
    assert diverged(RECIPE, dims=(20,)) == 0


@pytest.mark.parametrize(
    ("config", "least"),
    [(LBFGS, 10), (LBFGS_10, 30), (FORMULAS_10, 50)],
    ids=["lbfgs, T=1", "lbfgs, T=10", "formulas, T=10"],
)
def test_the_controls_diverge_under_the_same_noise(config, least):
    assert diverged(config, dims=(20,)) >= least  # of 60 with noise


@pytest.mark.parametrize(("dim", "condition"), [(2, 10), (20, 100)])
def test_fit_needs_at_most_twice_newtons_steps_without_noise(dim, condition):
    start, losses, newton = run(FIT, dim, ((condition, 0.0),))
    steps = [np.argmax(values <= 1e-2 * start[..., None], axis=-1) + 1 for values in (losses, newton)]
    assert np.all(losses[..., -1] <= 1e-2 * start)
    assert np.median(steps[0] / steps[1]) <= 1.9


def test_noise_floor_of_fit_is_near_newtons():
    for dim, (_, losses, newton) in zip((2, 20, 200, 1000), runs(FIT), strict=True):
        noisy = [i for i, p in enumerate(q for q in PROBLEMS if q[0] == dim) if p[2] > 0]
        ratio = np.mean(losses[noisy, :, -75:], axis=-1) / np.mean(newton[noisy, :, -75:], axis=-1)
        assert np.all(np.median(ratio, axis=1) <= 3.0)
