"""Noise taken out of pairs, damping, the cosine floor, and pairs that carry no curvature."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlbfgs_core as core
from tests.helpers import PLAIN, relative, split, state_after, to_numpy
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
    # The floor is relative to the length of the raw y; the angle that remains is bounded too.
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
    expected = {name: to_numpy(getattr(before, name)) for name in ("gram", "middle_matrix", "gamma", "pairs")}
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


NOW, BEFORE = 4, 6
"""Steps in the window of a noisy pair, and in the window before."""


def refreshed(config, s, y, noise, xp, blocks=None):
    """The state after a pair whose ``|y|^2`` over all blocks is expected to contain this much noise.

    The noise of a mean of n gradients is 1/n of that of one, which is known from the scatter about the
    means, of ``NOW + BEFORE - 2`` degrees of freedom.
    """
    shapes = [(DIM,)] * (len(s) // DIM)
    scatter = float(noise) / (1 / NOW + 1 / BEFORE) * (NOW + BEFORE - 2)
    leaves = {"mean_params": s, "mean_grads": y, "prev_params": 0 * s, "prev_grads": 0 * y}
    state = core.Method(config, blocks).init(split(s, shapes, xp), xp=xp)
    ones, one = state.leaf_window * 0 + 1, state.window * 0 + 1
    state = state._replace(
        **{name: tuple(split(value, shapes, xp)) for name, value in leaves.items()},
        leaf_window=ones * NOW,
        leaf_prev_window=ones * BEFORE,
        window=one * NOW,
        prev_window=one * BEFORE,
        scatter=state.scatter + 0.25 * scatter,
        prev_scatter=state.prev_scatter + 0.75 * scatter,
    )
    return core.Method(config, blocks=blocks).refresh(state, True)


def stored_y(state, leaf=0):
    return to_numpy(state.history[leaf])[1, 0]


def freed(s, y, factor):
    """`y` in units of ``|s|``, its part orthogonal to `s` multiplied by a factor; and the unit `s`."""
    unit = s / np.linalg.norm(s)
    along = (unit @ y) * unit
    return (along + factor * (y - along)) / np.linalg.norm(s), unit


def noisy_pair(rng):
    s = rng.normal(size=DIM)
    return s, 3 * s + rng.normal(size=DIM) * np.linalg.norm(s)


def kept(part, shrinkage):
    """What is kept of `y` across `s` if this part of ``|y|^2`` is expected to be noise."""
    return 1.0 if shrinkage == 1 else max(0.0, 1 - part, shrinkage * min(1, part - 1.5))


@given(rng=generators, part=st.sampled_from([0.0, 0.3, 0.74, 0.99, 1.7, 7.0]))
@pytest.mark.parametrize("shrinkage", [0.1, 0.25, 0.6, 1.0])
def test_part_across_s_is_shrunk_by_the_part_of_y_that_is_no_noise(xp, rng, part, shrinkage):
    config = core.Config(history_size=2, **{**PLAIN, "adaptive": True, "shrinkage": shrinkage})
    s, y = noisy_pair(rng)
    y += max(0.0, 1 - s @ y) * s  # with positive curvature
    state = refreshed(config, s, y, part * (y @ y), xp)
    expected, unit = freed(s, y, kept(part, shrinkage))
    assert to_numpy(state.tau)[0] == 1  # of the paper's damping, which is off
    assert relative(stored_y(state), expected) < 1e-12
    assert unit @ stored_y(state) == pytest.approx(unit @ y / np.linalg.norm(s), rel=1e-12)
    assert to_numpy(state.delta)[0] == 0


@given(rng=generators)
@pytest.mark.parametrize(("part", "curvature"), [(1.01, 1.0), (1.4, 1.0), (0.3, -1.0), (7.0, -1.0)])
def test_a_pair_of_noise_or_without_curvature_takes_its_place_and_says_nothing(xp, rng, part, curvature):
    config = core.Config(history_size=2, **{**PLAIN, "adaptive": True, "min_cosine": 0.2})
    s, y = noisy_pair(rng)
    y += (curvature - (s @ y) / (s @ s)) * s
    state = refreshed(config, s, y, part * (y @ y), xp)
    assert (int(state.pairs[0]), int(state.rejected[0])) == (1, 0)
    assert not to_numpy(state.history[0]).any()
    assert not to_numpy(state.middle_matrix).any()
    assert to_numpy(state.mu)[0] == pytest.approx(curvature, rel=1e-9)  # which diagnostics show


@given(rng=generators)
@pytest.mark.parametrize("part", [0.3, 7.0])
def test_cosine_floor_is_against_the_shrunk_y(xp, rng, part):
    settings = {**PLAIN, "adaptive": True, "shrinkage": 0.25, "min_cosine": 0.9}
    s, y = noisy_pair(rng)
    y += (0.1 - (s @ y) / (s @ s)) * s
    state = refreshed(core.Config(history_size=2, **settings), s, y, part * (y @ y), xp)
    shrunk, unit = freed(s, y, kept(part, 0.25))
    delta = max(0.0, 0.9 * np.linalg.norm(shrunk) - unit @ shrunk)
    assert to_numpy(state.delta)[0] == pytest.approx(delta, rel=1e-9, abs=1e-12)
    assert relative(stored_y(state), shrunk + delta * unit) < 1e-11


@given(rng=generators, curvature=st.sampled_from([0.05, 1.0, 30.0]))
def test_papers_damping_is_of_the_shrunk_y(xp, rng, curvature):
    settings = {**PLAIN, "adaptive": True, "shrinkage": 0.25, "damping": (0.1, 5.0, 0.9)}
    s, y = noisy_pair(rng)
    y = y + (curvature - (s @ y) / (s @ s)) * s
    state = refreshed(core.Config(history_size=2, **settings), s, y, 0.4 * (y @ y), xp)
    shrunk, unit = freed(s, y, 0.6)
    tau = {0.05: 0.9, 1.0: 0.9, 30.0: 4 / 29}[curvature]  # Niu et al. 2023
    assert to_numpy(state.tau)[0] == pytest.approx(tau, rel=1e-9)
    assert relative(stored_y(state), tau * shrunk + (1 - tau) * unit) < 1e-11


@pytest.mark.parametrize("settings", [{"shrinkage": 1.0}, {"adaptive": False, "shrinkage": 0.0}], ids=str)
def test_noise_leaves_y_alone_with_a_shrinkage_of_one_or_a_fixed_schedule(xp, settings):
    config = core.Config(history_size=2, **{**PLAIN, "adaptive": True, **settings})
    s, y = noisy_pair(np.random.default_rng(0))
    state = refreshed(config, s, y, 0.5 * (y @ y), xp)
    expected, _ = freed(s, y, 1.0)
    assert relative(stored_y(state), expected) < 1e-14
    assert to_numpy(state.tau)[0] == 1
    silent = refreshed(config, s, y, 0.0, xp)
    for name in ("tau", "delta", "gram", "middle_matrix", "gamma"):
        np.testing.assert_array_equal(to_numpy(getattr(state, name)), to_numpy(getattr(silent, name)))
    np.testing.assert_array_equal(to_numpy(state.history[0]), to_numpy(silent.history[0]))


@given(rng=generators, length=st.sampled_from([1e-3, 1.0, 50.0]))
def test_blocks_share_the_shrinkage_of_the_whole_y(xp, rng, length):
    config = core.Config(history_size=2, **{**PLAIN, "adaptive": True, "shrinkage": 0.25})
    (s, y), (s_other, y_other) = noisy_pair(rng), noisy_pair(rng)
    y_other = length * y_other
    joint = np.concatenate([y, y_other])
    state = refreshed(
        config, np.concatenate([s, s_other]), joint, 0.4 * (joint @ joint), xp, blocks=((0,), (1,))
    )
    assert relative(stored_y(state, 0), freed(s, y, 0.6)[0]) < 1e-12
    assert relative(stored_y(state, 1), freed(s_other, y_other, 0.6)[0]) < 1e-12


@pytest.mark.parametrize("case", ["s = 0", "y = 0", "infinite y"])
def test_noisy_pair_without_curvature_is_counted_and_not_stored(xp, case):
    config = core.Config(history_size=2, **{**PLAIN, "adaptive": True, "shrinkage": 0.25})
    s, y = noisy_pair(np.random.default_rng(0))
    bad = {
        "s = 0": (0 * s, y),
        "y = 0": (s, 0 * y),
        "infinite y": (s, np.where(np.arange(DIM) == 2, np.inf, y)),
    }
    state = refreshed(config, *bad[case], 0.5, xp)
    assert (int(state.pairs[0]), int(state.rejected[0])) == (0, 1)
    assert not to_numpy(state.history[0]).any()
    assert float(state.gamma[0]) == 1
