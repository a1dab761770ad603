"""`minimize_mlbfgs` as a method of `scipy.optimize.minimize`."""

from __future__ import annotations

import itertools
import sys
import warnings

import numpy as np
import pytest
from scipy import optimize
from scipy.optimize import LinearConstraint, OptimizeWarning, minimize, rosen, rosen_der
from scipy.sparse.linalg import LinearOperator

import mlbfgs_core as core
from mlbfgs_core.reference import Reference, bfgs_inverse_hessian
from mlbfgs_scipy import Outcome, minimize_mlbfgs, run
from mlbfgs_scipy.curvature import Curvature
from mlbfgs_scipy.objective import Objective
from mlbfgs_scipy.textbook import Textbook, is_textbook
from tests.helpers import arrays_of, relative, spd

pytestmark = pytest.mark.backends("numpy")


def solve(fun, x0, *, jac=True, **arguments):
    return minimize(fun, x0, jac=jac, method=minimize_mlbfgs, **arguments)


def himmelblau(x):
    a, b = x[0] ** 2 + x[1] - 11, x[0] + x[1] ** 2 - 7
    return a**2 + b**2, np.asarray([4 * a * x[0] + 2 * b, 2 * a + 4 * b * x[1]])


def quadratic(matrix, centre):
    def fun(x):
        return 0.5 * (x - centre) @ matrix @ (x - centre), matrix @ (x - centre)

    return fun


def logistic(x):
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(60, 8)) * np.geomspace(0.1, 10, 8)
    signs = np.sign(inputs @ rng.normal(size=8) + 3 * rng.normal(size=60))
    margins = signs * (inputs @ x)
    value = np.mean(np.logaddexp(0, -margins)) + 1e-3 * x @ x
    weights = -signs * np.exp(-np.logaddexp(0, margins)) / 60
    return value, inputs.T @ weights + 2e-3 * x


def rosenbrock(x):
    return rosen(x), rosen_der(x)


QUADRATIC = quadratic(spd(np.random.default_rng(2), 30, condition=1e3), np.arange(30.0))
PROBLEMS = {
    "Rosenbrock, 2": (rosenbrock, [-1.2, 1.0]),
    "Rosenbrock, 20": (rosenbrock, np.tile([-1.2, 1.0], 10)),
    "Himmelblau": (himmelblau, [1.0, 1.0]),
    "quadratic": (QUADRATIC, np.zeros(30)),
    "logistic": (logistic, np.zeros(8)),
}


class Counted:
    """A function that remembers where it was called."""

    def __init__(self, function):
        self.function, self.points = function, []

    def __call__(self, x, *args):
        self.points.append(x.copy())
        return self.function(x, *args)

    @property
    def distinct(self):
        return len({x.tobytes() for x in self.points})


# Minima.


@pytest.mark.parametrize("name", PROBLEMS)
def test_minima_are_those_of_lbfgsb_and_bfgs(name):
    fun, x0 = PROBLEMS[name]
    result = solve(fun, x0, options={"gtol": 1e-7})
    assert result.success
    assert result.status == 0
    assert np.max(np.abs(result.jac)) <= 1e-7
    np.testing.assert_array_equal(result.jac, fun(result.x)[1])
    assert result.fun == fun(result.x)[0]
    for method in ("L-BFGS-B", "BFGS"):
        options = {"ftol": 0.0} if method == "L-BFGS-B" else {}
        theirs = minimize(fun, x0, jac=True, method=method, options={"gtol": 1e-7, **options})
        np.testing.assert_allclose(result.x, theirs.x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(result.fun, theirs.fun, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_minimum_far_from_zero_is_approached_beyond_the_rounding_of_values(seed):
    def fun(x):
        return rosen(x) + 1e6 + 2e-10 * np.sin(1e9 * np.sum(x)), rosen_der(x)

    result = solve(fun, 2 * np.random.default_rng(seed).normal(size=4), options={"gtol": 1e-6})
    assert result.success
    np.testing.assert_allclose(result.x, 1.0, atol=1e-5)


def test_a_run_without_progress_beyond_rounding_ends():
    result = solve(lambda x: (5.0, np.sin(1e9 * (x + np.arange(5.0)))), np.ones(5))
    assert result.message == Outcome.SEARCH_FAILED.message
    assert 20 <= result.nit < 200


def test_a_first_direction_that_is_far_too_long_is_cut():
    result = solve(lambda x: (0.5e10 * x @ x, 1e10 * x), np.full(3, 1e-6))
    assert result.success
    assert result.nfev < 15


# Exact gradients of values that are rounded, and any scale.


def steepest(result):
    return np.max(np.abs(result.jac))


def ill_conditioned(offset, condition=1e2, size=10):
    curvatures = np.geomspace(1, condition, size)
    return lambda x: (offset + 0.5 * np.sum(curvatures * (x - 1) ** 2), curvatures * (x - 1))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1e2, -1e2, -50.0, 1e6, -1e6, 1e12, -1e12, 1e15])
def test_an_offset_on_the_objective_leaves_the_gradients_tolerance_within_reach(offset, together):
    both = ill_conditioned(offset)
    if together:
        result = solve(both, np.zeros(10), options={"gtol": 1e-8})
    else:
        result = solve(lambda x: both(x)[0], np.zeros(10), jac=lambda x: both(x)[1], options={"gtol": 1e-8})
    assert result.success
    assert steepest(result) <= 1e-8
    assert result.nfev < 80


@pytest.mark.parametrize("offset", [1e6, -1e12])
@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "fit"},
        {"preset": "default"},
        {"history_size": 1},
        {"beta": 0.3},
        {"history_dtype": "float32"},
    ],
    ids=str,
)
def test_offsets_and_scales_are_no_obstacle_with_other_settings_of_the_core(settings, offset):
    settings = {"preset": "lbfgs", **settings}
    result = solve(ill_conditioned(offset), np.zeros(10), options={"gtol": 1e-8, **settings})
    assert result.success
    scale = abs(offset)
    result = solve(
        lambda x: (1 + 0.5 * np.sum((x / scale - 1) ** 2), (x / scale - 1) / scale),
        np.zeros(3),
        options={"gtol": 1e-6 / scale, **settings},
    )
    assert result.success
    assert result.nfev < 30


