"""The Kronecker preconditioner: what its coordinates promise, and what its pairs do in them."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlbfgs_core as core
from mlbfgs_core.adapter import Matrix, matrices_in
from mlbfgs_core.reference import Reference
from tests.helpers import arrays_of, foreseen, join, relative, spd, split, to_numpy
from tests.strategies import generators

lazy_xp_modules = [core]

SHAPES = [(4, 3), (2,), (3, 3), ()]
DIM = 24
MATRICES = [(0, 0, (4, 3)), (0, 14, (3, 3))]
FEWER = hypothesis.settings(max_examples=3 * hypothesis.settings().max_examples // 5)
"""A step takes many operations."""
EXACT = {"preconditioner": "kronecker", "precondition_frequency": 3}


def settings(**others):
    return core.Config(**{**EXACT, **others})


def run(config, shapes, xp, gradient, steps, *, start, lr=0.02, dtype="float64", matrices=None, skipped=0):
    """Parameters after some steps, and the state."""
    method, x = core.Method(config, matrices=matrices), start.copy()
    state = method.init(split(x, shapes, xp, dtype), xp=xp)
    for step in range(steps):
        update, state = method.step(
            state, split(x, shapes, xp, dtype), split(gradient(x, step), shapes, xp, dtype)
        )
        x = x if step < skipped else x - lr * join(update)
    return x, state


def noisy_quadratic(rng, dim=DIM):
    matrix, noise = spd(rng, dim, 30.0), 0.01 * rng.normal(size=(60, dim))
    return lambda x, step: matrix @ x + noise[step]


@pytest.mark.parametrize(
    "own",
    [
        {"update_every": 5, "check_every": 2, "signal_to_noise": 1.0},
        {"update_every": 4, "adaptive": False},
        {"update_every": 5, "check_every": 2, "beta": 0.8},
        {"history_size": 0},
        {"update_every": 5, "preconditioner_power": 0.6, "max_preconditioner_dim": 3},
    ],
    ids=["adaptive", "fixed", "exponential", "no pairs", "one side"],
)
@FEWER
@given(rng=generators)
def test_turned_pairs_are_those_of_the_symmetric_root_of_the_dense_twin(xp, own, rng):
    config, gradient, start = (
        settings(
            history_size=own.get("history_size", 2), **{k: v for k, v in own.items() if k != "history_size"}
        ),
        noisy_quadratic(rng),
        rng.normal(size=DIM),
    )
    x, state = run(config, SHAPES, xp, gradient, 24, start=start)
    twin, y = Reference(config, [DIM], MATRICES), start.copy()
    for step in range(24):
        y = y - 0.02 * twin.step([y], [gradient(y, step)])[0]
    assert len(twin.blocks[0].pairs) == min(int(state.pairs[0]), config.history_size)
    assert relative(x, y) < 1e-7


@FEWER
@given(rng=generators)
def test_rotating_inputs_and_outputs_of_a_layer_rotates_the_run(xp, rng):
    config, n = settings(update_every=4, check_every=2, signal_to_noise=1.0), 4
    (P, _), (Q, _) = (np.linalg.qr(rng.normal(size=(n, n))) for _ in range(2))
    rotation, plain, start = np.kron(P, Q), noisy_quadratic(rng, n * n), rng.normal(size=n * n)
    # The first step is taken before there are bases, in the parameters' own coordinates: take it back.
    x, _ = run(config, [(n, n)], xp, plain, 25, start=start, skipped=1)
    turned, _ = run(
        config,
        [(n, n)],
        xp,
        lambda y, step: rotation @ plain(rotation.T @ y, step),
        25,
        start=rotation @ start,
        skipped=1,
    )
    assert relative(rotation.T @ turned, x) < 1e-8


@FEWER
@given(rng=generators, exponent=st.integers(-30, 30))
def test_rescaling_the_loss_leaves_the_run_alone(xp, rng, exponent):
    config, gradient, start = settings(update_every=4), noisy_quadratic(rng), rng.normal(size=DIM)
    x, _ = run(config, SHAPES, xp, gradient, 12, start=start)
    scaled, _ = run(config, SHAPES, xp, lambda y, step: gradient(y, step) * 2.0**exponent, 12, start=start)
    assert relative(scaled, x) < 1e-6


def soap(start, gradients, lr, shape, frequency, beta=0.99, factor_beta=0.95):
    """SOAP without momentum (Vyas et al. 2024) that knows a basis before its first step."""
    W, v = start.reshape(shape).copy(), np.zeros(shape)
    L, R, U, V = np.zeros((shape[0],) * 2), np.zeros((shape[1],) * 2), np.eye(shape[0]), np.eye(shape[1])
    for t, gradient in enumerate(gradients, 1):
        G = gradient(W.ravel()).reshape(shape)
        if t == 1:
            U, V = (np.linalg.eigh(X)[1][:, ::-1] for X in (G @ G.T, G.T @ G))
        rotated = U.T @ G @ V
        if t == 1:  # all else is rounding
            rotated = np.diag(np.diag(rotated))
        v = beta * v + (1 - beta) * rotated**2
        scale = np.sqrt(np.where(v > 0, v / (1 - beta**t), 1.0))
        W = W - lr * U @ (rotated / scale) @ V.T
        L, R = factor_beta * L + (1 - factor_beta) * G @ G.T, factor_beta * R + (1 - factor_beta) * G.T @ G
        if t in (2, 4, 7) or (t > 1 and t % frequency == 0):
            orders = []
            for X, basis in ((L, U), (R, V)):
                orders.append(np.argsort(-np.einsum("ij,ij->j", basis, X @ basis)))
            v = v[np.ix_(*orders)]
            U, V = np.linalg.qr((L @ U)[:, orders[0]])[0], np.linalg.qr((R @ V)[:, orders[1]])[0]
    return W.ravel()


@FEWER
@given(rng=generators)
def test_without_pairs_and_length_control_it_is_soap(xp, rng):
    shape = (4, 4)
    plain, start = noisy_quadratic(rng, 16), rng.normal(size=16)
    config = settings(history_size=0, step_length="none")
    x, _ = run(config, [shape], xp, plain, 20, start=start)
    gradients = [lambda y, step=step: plain(y, step) for step in range(20)]
    # The ridge of the power iteration and the floors are not in it.
    assert relative(x, soap(start, gradients, 0.02, shape, 3)) < 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 2e-2)])
@FEWER
@given(rng=generators)
def test_a_constant_gradient_of_rank_one_gives_a_direction_of_rank_one(xp, dtype, tolerance, rng):
    shape, G = (6, 5), np.outer(rng.normal(size=6), rng.normal(size=5)).ravel()
    method = core.Method(settings(history_size=0))
    state, x = (
        method.init(split(np.zeros(30), [shape], xp, dtype), xp=xp),
        split(np.zeros(30), [shape], xp, dtype),
    )
    for _ in range(12):
        update, state = method.step(state, x, split(G, [shape], xp, dtype))
    along = join(update) @ G / (np.linalg.norm(G) * np.linalg.norm(join(update)))
    assert along > 1 - tolerance


@FEWER
@given(rng=generators)
def test_stacked_layers_are_batches_of_matrices(xp, rng):
    config, gradient, start = (
        settings(update_every=4, check_every=2),
        noisy_quadratic(rng),
        rng.normal(size=DIM),
    )
    apart, _ = run(config, [(3, 4), (3, 4)], xp, gradient, 20, start=start)
    (matrix,) = matrices_in(config, ["w"], [(2, 3, 4)], {"w": (1, 1)})
    together, state = run(config, [(2, 3, 4)], xp, gradient, 20, start=start, matrices=[matrix])
    flat, _ = run(config, [(DIM,)], xp, gradient, 20, start=start, matrices=[Matrix(2, 3, 4, True, True)])
    assert relative(together, apart) < 1e-9
    assert relative(flat, apart) < 1e-9
    assert state.preconditioner["left_factor"][0].shape == (2, 3, 3)


@pytest.mark.parametrize(
    "kind",
    [
        "zero",
        "dead row",
        "dead column",
        "rank one",
        "one row",
        "one column",
        "empty",
        "tiny",
        "zero at first",
    ],
)
@FEWER
@given(rng=generators, dtype=st.sampled_from(["float32", "float64"]))
def test_degenerate_gradients_give_finite_steps_of_the_usual_size(xp, dtype, kind, rng):
    shape = {"one row": (1, 5), "one column": (5, 1), "empty": (0, 5)}.get(kind, (4, 5))
    size = int(np.prod(shape))

    def gradient(x, step):
        G = rng.normal(size=shape)
        if kind == "zero" or (kind == "zero at first" and step < 6):
            G *= 0.0
        if kind == "dead row":
            G[1] = 0.0
        if kind == "dead column":
            G[:, 2] = 0.0
        if kind == "rank one":
            G = np.outer(np.ones(shape[0]), G[0])
        return np.concatenate([(G * (1e-12 if kind == "tiny" else 1.0)).ravel(), rng.normal(size=2)])

    config = settings(update_every=4, check_every=2)
    x, state = run(config, [shape, (2,)], xp, gradient, 16, start=np.zeros(size + 2), lr=1.0, dtype=dtype)
    for name, arrays in arrays_of(state).items():
        for array in arrays:
            assert array is None or np.isfinite(to_numpy(array)).all(), name
    assert np.isfinite(x).all()
    moved = x[:size].reshape(shape)
    assert np.abs(moved).max(initial=0.0) < 160
    if kind == "dead row":
        assert not moved[1].any()
    if kind == "dead column":
        assert not moved[:, 2].any()
    if kind == "zero":
        assert not moved.any()


@pytest.mark.parametrize("step", [0, 1, 3])
@FEWER
@given(rng=generators)
def test_a_gradient_that_is_not_finite_changes_no_factor_at_any_step(xp, step, rng):
    config, gradient, start = settings(update_every=4), noisy_quadratic(rng), rng.normal(size=DIM)
    _, state = run(config, SHAPES, xp, gradient, step, start=start)
    before = {
        name: [None if array is None else to_numpy(array).copy() for array in own]
        for name, own in arrays_of(state).items()
    }
    bad = split(gradient(start, step), SHAPES, xp)
    bad[0] = bad[0] * xp.nan
    _, after = core.Method(config).step(state, split(start, SHAPES, xp), bad)
    for name, own in arrays_of(after).items():
        for array, old in zip(own, before[name], strict=True):
            if name not in ("skipped", "accepted") and array is not None:
                np.testing.assert_array_equal(to_numpy(array), old, err_msg=name)


@FEWER
@given(rng=generators)
def test_bases_stay_orthonormal_and_find_the_eigenvectors(xp, rng):
    shape = (4, 6)
    left = spd(rng, 4, 20.0)
    _, state = run(
        settings(factor_beta=0.99),
        [shape],
        xp,
        lambda x, step: (left @ np.random.default_rng(step).normal(size=shape)).ravel(),
        60,
        start=np.zeros(24),
    )
    for side in ("left", "right"):
        basis, factor = (
            to_numpy(state.preconditioner[f"{side}_{kind}"][0])[0] for kind in ("basis", "factor")
        )
        np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-12)
        values = np.diag(basis.T @ factor @ basis)
        assert values[0] >= 0.8 * np.linalg.eigvalsh(factor)[-1]


def test_a_parameter_without_a_gradient_keeps_its_factors(xp):
    rng = np.random.default_rng(0)
    config, x = settings(update_every=4), rng.normal(size=DIM)
    method = core.Method(config)
    state, twin = method.init(split(x, SHAPES, xp), xp=xp), Reference(config, [DIM], MATRICES)
    for step in range(20):
        gradient, present = rng.normal(size=DIM), np.ones(DIM, dtype=bool)
        leaves = split(gradient, SHAPES, xp)
        if step % 3 == 1 or step < 2:  # the second matrix has its first gradient after bases were formed
            leaves[2] = None
            present[14:23] = False
        update, state = method.step(state, split(x, SHAPES, xp), leaves)
        (expected,) = twin.step([x], [gradient], [present])
        got = np.concatenate([np.zeros(9) if leaf is None else to_numpy(leaf).ravel() for leaf in update])
        assert relative(got, expected) < 1e-8
        x = x - 0.02 * got


@FEWER
@given(rng=generators)
def test_what_the_host_foresees_equals_the_masked_step(xp, rng):
    config, gradient, x = settings(update_every=4, check_every=2), noisy_quadratic(rng), rng.normal(size=DIM)
    masked, _ = run(config, SHAPES, xp, gradient, 12, start=x)
    method = core.Method(config)
    state = method.init(split(x, SHAPES, xp), xp=xp)
    for step in range(12):
        asked = foreseen(method, state)
        assert asked["when_formed"] == (step == 0)
        assert asked["when_turned"] == (step + 1 in (2, 3, 4, 6, 7, 9, 12))
        update, state = method.step(
            state, split(x, SHAPES, xp), split(gradient(x, step), SHAPES, xp), **asked
        )
        x = x - 0.02 * join(update)
    assert relative(x, masked) < 1e-9


@FEWER
@given(rng=generators)
def test_pairs_that_are_noise_leave_the_run_alone(xp, rng):
    shape, steps = (30, 40), 40
    fresh = rng.normal(size=(steps + 1, 1200))
    # Gradients of neighbouring steps repel each other a little, so that 1.3 of |y|^2 is expected as noise.
    noise = fresh[1:] - 0.12 * fresh[:-1]
    runs = [
        run(
            settings(history_size=size, update_every=10),
            [shape],
            xp,
            lambda x, step: noise[step],
            steps,
            start=np.zeros(1200),
        )
        for size in (3, 0)
    ]
    (with_pairs, state), (without, _) = runs
    assert int(state.pairs[0]) == 3
    np.testing.assert_array_equal(to_numpy(state.gram), 0.0)
    assert relative(with_pairs, without) < 1e-12


@FEWER
@given(rng=generators)
def test_curvature_that_moves_the_gradients_more_than_noise_does_is_kept(xp, rng):
    """A run that swings about a minimum: far more noise is expected than the averages show."""
    curvature = np.diag(rng.uniform(1.0, 30.0, size=DIM))
    _, state = run(
        settings(update_every=8),
        SHAPES,
        xp,
        lambda x, step: curvature @ x,
        48,
        start=rng.normal(size=DIM),
        lr=0.2,
    )
    assert int(state.pairs[0]) > 3
    used = np.diagonal(to_numpy(state.gram)[0])[: settings().history_size] > 0
    assert used.sum() > settings().history_size / 2


@FEWER
@given(rng=generators)
def test_figures_of_factors_are_those_of_dense_eigenvalues(xp, rng):
    factors = np.stack([spd(rng, 5, 50.0), spd(rng, 5, 3.0), np.zeros((5, 5))])
    bases = np.stack([np.linalg.eigh(factor)[1][:, ::-1] for factor in factors])
    figures = core.factor_figures(xp.asarray(factors), xp.asarray(bases))
    values = np.linalg.eigvalsh(factors[:2])
    np.testing.assert_allclose(to_numpy(figures.condition), [*(values[:, -1] / values[:, 0]), 1.0], rtol=1e-9)
    np.testing.assert_allclose(to_numpy(figures.share), [*(values[:, -1] / values.sum(1)), 0.0], rtol=1e-9)
    assert to_numpy(figures.turn).max() < 1e-7
    angle = rng.uniform(0.1, 0.7)
    plane = np.eye(5)
    plane[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turned = core.factor_figures(xp.asarray(factors), xp.asarray(bases @ plane))
    inside = (bases @ plane)[:2].transpose(0, 2, 1) @ factors[:2] @ (bases @ plane)[:2]
    off = inside - np.stack([np.diag(np.diag(own)) for own in inside])
    expected = np.linalg.norm(off, axis=(1, 2)) / np.linalg.norm(inside, axis=(1, 2))
    np.testing.assert_allclose(to_numpy(turned.turn), [*expected, 0.0], rtol=1e-6, atol=1e-9)


@pytest.mark.backends("torch")
def test_matrices_of_low_rank_on_which_a_library_fails_have_eigenvectors():
    """PyTorch's `eigh` gives up on this one in float32, for a quarter of the rows of an embedding."""
    import array_api_compat.torch as xp

    generator = np.random.default_rng(0)
    gradient = generator.normal(size=(1797, 8))
    gradient[generator.permutation(1797)[:1350]] = 0.0
    method = core.Method(settings(history_size=0))
    x = [xp.zeros((1797, 8), dtype=xp.float32)]
    update, state = method.step(method.init(x), x, [xp.asarray(gradient, dtype=xp.float32)])
    basis = to_numpy(state.preconditioner["left_basis"][0])[0]
    np.testing.assert_allclose(basis.T @ basis, np.eye(1797), atol=1e-4)
    moved, G = to_numpy(update[0]).astype(float), gradient
    u, _, v = np.linalg.svd(G, full_matrices=False)
    assert (moved * (u @ v)).sum() > 0.999 * np.linalg.norm(moved) * np.sqrt(8)
    assert not moved[~G.any(axis=1)].any()


@pytest.mark.parametrize("failure", [np.linalg.LinAlgError("no convergence"), None], ids=["error", "NaN"])
def test_a_run_goes_on_without_eigenvectors(xp, failure, monkeypatch):
    def eigh(x):
        if failure is not None:
            raise failure
        return x[..., 0] * xp.nan, x * xp.nan

    monkeypatch.setattr(xp.linalg, "eigh", eigh)
    rng = np.random.default_rng(0)
    start = rng.normal(size=DIM)
    x, state = run(settings(update_every=4), SHAPES, xp, noisy_quadratic(rng), 20, start=start)
    basis = to_numpy(state.preconditioner["left_basis"][0])[0]
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-12)
    assert np.isfinite(x).all()
