"""`optimistix.minimise` finds SciPy's minimum along the directions of mL-BFGS, with Optimistix's searches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
import scipy.optimize
from optimistix_solver import MLBFGS

from tests.embedding.helpers import ADAPTIVE, FAST, Descent, rosenbrock

START = jnp.asarray([-1.2, 1.0, 0.5, -0.3])
SCALES = jnp.geomspace(0.1, 10.0, 5)


def minimise(fn, y0, args=None, solver=None, **options):
    solver = MLBFGS(rtol=1e-9, atol=1e-9) if solver is None else solver
    return optx.minimise(fn, solver, y0, args, **options)


def test_the_minimum_of_rosenbrock_is_that_of_scipy():
    solution = minimise(lambda y, _: rosenbrock(y), START)
    expected = scipy.optimize.minimize(
        scipy.optimize.rosen, np.asarray(START), jac=scipy.optimize.rosen_der, method="BFGS"
    )
    assert solution.result == optx.RESULTS.successful
    np.testing.assert_allclose(solution.value, expected.x, atol=1e-4)
    curvature = solution.state.descent_state.curvature
    assert curvature.pairs[0] > 10
    # Points that the search has rejected are none of the method's steps.
    assert curvature.step < solution.stats["num_steps"]


def test_parameters_may_be_a_tree_and_the_call_may_be_jitted():
    def fn(y, target):
        return jnp.sum((y["a"] - target) ** 2) + 3.0 * (y["b"] * y["b"] - 1.0) ** 2, y["b"]

    @jax.jit
    def solve(target):
        start = {"a": jnp.zeros((2, 3)), "b": jnp.asarray(0.5)}
        solution = minimise(fn, start, target, has_aux=True)
        return solution.value, solution.aux

    value, aux = solve(jnp.arange(6.0).reshape(2, 3))
    np.testing.assert_allclose(value["a"], np.arange(6.0).reshape(2, 3), atol=1e-6)
    np.testing.assert_allclose([value["b"], aux], 1.0, atol=1e-6)


@pytest.mark.parametrize("settings", [FAST, ADAPTIVE], ids=["fixed interval", "adaptive"])
def test_with_a_learning_rate_each_step_is_that_of_the_dense_twin(settings):
    search = optx.LearningRate(0.04)
    solver = MLBFGS(rtol=0.0, atol=0.0, search=search, **{"preset": "default", **settings})
    twin = Descent(settings, np.ones(5), lr=0.04)
    for _ in range(12):
        twin.step(np.asarray(SCALES) * twin.x)

    def fn(y, _):
        return jnp.sum(SCALES * y**2) / 2

    # The first of Optimistix's steps evaluates the start.
    solution = minimise(fn, jnp.ones(5), solver=solver, max_steps=13, throw=False)
    np.testing.assert_allclose(solution.value, twin.x, rtol=1e-9)
    assert solution.state.descent_state.curvature.pairs[0] > 0


def test_a_nan_gradient_ends_the_solve_where_it_stands():
    def fn(y, _):
        return jnp.sum(jnp.sqrt(y**2))  # at 0 finite, with a derivative of NaN

    solution = minimise(fn, jnp.asarray([0.0, 2.0]), throw=False)
    assert solution.result == optx.RESULTS.nonfinite
    np.testing.assert_array_equal(solution.value, [0.0, 2.0])
    assert solution.state.descent_state.curvature.skipped == 1


def test_a_region_without_a_value_is_backed_out_of():
    solution = minimise(lambda y, _: jnp.sum(y - jnp.log(y)), jnp.asarray([0.01, 3.0]))
    np.testing.assert_allclose(solution.value, 1.0, atol=1e-6)


def test_many_starts_are_solved_at_once():
    starts = jnp.stack([START, jnp.zeros(4), 2.0 - START])
    solve = jax.vmap(lambda y0: minimise(lambda y, _: rosenbrock(y), y0, max_steps=1000).value)
    np.testing.assert_allclose(solve(starts), 1.0, atol=1e-4)


def test_the_minimum_can_be_differentiated():
    def minimum(target):
        return minimise(lambda y, args: jnp.sum(SCALES * (y - args**3) ** 2), jnp.zeros(5), target).value

    target = jnp.linspace(0.5, 1.5, 5)
    np.testing.assert_allclose(jax.jacobian(minimum)(target), jnp.diag(3 * target**2), atol=1e-5)