@pytest.mark.parametrize("offset", [1e2, -1e9, 1e12])
@pytest.mark.parametrize("n", [2, 10, 20])
def test_an_offset_on_a_curved_valley_leaves_its_minimum_within_reach(n, offset):
    start = np.tile([-1.2, 1.0], n // 2)
    result = solve(lambda x: (rosen(x) + offset, rosen_der(x)), start, options={"gtol": 1e-8})
    assert result.success
    np.testing.assert_allclose(result.x, 1.0, atol=1e-7)


@pytest.mark.parametrize("offset", [100.0, -100.0, 1e6, 1e12])
@pytest.mark.parametrize(("condition", "size"), [(1e5, 20), (3e5, 20), (1e4, 40)])
def test_falls_below_rounding_add_up_to_progress(condition, size, offset):
    fun = ill_conditioned(offset, condition, size)
    result = solve(fun, np.full(size, 2.0), options={"gtol": 1e-6})
    assert result.success
    assert steepest(result) <= 1e-6


@pytest.mark.parametrize("start", [0.0, 3.0, -1e3])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-5, 1e5, 1e8, 1e9, 1e12, 1e16, 1e30, 1e60])
def test_a_minimum_is_found_at_any_scale_of_the_variables(scale, start):
    def fun(x):
        return 1 + 0.5 * np.sum((x / scale - 1) ** 2), (x / scale - 1) / scale

    result = solve(fun, np.full(3, start * scale), options={"gtol": 1e-6 / scale})
    assert result.success
    np.testing.assert_allclose(result.x / scale, 1.0, atol=1e-5)
    assert result.nfev < 30


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e12, 1e20])
def test_a_curved_valley_is_followed_at_any_scale_of_the_variables(scale):
    def fun(x):
        return rosen(x / scale), rosen_der(x / scale) / scale

    result = solve(fun, np.asarray([-1.2, 1.0]) * scale, options={"gtol": 1e-6 / scale})
    assert result.success
    assert result.nfev < 80


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e9, 1e30])
def test_a_factor_on_the_objective_leaves_the_minimum_within_reach(scale):
    def fun(x):
        return scale * rosen(x), scale * rosen_der(x)

    result = solve(fun, [-1.2, 1.0], options={"gtol": 1e-7 * scale})
    assert result.success
    np.testing.assert_allclose(result.x, 1.0, atol=1e-6)
    assert result.nfev < 80


@pytest.mark.parametrize("width", [1e-20, 1e-12, 1e-8, 1e-5, 1e-2, 1e3, 1e8])
@pytest.mark.parametrize("start", [1.0, 0.3, 2.0])
def test_a_well_is_found_however_narrow_or_wide_it_is(width, start):
    def fun(x):
        depth = np.exp(-np.sum((x / width) ** 2) / 2)
        return 1 - depth, x / width**2 * depth

    result = solve(fun, [start * width], options={"gtol": 1e-6 / width})
    assert result.success
    assert abs(result.x[0]) < 1e-5 * width
    assert result.nfev < 30


def rows(spread):
    """20,000 examples: inputs whose columns differ in scale by this much, linear predictors, random
    numbers."""
    rng = np.random.default_rng(0)
    sizes = 0.5 * np.geomspace(spread**-0.5, spread**0.5, 7)
    inputs = np.column_stack([np.ones(20_000), rng.normal(size=(20_000, 7)) * sizes])
    weights = np.concatenate([[1.5], 0.3 * rng.normal(size=7) / sizes])
    return inputs, inputs @ weights, rng


def poisson(spread):
    inputs, predictor, rng = rows(spread)
    seen = rng.poisson(np.exp(predictor))

    def fun(x):
        mean = np.exp(inputs @ x)
        return np.sum(mean) - seen @ (inputs @ x), inputs.T @ (mean - seen)

    return fun


def logistic_of_many(spread):
    inputs, predictor, rng = rows(spread)
    signs = np.where(rng.logistic(size=predictor.size) < predictor, 1.0, -1.0)

    def fun(x):
        margins = signs * (inputs @ x)
        slopes = -signs * np.exp(-np.logaddexp(0, margins))
        return np.sum(np.logaddexp(0, -margins)), inputs.T @ slopes

    return fun


def gamma_regression(spread):
    inputs, predictor, rng = rows(spread)
    seen = rng.gamma(2.0, np.exp(predictor) / 2)

    def fun(x):
        ratio = seen * np.exp(-inputs @ x)
        return np.sum(ratio + inputs @ x), inputs.T @ (1 - ratio)

    return fun


@pytest.mark.parametrize("spread", [10, 100, 1000])
@pytest.mark.parametrize("offset", [0.0, -4e4, 1e7])
@pytest.mark.parametrize("likelihood", [poisson, logistic_of_many, gamma_regression])
def test_a_likelihood_of_many_rows_ends_below_the_tolerance(likelihood, spread, offset):
    both = likelihood(spread)
    result = solve(lambda x: (offset + both(x)[0], both(x)[1]), np.zeros(8), options={"gtol": 1e-6})
    assert result.success
    assert steepest(result) <= 1e-6


@pytest.mark.parametrize("hidden", [1e4, 1e8, 1e10])
@pytest.mark.parametrize(("condition", "size", "gtol"), [(1e2, 10, 1e-8), (1e5, 20, 1e-6)])
def test_values_that_are_differences_of_large_numbers_are_no_obstacle(condition, size, gtol, hidden):
    both = ill_conditioned(hidden, condition, size)
    result = solve(lambda x: (both(x)[0] - hidden, both(x)[1]), np.zeros(size), options={"gtol": gtol})
    assert result.success


