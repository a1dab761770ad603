"""What every preconditioner promises; adding one to `PRECONDITIONERS` is enough to test it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlbfgs_core as core
from mlbfgs_core import adapter
from mlbfgs_core.preconditioner import PRECONDITIONERS
from mlbfgs_core.reference import Reference, bfgs_inverse_hessian
from tests.helpers import (
    PLAIN,
    apply,
    arrays_of,
    curvature_pairs,
    join,
    operator_matrix,
    relative,
    spd,
    split,
    state_after,
    to_numpy,
)
from tests.strategies import generators

lazy_xp_modules = [core]

SHAPE, DIM, M = (3, 4), 12, 4
EPS = np.finfo(np.float64).eps
EACH = pytest.mark.parametrize("name", PRECONDITIONERS)
POWERS = st.sampled_from([1.0, 0.3, 0.0])


def settings(name, power=1.0, **others):
    return core.Config(
        **{**PLAIN, "history_size": M, "preconditioner": name, "preconditioner_power": power, **others}
    )


def gradients(rng, count):
    """Gradients whose values differ in size."""
    return rng.normal(size=(count, DIM)) * np.geomspace(0.2, 5, DIM)


def fed(config, rng, xp, shapes=(SHAPE,), dtype="float64"):
    """A state after some gradients."""
    method, x = core.Method(config), split(rng.normal(size=DIM), shapes, xp, dtype)
    state = method.init(x, xp=xp)
    for gradient in gradients(rng, 5):
        _, state = method.step(state, x, split(gradient, shapes, xp, dtype))
    return state


def root_of(config, state, xp, leaf=0):
    """`R` of a leaf, which includes all gradients."""
    arrays = {name: own[leaf] for name, own in state.preconditioner.items()}
    floor = state.mean_square[0] * 1e-16
    return PRECONDITIONERS[config.preconditioner].root(config, arrays, xp.float64, None, floor)


def twin_of(config, shapes=(SHAPE,)):
    """The reference of leaves in one block."""
    starts = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
    matrices = [
        (0, start, shape)
        for start, shape in zip(starts, shapes, strict=False)
        if config.preconditioner == "kronecker" and len(shape) == 2 and max(shape) > 1
    ]
    return Reference(config, [int(starts[-1])], matrices)


def dense(function, xp):
    """The matrix of a linear function of a leaf."""
    return np.stack([join([function(*split(unit, [SHAPE], xp))]) for unit in np.eye(DIM)], axis=1)


def root_matrix(config, state, xp):
    return dense(root_of(config, state, xp).at(core.Kernels(xp), None).whiten, xp)


@EACH
@given(rng=generators, power=POWERS)
def test_back_is_the_transpose_of_whiten_and_dual_its_inverse(xp, name, rng, power):
    config = settings(name, power)
    of_leaf, kernels = root_of(config, fed(config, rng, xp), xp), core.Kernels(xp)

    def verb(name):  # `at` is called each time: `back` may overwrite what the root has formed
        return dense(lambda leaf: getattr(of_leaf.at(kernels, None), name)(leaf), xp)

    R, white, back, dual = map(verb, ("whiten", "white", "back", "dual"))
    assert relative(white, R) < 1e2 * EPS
    assert relative(back, R.T) < 1e2 * EPS
    np.testing.assert_allclose(dual.T @ R, np.eye(DIM), rtol=0, atol=1e4 * EPS)
    root = of_leaf.at(kernels, None)
    product = dense(lambda leaf: of_leaf.at(kernels, None).back(root.white(leaf)), xp)
    assert relative(product, product.T) < 1e2 * EPS
    assert np.linalg.eigvalsh(product)[0] > 0


@EACH
@given(rng=generators, power=POWERS)
def test_the_root_is_that_of_the_dense_twin_up_to_a_rotation(xp, name, rng, power):
    config = settings(name, power)
    method, x = core.Method(config), rng.normal(size=DIM)
    state, twin = method.init(split(x, [SHAPE], xp), xp=xp), twin_of(config)
    for gradient in gradients(rng, 5):
        _, state = method.step(state, split(x, [SHAPE], xp), split(gradient, [SHAPE], xp))
        twin.step([x], [gradient])
        R, expected = root_matrix(config, state, xp), twin.dense_root(twin.blocks[0])
        assert relative(R.T @ R, expected.T @ expected) < 1e-9
        if name != "kronecker":  # whose twin has another, symmetric root
            assert relative(R, expected) < 1e-10


def inverse_hessian(config, state, xp):
    return dense(lambda leaf: core.inverse_hessian(config, state, [leaf])[0], xp)


@EACH
@given(rng=generators, power=POWERS)
def test_the_inverse_hessian_is_dense_bfgs_that_starts_from_the_preconditioner(xp, name, rng, power):
    config = settings(name, power)
    state, pairs = fed(config, rng, xp), curvature_pairs(rng, M + 2, DIM, condition=10.0)
    R, gradient = root_matrix(config, state, xp), rng.normal(size=DIM)
    for before, count in (
        (0, 1),
        (1, M),
        (M, M + 2),
    ):  # one pair, a full ring, one that has been written over
        state = state_after(config, pairs[before:count], xp, [SHAPE], start=state)
        s, y = pairs[count - 1]
        gamma = s @ y / np.sum((R @ y) ** 2)
        expected = bfgs_inverse_hessian(pairs[:count][-M:], gamma * R.T @ R, DIM)
        H = inverse_hessian(config, state, xp)
        assert relative(H, expected) < 1e-9
        assert relative(H @ y, s) < 1e-9  # the secant equation
        assert relative(apply(config, state, gradient, xp, [SHAPE]), expected @ gradient) < 1e-9


@EACH
@given(rng=generators, power=POWERS)
def test_stored_pairs_obey_the_secant_equation_in_the_parameters_coordinates_while_it_changes(
    xp, name, rng, power
):
    config, matrix = settings(name, power, update_every=2, min_cosine=0.1), spd(rng, DIM)
    method, x = core.Method(config), rng.normal(size=DIM)
    state = method.init(split(x, [SHAPE], xp), xp=xp)
    for _ in range(11):
        gradient = matrix @ x + 1e-3 * rng.normal(size=DIM)
        update, state = method.step(state, split(x, [SHAPE], xp), split(gradient, [SHAPE], xp))
        x = x - 0.05 * join(update)
    R, stored = root_matrix(config, state, xp), to_numpy(state.history[0]).reshape(2, M, DIM)
    count = int(state.pairs[0])
    slots = [i % M for i in range(max(0, count - M), count)]
    assert slots
    pairs = [(R.T @ stored[0, i], np.linalg.solve(R, stored[1, i])) for i in slots]
    H, (s, y) = inverse_hessian(config, state, xp), pairs[-1]
    assert relative(H @ y, s) < 1e-8
    assert relative(H, bfgs_inverse_hessian(pairs, to_numpy(state.gamma)[0] * R.T @ R, DIM)) < 1e-8
    assert relative(H, R.T @ operator_matrix(state) @ R) < 1e-10
    assert relative(H, H.T) < 1e-10
    assert np.linalg.eigvalsh((H + H.T) / 2)[0] > 0


@EACH
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@given(rng=generators, place=st.integers(0, DIM - 1))
def test_a_gradient_that_is_not_finite_changes_nothing(xp, name, bad, rng, place):
    config = settings(name)
    state, x, poisoned = fed(config, rng, xp), split(np.ones(DIM), [SHAPE], xp), gradients(rng, 1)[0]
    before = {name: [to_numpy(array).copy() for array in own] for name, own in arrays_of(state).items()}
    poisoned[place] = bad
    update, after = core.Method(config).step(state, x, split(poisoned, [SHAPE], xp))
    assert not np.any(to_numpy(update[0]))
    for own, arrays in arrays_of(after).items():
        if own not in ("skipped", "accepted"):
            np.testing.assert_array_equal(to_numpy(arrays[0]), before[own][0], err_msg=own)
    assert int(after.skipped) == 1


@EACH
@given(rng=generators, power=POWERS)
def test_an_elementwise_root_lets_leaves_be_packed(xp, name, rng, power):
    config = settings(name, power, update_every=2, min_cosine=0.1)
    if not root_of(config, fed(config, rng, xp), xp).elementwise:
        pytest.skip("its leaves keep their shapes")
    shapes, method, x = [(2, 3), (), (5,)], core.Method(config), rng.normal(size=DIM)
    apart, packed = (method.init(split(x, own, xp), xp=xp) for own in (shapes, [(DIM,)]))
    for gradient in gradients(rng, 9):
        update, apart = method.step(apart, split(x, shapes, xp), split(gradient, shapes, xp))
        whole, packed = method.step(packed, split(x, [(DIM,)], xp), split(gradient, [(DIM,)], xp))
        assert relative(join(update), join(whole)) < 1e-8
        x = x - 1e-3 * join(whole)
    for own, arrays in packed.preconditioner.items():
        np.testing.assert_array_equal(join(apart.preconditioner[own]), to_numpy(arrays[0]))


@EACH
@pytest.mark.parametrize("history_size", [0, M])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_layout_is_that_of_the_arrays(xp, name, history_size, dtype):
    config = settings(name, history_size=history_size)
    shapes, blocks = [(2, 3), (), (5,), (0, 2)], ((0, 2), (1, 3))
    leaves = split(np.ones(DIM), shapes, xp, dtype)
    state = core.Method(config, blocks).init(leaves, xp=xp)
    found = {}
    for own, arrays in adapter.leaf_arrays(state).items():
        for leaf, array in enumerate(arrays):
            if array is not None:
                found[own, leaf] = tuple(array.shape), adapter.dtype_name(array)
    for own, array in adapter.coefficients(state).items():
        found[own, None] = tuple(array.shape), adapter.dtype_name(array)
    entries = list(adapter.layout(config, leaves, blocks))
    assert {(entry.name, entry.leaf): (entry.shape, entry.dtype) for entry in entries} == found
    assert len(entries) == len(found)
    assert not any(name.startswith(("history", "mean_params")) for name, _ in found) or history_size


@pytest.mark.backends("numpy")
@EACH
@pytest.mark.parametrize("history_size", [0, M])
def test_a_file_tells_of_which_kind_it_is(tmp_path, name, history_size):
    config, params = settings(name, history_size=history_size), (np.ones(SHAPE),)
    state = core.Method(config).step(core.Method(config).init(params), params, params)[1]
    core.save_state(tmp_path / "run", [core.Snapshot(("x",), ((0,),), state, params, (None,))])
    (found,) = core.load_state(tmp_path / "run")
    mine, theirs = arrays_of(state), arrays_of(found.state)
    assert list(mine) == list(theirs)
    for own, arrays in mine.items():
        np.testing.assert_array_equal(arrays[0], theirs[own][0], err_msg=own)
    other = next(kind for kind in PRECONDITIONERS if kind != name)
    wanted = core.Method(settings(other, history_size=history_size)).init(params)
    with pytest.raises(ValueError, match=f"preconditioner='{other}', got one with '{name}'"):
        core.load_state(tmp_path / "run", [core.Snapshot(("x",), ((0,),), wanted, params, (None,))])
