"""What the momentum averages promise: exact curvature without noise, less noise with it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlbfgs_core as core
from mlbfgs_core.reference import bfgs_inverse_hessian
from tests.helpers import (
    PLAIN,
    curvature_pairs,
    join,
    operator_matrix,
    power_of,
    relative,
    spd,
    split,
    state_after,
    to_numpy,
    trajectory,
)
from tests.strategies import generators

lazy_xp_modules = [core]

DIM, M = 8, 6
AVERAGES = pytest.mark.parametrize(
    "average", [{"beta": None}, {"beta": 0.9}, {"beta": 0.5}], ids=["interval", "ema-0.9", "ema-0.5"]
)


def stored_pairs(state):
    """The pairs (s, y) of a state of one block and leaf, from the oldest to the newest."""
    history, pairs = to_numpy(state.history[0]), int(state.pairs[0])
    m = history.shape[1]
    slots = [i % m for i in range(max(0, pairs - m), pairs)]
    return [(history[0, slot], history[1, slot]) for slot in slots]


def averages(values, config):
    """The average at each refresh, written out as weighted sums over the whole trajectory."""
    period, beta = config.update_every, config.beta
    result = []
    for end in range(period, len(values) + 1, period):
        if beta is None:
            result.append(np.mean(values[end - period : end], axis=0))
        else:
            weights = (1 - beta) * beta ** np.arange(end - 1, -1, -1.0)
            weights[0] /= 1 - beta  # the average starts at its first value
            result.append(np.tensordot(weights, np.asarray(values[:end]), axes=1))
    return result


@AVERAGES
@given(rng=generators)
def test_momentum_pairs_obey_the_secant_equation_without_noise(xp, average, rng):
    config = core.Config(history_size=M, update_every=3, **{**PLAIN, **average})
    matrix = spd(rng, DIM)
    *_, (_, _, state) = trajectory(config, xp, rng.normal(size=DIM), lambda t, x: matrix @ x, 15)
    pairs = stored_pairs(state)
    assert len(pairs) == 4
    for s, y in pairs:
        assert np.linalg.norm(y - matrix @ s) < 1e-10 * np.linalg.norm(y)


@given(rng=generators)
def test_restarting_one_average_only_breaks_the_secant_equation(xp, rng):
    # The published script restarts the average of the gradient but not that of the parameters.
    config = core.Config(history_size=M, update_every=3, **{**PLAIN, "beta": 0.9})
    matrix, x = spd(rng, DIM), rng.normal(size=DIM)
    state = core.Method(config).init(split(x, [(DIM,)], xp), xp=xp)
    for _ in range(15):
        gradient = matrix @ x
        if int(state.window) == 0 and int(state.prev_window) > 0:
            state = state._replace(mean_grads=tuple(split(gradient, [(DIM,)], xp)))
        leaves = split(x, [(DIM,)], xp)
        update, state = core.Method(config).step(state, leaves, split(gradient, [(DIM,)], xp))
        x = x - 0.1 * to_numpy(update[0])
    errors = [np.linalg.norm(y - matrix @ s) / np.linalg.norm(y) for s, y in stored_pairs(state)[1:]]
    assert max(errors) > 0.1


@AVERAGES
@given(rng=generators)
def test_momentum_pairs_give_the_inverse_hessian_of_bfgs_on_the_true_curvature(xp, average, rng):
    """The claim "same Hessian approximation": dense BFGS on ``(s, A s)``, memory not yet full."""
    config = core.Config(history_size=M, update_every=3, **{**PLAIN, **average})
    matrix, path = spd(rng, DIM, condition=10.0), []
    for _, x, state in trajectory(config, xp, rng.normal(size=DIM), lambda t, x: matrix @ x, 15):
        path.append(x)
    means = averages(path, config)
    s = np.diff(means, axis=0)
    s = s / np.linalg.norm(s, axis=1, keepdims=True)
    pairs = [(row, matrix @ row) for row in s]
    newest = pairs[-1]
    gamma = newest[0] @ newest[1] / (newest[1] @ newest[1])
    # The condition of the pairs, which grow alike along a trajectory, amplifies the rounding.
    condition = np.linalg.cond(s) ** 2
    tolerance = max(1e3 * condition, 1e4) * np.finfo(float).eps
    assert relative(operator_matrix(state), bfgs_inverse_hessian(pairs, gamma, DIM)) < tolerance


@given(rng=generators)
def test_zero_beta_every_step_is_lbfgs(xp, rng):
    config = core.Config(history_size=M, **{**PLAIN, "beta": 0.0, "update_every": 1})
    matrix, path, pairs = spd(rng, DIM), [], []
    for update, x, _ in trajectory(config, xp, rng.normal(size=DIM), lambda t, x: matrix @ x, M + 3):
        if path:
            s = x - path[-1]
            pairs.append((s, matrix @ s))
            newest = pairs[-1]
            gamma = newest[0] @ newest[1] / (newest[1] @ newest[1])
            expected = bfgs_inverse_hessian(pairs[-M:], gamma, DIM) @ (matrix @ x)
        else:
            expected = matrix @ x / max(1.0, np.linalg.norm(matrix @ x))
        assert relative(update, expected) < 1e-7  # steps shrink, and differences of iterates cancel
        path.append(x)


@pytest.mark.slow_on("array_api_strict")
@AVERAGES
def test_noise_in_y_falls_as_the_averages_predict(xp, average):
    period, dim, rng = 20, 20_000, np.random.default_rng(0)
    config = core.Config(history_size=2, **{**PLAIN, **average, "update_every": period})
    start, snapshots = np.zeros(dim), []
    steps = trajectory(config, xp, start, lambda t, x: rng.normal(size=dim), 10 * period, rate=0.0)
    for t, (_, _, state) in enumerate(steps):
        if (t + 1) % period == 0:
            snapshots.append(to_numpy(state.prev_grads[0]).copy())
    variance = np.mean(np.diff(snapshots[5:], axis=0) ** 2)
    beta = config.beta
    # Two means of T independent gradients; or two exponential averages, T steps apart.
    predicted = 2 / period if beta is None else 2 * (1 - beta) / (1 + beta) * (1 - beta**period)
    assert variance == pytest.approx(predicted, rel=0.05)
    assert variance < 0.5 * 2  # against 2, the noise of a plain difference of gradients


@pytest.mark.slow_on("array_api_strict", "jax")
@AVERAGES
@pytest.mark.parametrize("power", [0.0, 0.5])
def test_signal_to_noise_of_pure_noise_is_one(xp, average, power):
    dim, rng = 5_000, np.random.default_rng(0)
    config = core.Config(
        history_size=2,
        update_every=1000,
        check_every=1,
        signal_to_noise=1e6,
        **power_of(power),
        **average,
    )
    start = np.zeros(dim)
    ratios = [
        to_numpy(state.signal_to_noise)
        for _, _, state in trajectory(config, xp, start, lambda t, x: rng.normal(size=dim), 80, rate=0.0)
    ]
    assert np.mean(ratios[40:]) == pytest.approx(1.0, rel=0.25)


@given(rng=generators, scale=st.sampled_from([1e-3, 1e3]))
def test_variance_along_the_stored_rows_is_that_of_the_gradient_and_ignores_drift(xp, rng, scale):
    plain = {**PLAIN, "noise_floor": 4.0, "update_every": 10**6}
    config, sigma, steps = core.Config(history_size=2, **plain), 0.1 * scale, 200
    state = state_after(config, curvature_pairs(rng, 2, DIM), xp)
    start, drift = scale * rng.normal(size=DIM), scale * rng.normal(size=DIM)
    samples = []
    for t in range(steps):
        gradient = start + sigma * rng.normal(size=DIM) + drift * t
        leaves = split(start, [(DIM,)], xp), split(gradient, [(DIM,)], xp)
        _, state = core.Method(config).step(state, *leaves, when_due=False)
        samples.append(to_numpy(state.row_noise)[0].copy())
    assert np.mean(samples[30:]) == pytest.approx(sigma**2, rel=0.4)


@given(rng=generators)
def test_averages_are_those_of_all_observations_of_the_window(xp, rng):
    config = core.Config(history_size=2, **{**PLAIN, "update_every": 5})
    gradients = rng.normal(size=(14, DIM))
    path = []
    for _, x, state in trajectory(config, xp, rng.normal(size=DIM), lambda t, x: gradients[t], 14):
        path.append(x)
    for actual, expected in (
        (state.mean_params, np.mean(path[10:], axis=0)),
        (state.mean_grads, np.mean(gradients[10:], axis=0)),
        (state.prev_params, np.mean(path[5:10], axis=0)),
        (state.prev_grads, np.mean(gradients[5:10], axis=0)),
    ):
        np.testing.assert_allclose(join(actual), expected, rtol=1e-12, atol=1e-13)