def test_value_and_gradient_in_one_or_in_two_functions_take_the_same_path():
    both = ill_conditioned(1e6, 1e4)
    one = solve(both, np.zeros(10), options={"return_all": True})
    two = solve(lambda x: both(x)[0], np.zeros(10), jac=lambda x: both(x)[1], options={"return_all": True})
    np.testing.assert_array_equal(one.allvecs, two.allvecs)
    assert one.nfev == two.nfev >= two.njev


def test_a_polynomial_in_expanded_form_is_minimized_to_the_tolerance():
    d = np.logspace(0, 2, 10)
    result = solve(
        lambda x: (0.5 * x @ (d * x) - d @ x + np.sum(d) / 2, d * (x - 1)),
        np.zeros(10),
        options={"gtol": 1e-8},
    )
    assert result.success


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("offset", [0.0, 1e3, -1e3])
def test_a_gradient_with_the_wrong_sign_ends_at_the_start(sign, offset):
    result = solve(lambda x: (offset + sign * 0.5 * x @ x, -sign * x), np.ones(3))
    assert (result.status, result.nit) == (2, 0)
    assert result.message == Outcome.SEARCH_FAILED.message
    assert result.nfev < 30


def test_a_failed_run_gives_its_last_point_unless_an_earlier_one_is_lower_by_more_than_rounding():
    curvatures, points = np.geomspace(1, 1e2, 10), []
    rng = np.random.default_rng(0)

    def fun(x):  # the noise of these gradients is ten times the tolerance
        return 1e8 + 0.5 * np.sum(curvatures * x**2), curvatures * x + 1e-6 * rng.uniform(0.5, 1, size=10)

    result = solve(fun, np.ones(10), callback=points.append, options={"gtol": 1e-7})
    assert not result.success
    np.testing.assert_array_equal(result.x, points[-1])


def test_far_fewer_calls_an_iteration_than_the_core_takes():
    """Calls of functions, Python's and C's, since seconds depend on the machine: the core's step alone takes
    more than a thousand."""
    start, count = np.tile([-1.2, 1.0], 5), 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        result = solve(rosen, start, jac=rosen_der, options={"gtol": 1e-8})
    finally:
        sys.setprofile(None)
    assert result.success
    assert count / result.nit < 400


# The textbook settings, which bypass the core.


@pytest.mark.parametrize("history_size", [1, 3, 10])
@pytest.mark.parametrize("iterations", [0, 1, 2, 9])
def test_textbook_directions_and_state_are_those_of_the_core(history_size, iterations):
    config = core.Config(preset="lbfgs", history_size=history_size)
    assert is_textbook(config)
    objective = Objective(rosenbrock, True, (), 1e-8, np.geterr())
    swift, slow = Textbook(config, 5), Curvature(config, 5)
    x = np.full(5, -1.1)
    for iteration in range(iterations):
        point = objective.at(x)
        direction, expected = swift.direction(point), slow.direction(point)
        np.testing.assert_allclose(direction, expected, rtol=1e-9)
        x = x - (0.5 if iteration else 1e-3) * expected
    states = arrays_of(swift.state), arrays_of(slow.state)
    assert list(states[0]) == list(states[1])
    for name in states[0]:
        for one, other in zip(*(arrays[name] for arrays in states), strict=True):
            assert (np.shape(one), np.asarray(one).dtype) == (np.shape(other), np.asarray(other).dtype), name
            np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("scale", [1e-120, 1e-70, 1.0, 1e70, 1e120])
def test_textbook_directions_are_finite_and_newtons_at_every_scale_of_the_variables(scale):
    curvature = Textbook(core.Config(preset="lbfgs"), 1)
    objective = Objective(lambda x: (0.0, x / scale / scale), True, (), 1e-8, np.geterr())
    with np.errstate(all="ignore"):
        for x in (3 * scale, 2 * scale, 0.5 * scale):
            direction = curvature.direction(objective.at(np.asarray([x])))
    np.testing.assert_allclose(direction, 0.5 * scale, rtol=1e-12)


@pytest.mark.parametrize(
    "changed", [{"preset": "fit"}, {"beta": 0.5}, {"min_cosine": 0.1}, {"history_size": 0}]
)
def test_other_settings_are_not_the_textbooks(changed):
    assert not is_textbook(core.Config(**{"preset": "lbfgs", **changed}))


# Floating-point errors.

RUNS = {
    "line search": {},
    "line search of the core": {"preset": "fit"},
    "given steps": {"learning_rate": 0.1, "maxiter": 30},
    "given steps of the textbook": {"learning_rate": lambda k: 0.1, "maxiter": 30, "preset": "lbfgs"},
    "given steps with a preconditioner": {"learning_rate": 0.1, "maxiter": 30, "preset": "default"},
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-20, 1.0, 1e20, 1e140])
@pytest.mark.parametrize("jac", [True, None])
def test_errors_that_numpy_is_told_to_raise_are_not_raised_by_our_arithmetic(run, scale, jac):
    def fun(x):
        with np.errstate(all="ignore"):
            value, grad = (
                scale * 0.5 * np.sum(np.asarray([1.0, 100.0]) * x**2),
                scale * np.asarray([1.0, 100.0]) * x,
            )
        return (value, grad) if jac else value

    with np.errstate(all="raise"):
        result = solve(fun, [1.0, 1e-200], jac=jac, options={**RUNS[run], "gtol": 1e-6 * scale})
        if 1e-100 < scale < 1e100:
            result.hess_inv @ np.full(2, 1e-200)
    with np.errstate(all="ignore"):
        quiet = solve(fun, [1.0, 1e-200], jac=jac, options={**RUNS[run], "gtol": 1e-6 * scale})
    np.testing.assert_array_equal(result.x, quiet.x)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("together", [True, False])
