"""Damping, the cosine floor, and pairs that carry no curvature."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlbfgs_core as core
from tests.helpers import PLAIN, relative, state_after, to_numpy
from tests.strategies import generators

lazy_xp_modules = [core]

DIM = 7
ROUNDING = 1 + 1e4 * np.finfo(float).eps


def stored(config, s, y, xp):
    """``(s, y)`` as the history has it after one push; `s` has length one."""
    state = state_after(config, [(s, y)], xp)
    assert int(state.pairs[0]) == 1
    history = to_numpy(state.history[0])
    return history[0, 0], history[1, 0], state


@given(rng=generators, floor=st.sampled_from([0.1, 0.3, 0.4, 0.9]))
def test_floored_pair_has_the_least_cosine(xp, rng, floor):
    config = core.Config(history_size=2, **{**PLAIN, "min_cosine": floor})
    s, y = rng.normal(size=DIM), rng.normal(size=DIM)
    unit, floored, state = stored(config, s, y, xp)
    y = y / np.linalg.norm(s)
    assert unit @ floored * ROUNDING >= floor * np.linalg.norm(y)
    # The floor is against the length of the raw y; what it leaves of the angle is bounded too.
    assert unit @ floored / np.linalg.norm(floored) * ROUNDING >= floor / np.sqrt(1 + floor**2)
    delta = to_numpy(state.delta)[0]
    assert delta == pytest.approx(max(0.0, floor * np.linalg.norm(y) - unit @ y), rel=1e-9, abs=1e-12)
    assert relative(floored, y + delta * unit) < 1e-12


@given(rng=generators)
def test_pair_above_the_floor_is_stored_as_it_is(xp, rng):
    config = core.Config(history_size=2, **{**PLAIN, "min_cosine": 0.4})
    s = rng.normal(size=DIM)
    y = 3 * s + 0.1 * rng.normal(size=DIM)
    unit, kept, _ = stored(config, s, y, xp)
    norm = np.linalg.norm(s)
    assert relative(unit, s / norm) < 1e-14
    assert relative(kept, y / norm) < 1e-14


@given(rng=generators, curvature=st.sampled_from([-30.0, -1.0, 0.0, 0.05, 0.5, 1.0, 2.0, 4.9, 30.0, 1e4]))
@pytest.mark.parametrize("tau_0", [1.0, 0.8])
def test_paper_damped_pair_has_curvature_within_bounds(xp, tau_0, rng, curvature):
    low, high = 0.1, 5.0
    config = core.Config(history_size=2, **{**PLAIN, "damping": (low, high, tau_0)})
    s = rng.normal(size=DIM)
    side = rng.normal(size=DIM)
    y = curvature * s + side - (side @ s) / (s @ s) * s  # s.y / s.s is the curvature
    unit, damped, state = stored(config, s, y, xp)
    assert low / ROUNDING <= unit @ damped <= high * ROUNDING
    tau = to_numpy(state.tau)[0]
    assert to_numpy(state.mu)[0] == pytest.approx(curvature, abs=1e-10)
    if curvature <= low and (1 - low) / (1 - curvature) < tau_0:  # tau_0 does not bind
        assert unit @ damped == pytest.approx(low, rel=1e-9)
    elif curvature >= high and (high - 1) / (curvature - 1) < tau_0:
        assert unit @ damped == pytest.approx(high, rel=1e-9)
    else:
        assert tau == pytest.approx(tau_0)
    norm = np.linalg.norm(s)
    assert relative(damped, tau * y / norm + (1 - tau) * s / norm) < 1e-12


@pytest.mark.parametrize("case", ["negative curvature", "orthogonal", "s = 0", "y = 0", "infinite y"])
def test_pair_without_curvature_is_counted_and_leaves_the_operator_alone(xp, case):
    config = core.Config(history_size=3, **PLAIN)
    rng = np.random.default_rng(0)
    s = rng.normal(size=DIM)
    bad = {
        "negative curvature": (s, -s),
        "orthogonal": (np.eye(DIM)[0], np.eye(DIM)[1]),
        "s = 0": (0 * s, s),
        "y = 0": (s, 0 * s),
        "infinite y": (s, np.where(np.arange(DIM) == 2, np.inf, s)),
    }[case]
    before = state_after(config, [(s, 2 * s)], xp)
    expected = {name: to_numpy(getattr(before, name)) for name in ("gram", "operator", "gamma", "pairs")}
    history = to_numpy(before.history[0]).copy()
    after = state_after(config, [bad], xp, start=before)
    for name, value in expected.items():
        np.testing.assert_array_equal(to_numpy(getattr(after, name)), value)
    np.testing.assert_array_equal(to_numpy(after.history[0]), history)
    assert int(after.rejected[0]) == 1


@given(rng=generators)
def test_negative_curvature_is_usable_with_the_floor(xp, rng):
    config = core.Config(history_size=3, **{**PLAIN, "min_cosine": 0.4})
    s = rng.normal(size=DIM)
    unit, floored, _ = stored(config, s, -3 * s, xp)
    assert unit @ floored > 0
