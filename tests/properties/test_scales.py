"""Finite in, finite out, and the same steps, whatever the scales of the loss and of the parameters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlbfgs_core as core
from mlbfgs_core import adapter
from tests.helpers import arrays_of, join, relative, split, to_numpy, trajectory

lazy_xp_modules = [core]

PRESETS = ("default", "paper", "formulas", "lbfgs", "fit")
LENGTHS = (None, "rms", "unit", "clip", "none")
LARGEST = {"float32": 30, "float64": 200}
"""Powers of ten up to which the scales go."""
CURVATURE = np.geomspace(0.1, 3.0, 6)


def config_of(preset, length=None, **settings):
    given_length = {} if length is None else {"step_length": length}
    return core.Config(preset=preset, **{"history_size": 3, **given_length, **settings})


def scaled_quadratic(loss, scale, dtype):
    """Gradient of ``loss * sum(h (x / scale - 1)^2) / 2`` in a dtype, where it may over- or underflow."""
    number = np.dtype(dtype).type

    def gradient(_, x):
        with np.errstate(all="ignore"):
            rest = number(1) * x.astype(dtype) / number(scale) - number(1)
            return CURVATURE.astype(dtype) * rest * number(loss) / number(scale)

    return gradient


@pytest.mark.slow_on("jax")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@settings(max_examples=12)
@given(data=st.data())
def test_finite_gradients_of_any_scale_give_finite_steps(xp, dtype, data):
    """Skipped ones change nothing; a gradient that is not finite in this dtype is one of them."""
    powers = st.integers(-LARGEST[dtype], LARGEST[dtype])
    loss, scale = (10.0 ** data.draw(powers) for _ in range(2))
    config = config_of(data.draw(st.sampled_from(PRESETS)), data.draw(st.sampled_from(LENGTHS)))
    gradient, start = scaled_quadratic(loss, scale, dtype), np.full(6, 2.0 * scale)
    rate = 1e-2 * scale if config.step_length in ("rms", "unit") else 0.1
    for update, x, state in trajectory(config, xp, start, gradient, 14, rate=rate, dtype=dtype):
        assert np.isfinite(update).all()
        if not np.isfinite(gradient(0, x)).all():
            assert (update == 0).all()
        for field in ("history", "mean_params", "mean_grads", "gram", "middle_matrix", "gamma", "length"):
            for array in arrays_of(state)[field]:
                assert np.isfinite(to_numpy(array)).all(), field
        if not np.isfinite((x - rate * update).astype(dtype)).all():
            break  # the bare formulas diverge by themselves


@pytest.mark.slow_on("array_api_strict")
@pytest.mark.parametrize("preset", ["default", "fit", "lbfgs"])
@pytest.mark.parametrize(("dtype", "power"), [("float32", 30), ("float32", -30), ("float64", 200)])
def test_a_factor_on_the_loss_changes_nothing(xp, preset, dtype, power):
    config, rate = config_of(preset), 1e-2 if preset == "default" else 0.1
    start, runs = np.linspace(1.5, 2.0, 6), []
    for loss in (1.0, 10.0**power):
        steps = trajectory(config, xp, start, scaled_quadratic(loss, 1.0, dtype), 40, rate=rate, dtype=dtype)
        *_, (_, x, state) = steps
        runs.append(x)
        assert int(state.pairs[0]) > 3
    assert relative(runs[1] - 1, runs[0] - 1) < (2e-2 if dtype == "float32" else 1e-8)


@pytest.mark.slow_on("array_api_strict")
@pytest.mark.parametrize(("dtype", "power"), [("float32", 30), ("float32", -30), ("float64", -200)])
def test_fit_takes_the_same_steps_for_parameters_of_any_scale(xp, dtype, power):
    ends = []
    for scale in (1.0, 10.0**power):
        gradient, start = scaled_quadratic(1.0, scale, dtype), np.linspace(1.5, 2.0, 6) * scale
        *_, (_, x, state) = trajectory(core.Config(preset="fit"), xp, start, gradient, 60, 0.3, dtype)
        assert int(state.pairs[0]) >= 2
        ends.append(x / scale - 1)
    assert np.max(np.abs(ends[1] - ends[0])) < (1e-3 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e9, 3e9, 1e10, 1e30])
def test_fit_ends_at_the_minimum_at_every_scale_of_parameters(scale):
    gradient, start = scaled_quadratic(1.0, scale, "float32"), np.full(6, 2 * scale)
    config, x = core.Config(preset="fit"), start.astype("float32")
    state = core.Method(config).init([x])
    for t in range(200):
        update, state = core.Method(config).step(state, [x], [gradient(t, x)])
        x = x - np.float32(0.3) * update[0]
    assert np.max(np.abs(x / np.float32(scale) - 1)) < 2e-6


@pytest.mark.slow_on("array_api_strict", "jax")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("first", [1e-30, 1e-20, 1e-12, 0.0, np.nan])
def test_a_first_gradient_that_is_not_like_the_others_costs_one_step_at_most(xp, preset, first):
    """The scale of all gradients is decided by it, and must serve for ordinary ones too."""
    rate = {"default": 1e-2, "paper": 0.1}.get(preset, 0.3)
    ends = []
    for odd in (True, False):
        config, start = config_of(preset, update_every=5), np.linspace(1.5, 2.0, 6)

        def gradient(t, x, odd=odd):
            return np.full(6, first) if odd and t == 0 else CURVATURE * (x - 1)

        *_, (_, x, state) = trajectory(config, xp, start, gradient, 120, rate, "float32")
        assert int(state.skipped) == (1 if odd and np.isnan(first) else 0)
        assert int(state.pairs[0]) > 0
        ends.append(np.max(np.abs(x - 1)))
    assert ends[0] < max(3 * ends[1], 0.6)  # the recipe's averages remember it long


@pytest.mark.parametrize("preset", ["default", "fit", "lbfgs"])
def test_the_first_gradient_that_is_not_zero_decides_on_the_scale(xp, preset):
    def gradient(t, x):
        return 0 * x if t < 2 else 1e25 * CURVATURE * (x - 1)

    steps = trajectory(config_of(preset), xp, np.linspace(1.5, 2.0, 6), gradient, 60, 1e-2, "float32")
    *_, (_, _, state) = steps
    assert int(state.skipped) == 0
    assert int(state.pairs[0]) > 0
    assert float(to_numpy(state.grad_scale)) < 1


@pytest.mark.parametrize("step", [5, 40])
def test_a_later_gradient_of_another_scale_costs_its_step_at_most(xp, step):
    """The scale that the first gradient decides holds for the run; what overflows in it is skipped."""
    config, start = core.Config(), np.linspace(1.5, 2.0, 6)

    def gradient(t, x):
        return CURVATURE * (x - 1) * (1e35 if t == step else 1.0)

    steps = [state for _, _, state in trajectory(config, xp, start, gradient, step + 3, 1e-2, "float32")]
    assert [int(state.skipped) for state in steps[-4:]] == [0, 1, 1, 1]
    assert int(steps[-1].step) == step + 2


@pytest.mark.parametrize("ratio", [1e-30, 1e-7, 1e7, 1e25])
def test_half_precision_rows_hold_pairs_of_any_curvature(xp, ratio):
    if not hasattr(xp, "float16"):
        pytest.skip(f"{xp.__name__} has no float16")
    start, ends = np.linspace(1.5, 2.0, 6), []
    for dtype in ("float32", "float16"):
        config = config_of("fit", history_dtype=dtype)
        steps = trajectory(config, xp, start, lambda t, x: ratio * CURVATURE * (x - 1), 60, 0.3, "float32")
        *_, (_, x, state) = steps
        assert int(state.pairs[0]) > 2
        assert int(state.rejected[0]) == 0
        ends.append(x - 1)
        assert int(state.skipped) == 0
    np.testing.assert_allclose(*ends, atol=0.1)  # rounded rows lead along another path, to the same end


def test_the_first_direction_of_textbook_l_bfgs_is_not_lost_to_rounding(xp):
    """It has length 1 if a gradient is longer, or so short that rounding would swallow it."""
    config = core.Config(preset="lbfgs")
    for size in (1e-100, 1e-17, 1.0, 1e12):
        x = split(np.ones(4), [(4,)], xp)
        update, _ = core.Method(config).step(
            core.Method(config).init(x, xp=xp), x, split(np.full(4, size), [(4,)], xp)
        )
        np.testing.assert_allclose(join(update), 0.5, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(
    ("dim", "condition", "seed"), [(20, 3500.0, 0), (20, 3500.0, 1), (100, 1e3, 2), (5, 1e4, 3)]
)
def test_fit_converges_on_ill_conditioned_least_squares_without_noise(rate, dim, condition, seed):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(3 * dim, dim)) * np.geomspace(1.0, condition**-0.5, dim)
    target, x = matrix @ rng.normal(size=dim), np.zeros(dim)
    config = core.Config(preset="fit")
    state = core.Method(config).init([x])

    def value():
        return np.mean((matrix @ x - target) ** 2)

    first, highest = value(), 0.0
    for _ in range(1500):
        grad = 2 * matrix.T @ (matrix @ x - target) / len(target)
        check, due, *_ = (bool(flag) for flag in core.Method(config).upcoming(state))
        flags = {"when_check": check, "when_due": due, "when_scaled": bool(adapter.is_scaled(state))}
        update, state = core.Method(config).step(state, [x], [grad], **flags)
        x = x - rate * update[0]
        highest = max(highest, value())
    assert value() < 2e-4 * first
    assert highest < 1e4 * first


@pytest.mark.slow_on("jax")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_told_of_curvature_is_in_the_users_units(xp, dtype):
    """Of a loss in other units, by a factor that sets the scale of gradients."""
    loss, spectra, records = 2.0 ** (50 if dtype == "float32" else 400), [], []
    for factor in (1.0, loss):
        config, start = config_of("lbfgs"), np.linspace(1.5, 2.0, 6)
        steps = trajectory(config, xp, start, scaled_quadratic(factor, 1.0, dtype), 6, dtype=dtype)
        *_, (_, _, state) = steps
        assert (float(to_numpy(state.grad_scale)) != 1) == (factor != 1)
        record = core.diagnostics(state)
        spectra.append([to_numpy(x) for x in (*core.spectrum(state), core.curvatures(state))])
        records.append([to_numpy(x) for x in (core.curvatures(record), record.gamma, record.mu)])
        np.testing.assert_allclose(spectra[-1][4], records[-1][0], rtol=1e-6)
        records[-1].append(to_numpy(record.gradient_rms))
    units = (1 / loss, 1 / loss, loss, loss, loss, loss, 1 / loss, loss, loss)
    rtol = 2e-2 if dtype == "float32" else 1e-9
    for one, other, unit in zip(
        *([*a, *b] for a, b in zip(spectra, records, strict=True)), units, strict=True
    ):
        np.testing.assert_allclose(other, one * unit, rtol=rtol)