def test_the_users_functions_run_under_the_users_own_treatment_of_errors(run, together):
    seen = []

    def told(result):
        seen.append(np.geterr())
        return result

    options = {**RUNS[run], "maxiter": 3}
    if "learning_rate" in options:
        options["learning_rate"] = lambda k: told(0.1)
    with np.errstate(all="ignore", over="raise", under="call"):
        solve(
            lambda x: told(rosenbrock(x) if together else rosen(x)),
            [-1.2, 1.0],
            jac=True if together else lambda x: told(rosen_der(x)),
            callback=lambda x: told(None),
            options=options,
        )
        assert seen
        assert all(errors == np.geterr() for errors in seen)
    with np.errstate(all="raise"), pytest.raises(FloatingPointError, match="overflow"):
        solve(lambda x: (float(np.exp(1e3 * x[0])), x), [1.0], options=RUNS[run])


@pytest.mark.parametrize("settings", [{"preset": "fit"}, {"preset": "default"}, {"history_size": 3}])
def test_line_searches_work_with_every_setting_of_the_core(settings):
    result = solve(QUADRATIC, np.zeros(30), options={"maxiter": 3000, "gtol": 1e-4, **settings})
    assert result.success
    np.testing.assert_allclose(result.x, np.arange(30), atol=2.0)


def test_without_pairs_a_line_search_goes_along_the_negative_gradient():
    points = [np.full(6, 3.0)]
    fun = quadratic(spd(np.random.default_rng(3), 6, condition=20.0), np.arange(6.0))
    result = solve(fun, points[0], callback=points.append, options={"history_size": 0})
    assert result.success
    for before, after in itertools.pairwise(points):
        step, gradient = after - before, fun(before)[1]
        cosine = -step @ gradient / np.linalg.norm(step) / np.linalg.norm(gradient)
        assert cosine == pytest.approx(1, abs=1e-9)
    np.testing.assert_array_equal(result.hess_inv.todense(), np.eye(6))


@pytest.mark.parametrize("preset", ["lbfgs", "fit", "default", "paper"])
def test_without_pairs_line_searches_work_with_every_preset(preset):
    fun = quadratic(np.diag([1.0, 3.0, 10.0]), np.arange(3.0))
    options = {"history_size": 0, "preset": preset, "gtol": 1e-4, "maxiter": 3000}
    result = solve(fun, np.full(3, 2.0), options=options)
    assert result.success
    assert np.max(np.abs(fun(result.x)[1])) < 1e-4


def test_finite_differences_stand_in_for_a_missing_gradient():
    fun = Counted(rosen)
    result = solve(fun, [-1.2, 1.0], jac=None)
    assert result.success
    np.testing.assert_allclose(result.x, 1.0, atol=1e-4)
    assert result.nfev == len(fun.points) == fun.distinct
    coarse = Counted(rosen)
    solve(coarse, [-1.2, 1.0], jac=None, options={"eps": [1e-3, 1e-4], "maxiter": 0})
    np.testing.assert_allclose(coarse.points[1:], [[-1.199, 1.0], [-1.2, 1.0001]], rtol=1e-12)


# The inverse Hessian.


@pytest.mark.parametrize("iterations", [1, 2, 4, 7, 15, 30])
def test_inverse_hessian_is_the_dense_bfgs_matrix_of_the_recorded_pairs(iterations):
    points = [np.full(6, -1.0)]
    result = solve(
        rosenbrock, points[0], callback=points.append, options={"maxiter": iterations, "history_size": 4}
    )
    grads = [rosen_der(x) for x in points]
    pairs = list(zip(np.diff(points, axis=0), np.diff(grads, axis=0), strict=True))[-4:]
    assert result.nit == iterations
    assert all(s @ y > 0 for s, y in pairs)
    s, y = pairs[-1]
    dense = bfgs_inverse_hessian(pairs, s @ y / (y @ y), 6)
    assert relative(result.hess_inv.todense(), dense) < 1e-8


def test_inverse_hessian_of_a_quadratic_inverts_it_along_visited_directions():
    matrix = spd(np.random.default_rng(3), 6, condition=20.0)
    points = [np.full(6, 3.0)]
    result = solve(quadratic(matrix, np.zeros(6)), points[0], callback=points.append, options={"gtol": 1e-9})
    newest, *older = np.diff(points, axis=0)[:-7:-1]
    np.testing.assert_allclose(result.hess_inv @ (matrix @ newest), newest, rtol=1e-6, atol=1e-15)
    inverse = np.linalg.inv(matrix)
    for s in older:
        y = matrix @ s
        assert y @ (result.hess_inv @ y) == pytest.approx(y @ inverse @ y, rel=0.05)


def test_inverse_hessian_is_a_symmetric_linear_operator():
    result = solve(rosenbrock, np.full(5, 2.0), options={"maxiter": 12})
    operator, dense = result.hess_inv, result.hess_inv.todense()
    assert isinstance(operator, LinearOperator)
    assert operator.shape == (5, 5)
    assert np.all(np.linalg.eigvalsh(dense) > 0)
    v, block = np.arange(5.0), np.arange(10.0).reshape(5, 2)
    turned = v + 1j * v[::-1]
    for product, expected in (
        (operator @ v, dense @ v),
        (operator @ np.arange(5), dense @ v),
        (operator @ turned, dense @ turned),
        (operator.rmatvec(v), dense @ v),
        (operator.T @ v, dense @ v),
        (operator.matvec(v[:, None]), dense @ v[:, None]),
        (operator.matmat(block), dense @ block),
        (operator.H.matmat(block), dense @ block),
        (dense, dense.T),
    ):
        np.testing.assert_allclose(product, expected, rtol=1e-12, atol=1e-12 * np.max(np.abs(dense)))


def test_inverse_hessian_is_the_identity_before_the_first_pair():
    result = solve(rosenbrock, [1.0, 1.0])
    assert (result.success, result.nit) == (True, 0)
    np.testing.assert_array_equal(result.hess_inv.todense(), np.eye(2))


# Given steps.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.8},
        {"preset": "default"},
        {"preset": "paper", "update_every": 3},
        {"preset": "formulas", "update_every": 3},
        {"preset": "lbfgs", "momentum": 0.8},
        {"history_size": 0},
        {"preset": "default", "history_size": 0},
    ],
    ids=str,
)
def test_given_steps_and_their_inverse_hessian_are_those_of_the_reference(settings):
    fun, rates = (
        quadratic(np.diag([1.0, 0.5, 0.1, 2.0]), np.arange(4.0)),
        [0.3 / (1 + k / 50) for k in range(40)],
    )
    result = solve(
        fun,
        np.full(4, 5.0),
        options={"learning_rate": rates.__getitem__, "maxiter": 40, "return_all": True, **settings},
    )
    config = core.Config(**{"preset": "fit", **{k: v for k, v in settings.items() if k != "momentum"}})
    preset = settings.get("preset", "fit")
    momentum = settings.get("momentum", {"fit": 0.0}.get(preset, 0.9))
    heavy_ball = preset in ("fit", "paper", "formulas", "lbfgs")
    twin, x, velocity = Reference(config, [4]), np.full(4, 5.0), np.zeros(4)
    for rate, visited in zip(rates, result.allvecs, strict=False):
        np.testing.assert_allclose(visited, x, rtol=1e-8, atol=1e-8)
        (direction,) = twin.step([x], [fun(x)[1]])
        velocity = momentum * velocity + direction
        x = x - rate * (velocity if heavy_ball else direction + momentum * velocity)
    np.testing.assert_allclose(result.x, x, rtol=1e-8, atol=1e-8)
    assert (result.nit, result.nfev, result.success) == (40, 41, True)
    (block,) = twin.blocks
    root = twin.dense_root(block)
    dense = root.T @ (twin.inverse_hessian(block) if block.pairs else np.eye(4)) @ root
    assert relative(result.hess_inv.todense(), dense) < 1e-7


@pytest.mark.parametrize("together", [True, False])
def test_given_steps_reach_the_minimum_through_noise_and_nans(together):
    rng, matrix, centre = np.random.default_rng(4), np.diag(np.geomspace(0.1, 1.0, 10)), np.arange(10.0)
    draws = 0

    def noisy_grad(x):
        nonlocal draws
        draws += 1
        noise = np.full(10, np.nan) if draws % 7 == 1 else 0.1 * rng.normal(size=10)
        return matrix @ (x - centre) + noise

    def noisy(x):
        value = 0.5 * (x - centre) @ matrix @ (x - centre) + 0.1 * rng.normal()
        return (value, noisy_grad(x)) if together else value

    options = {"learning_rate": lambda k: 0.5 / (1 + k / 100), "maxiter": 1200}
    result = solve(noisy, np.zeros(10), jac=True if together else noisy_grad, options=options)
    assert result.success
    assert result.message == Outcome.STEPS_TAKEN.message
    assert draws == 1201
    assert np.all(np.isfinite(result.jac))
    np.testing.assert_allclose(result.x, centre, atol=0.5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_non_finite_gradient_costs_its_step_and_the_point_is_drawn_anew(momentum):
    seen, bad = [], {1, 2, 6, 7}

    def fun(x):
        seen.append(x.copy())
        return x @ x, np.full(2, np.inf) if len(seen) in bad else 2 * x

    options = {"learning_rate": 0.1, "momentum": momentum, "maxiter": 9}
    result = solve(fun, [3.0, 4.0], options=options)
    assert len(seen) == result.nfev == result.njev == 10
    for draw, (x, after) in enumerate(itertools.pairwise(seen), start=1):
        assert np.array_equal(x, after) == (draw in bad)
    assert result.success


def test_given_steps_that_end_where_nothing_is_finite_give_the_last_finite_point():
    def fun(x):
        return (x[0] ** 2, 2 * x) if x[0] > 4.5 else (np.nan, np.full(1, np.nan))

    result = solve(
        fun, [5.0], options={"learning_rate": 0.3, "maxiter": 20, "preset": "default", "momentum": 0}
    )
    assert (result.success, result.status) == (False, 3)
    assert result.message == Outcome.END_NOT_FINITE.message
    assert result.x[0] == pytest.approx(4.7)
    assert result.fun == result.x[0] ** 2


def test_given_steps_end_at_a_small_gradient_only_if_asked():
    options = {"learning_rate": 0.3, "maxiter": 400}
    assert solve(QUADRATIC, np.arange(30.0), options=options).nit == 400
    asked = solve(QUADRATIC, np.arange(30.0) + 1e-3, options={**options, "gtol": 1e-2})
    assert (asked.nit, asked.message) == (0, Outcome.GRADIENT_SMALL.message)


def test_learning_rate_is_called_with_the_number_of_the_iteration():
    asked = []
    options = {"learning_rate": lambda k: asked.append(k) or 0.1, "maxiter": 6}
    solve(rosenbrock, [-1.2, 1.0], options=options)
    assert asked == [0, 1, 2, 3, 4, 5]


# Values that are not finite.


def barrier(x):
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sum(x - np.log(x)), 1 - 1 / x


@pytest.mark.parametrize("start", [1e-8, 1e-3, 0.7, 50.0, 1e6])
@pytest.mark.parametrize("together", [True, False])
def test_regions_of_nan_are_left_alone(start, together):
    if together:
        result = solve(barrier, np.full(3, start))
    else:
        result = solve(lambda x: barrier(x)[0], np.full(3, start), jac=lambda x: barrier(x)[1])
    assert result.success
    np.testing.assert_allclose(result.x, 1.0, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_trials_with_a_finite_value_but_no_finite_gradient_are_left_alone(bad):
    def grad(x):
        return np.where(np.abs(x) > 2.1, bad, 2 * x - 1)

    result = solve(lambda x: np.sum(x**2 - x), np.full(2, 2.0), jac=grad)
    assert result.success
    np.testing.assert_allclose(result.x, 0.5, atol=1e-5)

    def walled(x):  # the minimum lies at the wall, beyond which there is no gradient
        return np.where(x > 0.5, np.nan, -1.0)

    result = solve(lambda x: -x[0], np.zeros(1), jac=walled)
    assert not result.success
    assert 0.4 < result.x[0] <= 0.5
    assert result.nfev < 100


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_counts_as_high_whatever_its_gradient(value):
    result = solve(lambda x: (value if x[0] < 0.5 else (x[0] - 1) ** 2, 2 * (x - 1)), [9.0])
    assert result.success
    np.testing.assert_allclose(result.x, 1.0, atol=1e-5)
    beside = solve(lambda x: (value if x[0] < 3 else x[0] ** 2, 2 * x), [9.0])
    assert (beside.success, beside.status) == (False, 2)
    assert 3 <= beside.x[0] < 3.1


@pytest.mark.parametrize(
    ("value", "grad"),
    [(np.nan, 1.0), (np.inf, 1.0), (-np.inf, 1.0), (0.0, np.nan), (0.0, np.inf), (0.0, 1e200)],
)
@pytest.mark.parametrize("together", [True, False])
def test_a_start_that_is_not_finite_is_said_to_be(value, grad, together):
    fun = Counted(lambda x: (value, np.full(3, grad)) if together else value)
    result = solve(fun, np.ones(3), jac=True if together else lambda x: np.full(3, grad))
    assert (result.success, result.status, result.nit) == (False, 3, 0)
    assert result.message == Outcome.START_NOT_FINITE.message
    assert len(fun.points) == 1
    np.testing.assert_array_equal(result.x, 1.0)


def test_an_objective_without_a_minimum_ends():
    result = solve(lambda x: (-x[0], -np.ones(1)), [0.0], options={"maxiter": 200})
    assert not result.success
    assert result.fun < -1e6


# Failures.


def test_a_wrong_gradient_ends_with_advice_at_the_lowest_point_seen():
    fun = Counted(lambda x: -1e-5 * x[0])
    result = solve(fun, np.zeros(2), jac=lambda x: -np.ones(2))
    assert (result.success, result.status, result.nit) == (False, 2, 0)
    assert "check_grad" in result.message
    assert 0 > result.fun == fun.function(result.x) == min(map(fun.function, fun.points))


def test_a_run_of_too_few_iterations_gives_the_lowest_point_seen():
    start, points = 2 * np.random.default_rng(0).normal(size=4), []
    fun = Counted(rosenbrock)
    result = solve(fun, start, callback=points.append, options={"c1": 0.49, "maxiter": 1})
    assert result.fun == min(rosen(x) for x in fun.points) < rosen(points[-1])
    np.testing.assert_array_equal(result.jac, rosen_der(result.x))


def test_after_a_failed_search_the_next_one_goes_along_the_negative_gradient(monkeypatch):
    directions, searches = [], []

    def failing(objective, start, direction, options):
        searches.append(start.grad)
        directions.append(direction)
        return None if len(searches) == 8 else search(objective, start, direction, options)

    search = run.search
    monkeypatch.setattr(run, "search", failing)
    result = solve(rosenbrock, np.full(4, -1.0))
    assert result.success
    np.testing.assert_array_equal(searches[7], searches[8])
    grad = searches[8]
    np.testing.assert_allclose(directions[8], grad / max(np.linalg.norm(grad), 1.0), rtol=1e-12)
    assert not np.allclose(directions[7], directions[8])


def test_a_second_failure_ends_the_run_and_keeps_its_curvature(monkeypatch):
    count, search = 0, run.search

    def failing(*arguments):
        nonlocal count
        count += 1
        return None if count > 7 else search(*arguments)

    monkeypatch.setattr(run, "search", failing)
    result = solve(rosenbrock, np.full(4, -1.0))
    assert (result.status, count, result.nit) == (2, 9, 7)
    assert not np.allclose(result.hess_inv.todense(), np.eye(4))


@pytest.mark.parametrize("most", [0, 1, 5])
def test_maxiter_is_the_number_of_iterations(most):
    result = solve(rosenbrock, [-1.2, 1.0], options={"maxiter": most})
    assert (result.nit, result.status, result.success) == (most, 1, False)
    assert result.message == Outcome.ITERATIONS_USED.message


# What SciPy asks of a method.


@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.1, "maxiter": 30}])
def test_counts_are_those_of_the_calls(options):
    both = Counted(rosenbrock)
    result = solve(both, np.full(4, -1.0), options=options)
    assert result.nfev == result.njev == len(both.points) == both.distinct
    fun, jac = Counted(rosen), Counted(rosen_der)
    result = solve(fun, np.full(4, -1.0), jac=jac, options=options)
    assert result.nfev == len(fun.points) == fun.distinct
    assert result.njev == len(jac.points) == jac.distinct
    assert result.njev <= result.nfev


@pytest.mark.parametrize("args", [(2.0, 3.0), 2.0])
def test_args_go_to_function_and_gradient(args):
    shift = sum(np.atleast_1d(args))
    result = solve(
        lambda x, *more: np.sum((x - sum(more)) ** 2),
        [0.0],
        jac=lambda x, *more: 2 * (x - sum(more)),
        args=args,
    )
    np.testing.assert_allclose(result.x, shift)


def test_start_iterates_and_gradients_are_safe_from_the_users_functions():
    buffer = np.empty(4)

    def careless(x):
        value = rosen(x)
        buffer[:] = rosen_der(x)
        x[:] = np.nan
        return value, buffer

    start = np.full(4, -1.0)
    result = solve(careless, start, callback=lambda x: x.fill(np.nan), options={"return_all": True})
    tidy = solve(rosenbrock, start, options={"return_all": True})
    np.testing.assert_array_equal(start, -1.0)
    np.testing.assert_array_equal(result.allvecs, tidy.allvecs)


def test_integer_and_single_precision_starts_are_computed_in_double():
    for start in ([-1, 1], np.asarray([-1, 1], dtype=np.float32)):
        result = solve(rosenbrock, start)
        assert result.x.dtype == np.float64
        np.testing.assert_allclose(result.x, 1.0, atol=1e-5)


def test_an_object_with_a_function_of_its_own_is_not_taken_apart():
    class Model:
        def fun(self, x):
            raise AssertionError

        def __call__(self, x):
            return rosen(x)

        def gradient(self, x):
            return rosen_der(x)

    model = Model()
    assert solve(model, [-1.2, 1.0], jac=model.gradient).success


@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.1, "maxiter": 8}])
def test_callbacks_get_each_iterate_in_both_forms(options):
    results, points = [], []

    def with_result(*, intermediate_result):
        results.append(intermediate_result)

    new = solve(rosenbrock, [-1.2, 1.0], callback=with_result, options={**options, "return_all": True})
    solve(rosenbrock, [-1.2, 1.0], callback=points.append, options=options)
    assert len(results) == len(points) == new.nit
    np.testing.assert_array_equal([result.x for result in results], points)
    np.testing.assert_array_equal(new.allvecs, [[-1.2, 1.0], *points])
    np.testing.assert_array_equal(points[-1], new.x)
    assert [result.fun for result in results] == [rosen(x) for x in points]


@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.1}])
@pytest.mark.parametrize("new", [True, False])
def test_stop_iteration_ends_the_run_as_in_scipy(options, new):
    seen = []

    def stop(x):
        seen.append(x)
        if len(seen) == 3:
            raise StopIteration

    def stop_new(intermediate_result):
        stop(intermediate_result.x)

    callback = stop_new if new else stop
    result = solve(rosenbrock, [-1.2, 1.0], callback=callback, options=options)
    assert (result.nit, result.status, result.success) == (3, 99, False)
    np.testing.assert_array_equal(result.x, seen[-1])
    seen.clear()
    theirs = minimize(rosen, [-1.2, 1.0], jac=rosen_der, method="BFGS", callback=callback)
    assert result.message == theirs.message or theirs.status != 99  # BFGS has status 99 from SciPy 1.11 on
    assert theirs.success is False


def test_tolerances_end_the_run():
    loose = solve(rosenbrock, [-1.2, 1.0], tol=1e-1)
    assert 1e-5 < np.max(np.abs(loose.jac)) <= 1e-1
    strict = solve(rosenbrock, [-1.2, 1.0], tol=1e-1, options={"gtol": 1e-9})
    assert np.max(np.abs(strict.jac)) <= 1e-9
    values = [rosen([-1.2, 1.0])]
    flat = solve(
        rosenbrock,
        [-1.2, 1.0],
        callback=lambda x: values.append(rosen(x)),
        options={"gtol": 0.0, "ftol": 1e-2},
    )
    assert (flat.success, flat.message) == (True, Outcome.DECREASE_SMALL.message)
    decreases = -np.diff(values) / np.maximum(np.abs(values[:-1]), 1.0)
    assert np.all(decreases[:-1] > 1e-2)
    assert decreases[-1] <= 1e-2


def test_disp_tells_how_the_run_ended(capsys):
    solve(rosenbrock, [-1.2, 1.0])
    assert capsys.readouterr().out == ""
    result = solve(rosenbrock, [-1.2, 1.0], options={"disp": True})
    out = capsys.readouterr().out
    assert result.message in out
    assert f"Iterations: {result.nit}" in out
    assert f"Function evaluations: {result.nfev}" in out
    with pytest.warns(OptimizeWarning, match="`maxiter` iterations were not enough"):
        solve(rosenbrock, [-1.2, 1.0], options={"disp": True, "maxiter": 1})


@pytest.mark.parametrize("extra", [{"history": 5}, {"maxcor": 5, "norm": 2}])
def test_unknown_options_warn_in_the_users_code(extra):
    with pytest.warns(OptimizeWarning, match=f"^Unknown solver options: {', '.join(extra)}$") as caught:
        minimize(rosen, [-1.2, 1.0], jac=rosen_der, method=minimize_mlbfgs, options=extra)
    assert [warning.filename for warning in caught] == [__file__]


def test_an_old_name_of_a_setting_is_refused_with_the_new_one():
    with pytest.raises(TypeError, match="`metric_power`; it is now `preconditioner_power`"):
        minimize(rosen, [-1.2, 1.0], jac=rosen_der, method=minimize_mlbfgs, options={"metric_power": 0.0})


def test_hessians_are_not_used_and_warn_as_in_scipy():
    for arguments in ({"hess": optimize.rosen_hess}, {"hessp": optimize.rosen_hess_prod}):
        said = []
        for method in (minimize_mlbfgs, "BFGS"):
            with pytest.warns(RuntimeWarning, match="does not use Hessian") as caught:
                minimize(rosen, [-1.2, 1.0], jac=rosen_der, method=method, **arguments)
            said.append(str(caught[0].message))
        assert said[0] == said[1].replace("BFGS", "minimize_mlbfgs")


def test_a_run_without_trouble_gives_no_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solve(rosenbrock, [-1.2, 1.0])
        solve(barrier, [50.0])
        solve(lambda x: (x @ x, np.full(2, np.nan)), [1.0, 1.0], options={"learning_rate": 0.1, "maxiter": 3})
    assert caught == []


@pytest.mark.parametrize(
    ("kind", "match", "arguments"),
    [
        (
            ValueError,
            "`bounds` must be None, .*method='L-BFGS-B' or 'trust-constr' does",
            {"bounds": [(0, 1)] * 2},
        ),
        (
            ValueError,
            "`constraints` must be empty, .*'trust-constr'",
            {"constraints": {"type": "eq", "fun": rosen}},
        ),
        (ValueError, "`constraints` must be empty", {"constraints": LinearConstraint(np.eye(2), 0, 1)}),
        (TypeError, "`x0` must be real, got complex128", {"x0": [1.0, 1j]}),
        (ValueError, "`x0` must hold at least one number", {"x0": []}),
        (TypeError, "`maxiter` must be an int >= 0, got 1.5", {"options": {"maxiter": 1.5}}),
        (ValueError, "`maxiter` must be an int >= 0, got -1", {"options": {"maxiter": -1}}),
        (ValueError, "`maxls` must be an int >= 1, got 0", {"options": {"maxls": 0}}),
        (ValueError, "`gtol` must be finite and >= 0, got -1", {"options": {"gtol": -1}}),
        (ValueError, "`tol` must be finite and >= 0, got nan", {"tol": np.nan}),
        (TypeError, "`ftol` must be finite and >= 0, got '1'", {"options": {"ftol": "1"}}),
        (TypeError, "`ftol` must be finite and >= 0, got None", {"options": {"ftol": None}}),
        (ValueError, r"`c1` must be in \(0, 1\), got 0", {"options": {"c1": 0}}),
        (ValueError, "`c1` must be less than `c2`, got 0.5 and 0.1", {"options": {"c1": 0.5, "c2": 0.1}}),
        (ValueError, "`eps` must be > 0, got 0", {"options": {"eps": 0}}),
        (ValueError, "`learning_rate` must be finite and >= 0, got -1", {"options": {"learning_rate": -1}}),
        (ValueError, "`learning_rate` .*got nan", {"options": {"learning_rate": lambda k: np.nan}}),
        (TypeError, "`learning_rate` .*got 'fast'", {"options": {"learning_rate": "fast"}}),
        (ValueError, "`momentum` needs a `learning_rate`, got 0.9", {"options": {"momentum": 0.9}}),
        (ValueError, r"`momentum` must be in \[0, 1\)", {"options": {"momentum": 2, "learning_rate": 1}}),
        (ValueError, "`history_size` must be", {"options": {"history_size": -1}}),
        (ValueError, "`preset` must be", {"options": {"preset": "bfgs"}}),
        (
            ValueError,
            r"`jac` must return as many numbers as `x0` has, 2, got .*\(3,\)",
            {"jac": lambda x: np.ones(3)},
        ),
        (TypeError, "`jac` must return real numbers, got .*complex128", {"jac": lambda x: 1j * np.ones(2)}),
        (ValueError, r"`fun` must return a single number, got .*\(2,\)", {"fun": lambda x: x}),
        (TypeError, "`fun` must return a real number, got 1j", {"fun": lambda x: 1j}),
        (TypeError, "`fun` must return a real number, got None", {"fun": lambda x: None}),
        (TypeError, "`fun` must return a real number, got 'high'", {"fun": lambda x: "high"}),
        (TypeError, r"`fun` must return a real number, got \{\}", {"fun": lambda x: {}}),
        (TypeError, "`fun` must be callable, got None", {"fun": None}),
        (TypeError, "`jac` must return real numbers, got None", {"jac": lambda x: None}),
        (TypeError, "`jac` must return real numbers, got .*'up'", {"jac": lambda x: ["up", "down"]}),
    ],
)
def test_errors_name_the_argument_the_rule_and_the_value(kind, match, arguments):
    with pytest.raises(kind, match=match):
        minimize(
            **{"fun": rosen, "x0": [-1.2, 1.0], "jac": rosen_der, "method": minimize_mlbfgs, **arguments}
        )


@pytest.mark.parametrize("returned", [None, 1.0, np.float64(1.0), (1.0,), (1.0, np.ones(2), 3.0), "high"])
@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.1}])
def test_a_function_that_does_not_return_value_and_gradient_is_named(returned, options):
    match = "`fun` must return a value and a gradient with jac=True, got"
    with pytest.raises(TypeError, match=match):
        solve(lambda x: returned, [-1.2, 1.0], options=options)
    with pytest.raises(TypeError, match=match):
        minimize_mlbfgs(lambda x: returned, [-1.2, 1.0], jac=True, **options)


def test_parts_of_value_and_gradient_that_are_missing_are_named():
    with pytest.raises(TypeError, match="`fun` must return a real number, got None"):
        solve(lambda x: (None, np.ones(2)), [-1.2, 1.0])
    with pytest.raises(TypeError, match="`jac` must return real numbers, got None"):
        solve(lambda x: (1.0, None), [-1.2, 1.0])
    assert solve(lambda x: rosen(x) if x[0] < 5 else None, [-1.2, 1.0], jac=rosen_der).success


@pytest.mark.parametrize("scheme", ["3-point", "cs"])
def test_schemes_of_differences_that_are_not_there_are_refused_where_they_can_be_seen(scheme):
    with pytest.raises(ValueError, match=f"`jac` must be callable, True, None or '2-point', got '{scheme}'"):
        minimize_mlbfgs(rosen, [-1.2, 1.0], jac=scheme)
    assert solve(rosen, [-1.2, 1.0], jac=scheme).success  # SciPy hands over None


def test_the_method_can_be_called_directly():
    direct = minimize_mlbfgs(rosenbrock, [[-1.2], [1.0]], jac=True, tol=1e-7)
    np.testing.assert_array_equal(direct.x, solve(rosenbrock, [-1.2, 1.0], tol=1e-7).x)
    assert minimize_mlbfgs(rosen, [-1.2, 1.0], jac="2-point").success


def test_outcomes_have_the_statuses_of_scipy_and_say_what_to_try():
    statuses = {outcome.name: outcome.status for outcome in Outcome}
    assert statuses == {
        "GRADIENT_SMALL": 0,
        "DECREASE_SMALL": 0,
        "STEPS_TAKEN": 0,
        "ITERATIONS_USED": 1,
        "SEARCH_FAILED": 2,
        "START_NOT_FINITE": 3,
        "END_NOT_FINITE": 3,
        "CALLBACK_STOPPED": 99,
    }
    for outcome in Outcome:
        assert outcome.success == (outcome.status == 0)
        assert outcome.status in (0, 99) or any(word in outcome.message for word in ("try", "start where"))
