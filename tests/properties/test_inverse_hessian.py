"""The operator ``H = gamma I + B^T C B`` is the BFGS inverse Hessian of the stored pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import LbfgsInvHessProduct

import mlbfgs_core as core
from mlbfgs_core.reference import bfgs_inverse_hessian
from tests.helpers import (
    PLAIN,
    apply,
    curvature_pairs,
    operator_matrix,
    relative,
    spd,
    split,
    state_after,
    to_numpy,
)
from tests.strategies import generators, magnitudes

lazy_xp_modules = [core]

M, DIM = 4, 9
CONFIG = core.Config(history_size=M, **PLAIN)
EPS = np.finfo(np.float64).eps
TOLERANCE = 1e4 * EPS  # the recursion's rounding grows with the pairs' condition, up to 100 here


def dense(pairs, count=M):
    s, y = pairs[-1]
    return bfgs_inverse_hessian(pairs[-count:], s @ y / (y @ y), len(s))


@given(rng=generators)
def test_matches_dense_bfgs_at_every_ring_offset(xp, rng):
    pairs = curvature_pairs(rng, 2 * M + 1, DIM)
    gradient = rng.normal(size=DIM)
    for count in range(1, len(pairs) + 1):  # before the memory is full, at, and all offsets after
        state = state_after(CONFIG, pairs[:count], xp)
        expected = dense(pairs[:count])
        assert relative(operator_matrix(state), expected) < TOLERANCE
        assert relative(apply(CONFIG, state, gradient, xp), expected @ gradient) < TOLERANCE


@given(rng=generators)
def test_without_pairs_the_direction_is_the_gradient(xp, rng):
    gradient = rng.normal(size=DIM)
    state = core.init(CONFIG, split(gradient, [(DIM,)], xp), xp=xp)
    np.testing.assert_array_equal(apply(CONFIG, state, gradient, xp), gradient)


@given(rng=generators)
def test_matches_scipys_inverse_hessian_product_on_the_same_pairs(xp, rng):
    pairs = curvature_pairs(rng, M, DIM)
    s, y = (np.stack(column) for column in zip(*pairs, strict=True))
    gamma = s[-1] @ y[-1] / (y[-1] @ y[-1])
    # SciPy starts from the identity: in coordinates where y is scaled by gamma that is gamma I.
    expected = gamma * LbfgsInvHessProduct(s, gamma * y).todense()
    assert relative(operator_matrix(state_after(CONFIG, pairs, xp)), expected) < TOLERANCE


@pytest.mark.backends("jax")
@given(rng=generators)
def test_every_step_matches_optax_scale_by_lbfgs(xp, rng):
    import jax
    import jax.numpy as jnp
    import optax

    config = core.Config(preset="lbfgs", history_size=M)
    matrix, x = spd(rng, DIM), rng.normal(size=DIM)
    peer = optax.scale_by_lbfgs(memory_size=M)
    peer_update, memory = jax.jit(peer.update), peer.init(jnp.asarray(x))
    state = core.init(config, split(x, [(DIM,)], xp), xp=xp)
    for _ in range(2 * M + 2):
        gradient = matrix @ x
        expected, memory = peer_update(jnp.asarray(gradient), memory, jnp.asarray(x))
        update, state = core.step(config, state, split(x, [(DIM,)], xp), split(gradient, [(DIM,)], xp))
        assert relative(to_numpy(update[0]), np.asarray(expected)) < 1e3 * TOLERANCE
        x = x - 0.5 * np.asarray(expected)


@given(rng=generators)
def test_inverse_hessian_maps_newest_y_to_s(xp, rng):
    pairs = curvature_pairs(rng, M + 2, DIM)
    s, y = pairs[-1]
    assert relative(apply(CONFIG, state_after(CONFIG, pairs, xp), y, xp), s) < TOLERANCE


@given(rng=generators)
def test_inverse_hessian_is_symmetric_positive_definite_and_descends(xp, rng):
    state = state_after(
        core.Config(history_size=M, **{**PLAIN, "min_cosine": 0.4}),
        [(rng.normal(size=DIM), rng.normal(size=DIM)) for _ in range(M + 2)],
        xp,
    )  # pairs of any curvature, negative included
    matrix = operator_matrix(state)
    assert relative(matrix, matrix.T) < TOLERANCE
    assert np.linalg.eigvalsh((matrix + matrix.T) / 2)[0] > 0
    gradient = rng.normal(size=DIM)
    assert apply(CONFIG, state, gradient, xp) @ gradient > 0


@given(rng=generators)
def test_conjugate_pairs_of_full_number_give_the_exact_inverse(xp, rng):
    matrix = spd(rng, DIM)
    conjugate = np.linalg.inv(np.linalg.cholesky(matrix)).T  # columns s_i with s_i.A s_j = 0
    pairs = [(conjugate[:, i], matrix @ conjugate[:, i]) for i in range(DIM)]
    config = core.Config(history_size=DIM, **PLAIN)
    assert relative(operator_matrix(state_after(config, pairs, xp)), np.linalg.inv(matrix)) < TOLERANCE


@given(rng=generators)
def test_float32_matches_dense_float64_bfgs_at_every_ring_offset(xp, rng):
    config = core.Config(history_size=M, **{**PLAIN, "min_cosine": 0.1})
    pairs, gradient = curvature_pairs(rng, 2 * M, 50, condition=10.0), rng.normal(size=50)
    for count in range(1, len(pairs) + 1):
        state = state_after(config, pairs[:count], xp, dtype="float32")
        expected = dense(pairs[:count]) @ gradient
        assert relative(apply(config, state, gradient, xp, dtype="float32"), expected) < 1e-5


@pytest.mark.parametrize("xp", ["torch", "jax"], indirect=True)  # the two that have bfloat16
@given(rng=generators)
def test_bfloat16_history_matches_dense_bfgs_to_its_rounding(xp, rng):
    config = core.Config(history_size=M, history_dtype="bfloat16", **{**PLAIN, "min_cosine": 0.1})
    pairs, gradient = curvature_pairs(rng, 2 * M, 50, condition=10.0), rng.normal(size=50)
    for count in range(1, len(pairs) + 1):
        state = state_after(config, pairs[:count], xp, dtype="float32")
        expected = dense(pairs[:count]) @ gradient
        assert str(state.history[0].dtype).endswith("bfloat16")
        assert relative(apply(config, state, gradient, xp, dtype="float32"), expected) < 2e-2


@given(rng=generators, s_scale=magnitudes, y_scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_pair_scales_from_1e_minus_25_to_1e20_do_not_matter_in_float32(xp, rng, s_scale, y_scale):
    config = core.Config(history_size=M, **PLAIN)
    pairs, gradient = curvature_pairs(rng, M + 1, 20, condition=10.0), rng.normal(size=20)
    scaled = [(s_scale * s, s_scale * y_scale * y) for s, y in pairs]
    state = state_after(config, scaled, xp, dtype="float32")
    expected = dense(pairs) @ gradient / y_scale
    assert relative(apply(config, state, gradient, xp, dtype="float32"), expected) < 1e-5


@given(rng=generators)
def test_norms_and_angles_from_coefficients_are_those_of_the_direction(xp, rng):
    pairs, gradient = curvature_pairs(rng, M + 2, DIM), rng.normal(size=DIM)
    for power in (0.0, 0.5):
        config = core.Config(history_size=M, **{**PLAIN, "step_length": "unit", "metric_power": power})
        start = core.init(config, split(gradient, [(DIM,)], xp), xp=xp)
        if power:  # a preconditioner that is not the identity
            start = start._replace(moment=tuple(split(rng.uniform(0.1, 10, DIM), [(DIM,)], xp)))
        state = state_after(config, pairs, xp, start=start)
        update, state = core.direction(config, state, split(gradient, [(DIM,)], xp))
        d = to_numpy(update[0])
        assert abs(np.linalg.norm(d) - 1) < TOLERANCE
        cosine = d @ gradient / np.linalg.norm(gradient)
        assert abs(to_numpy(state.cosine)[0] - cosine) < TOLERANCE


@pytest.mark.parametrize("dim", [1, 3, 2 * M, 30])
@given(rng=generators)
def test_spectrum_has_the_extreme_eigenvalues_of_the_dense_matrix(xp, dim, rng):
    for count in (0, 1, M + 2):
        pairs = curvature_pairs(rng, count, dim) or [(np.zeros(dim), np.zeros(dim))]
        state = state_after(CONFIG, pairs, xp)
        eigenvalues = np.linalg.eigvalsh(operator_matrix(state))
        spectrum = [to_numpy(end)[0] for end in core.spectrum(state)]
        expected = [eigenvalues[0], eigenvalues[-1], 1 / eigenvalues[-1], 1 / eigenvalues[0]]
        np.testing.assert_allclose(spectrum, expected, rtol=1e6 * EPS)


@given(rng=generators)
def test_a_block_of_many_leaves_equals_its_flattened_self(xp, rng):
    pairs, gradient = curvature_pairs(rng, M + 1, 12), rng.normal(size=12)
    shapes = [(2, 3), (), (5,)]
    flat = apply(CONFIG, state_after(CONFIG, pairs, xp), gradient, xp)
    cut = apply(CONFIG, state_after(CONFIG, pairs, xp, shapes), gradient, xp, shapes)
    assert relative(cut, flat) < TOLERANCE


@given(rng=generators)
def test_the_order_of_leaves_and_of_blocks_does_not_matter(xp, rng):
    pairs, gradient = curvature_pairs(rng, M + 1, 12), rng.normal(size=12)
    shapes, order = [(4,), (3,), (5,)], [2, 0, 1]
    blocks, turned = ((0, 2), (1,)), ((2,), (0, 1))  # the same leaves together, elsewhere

    def permute(vector):
        parts = np.split(vector, [4, 7])
        return np.concatenate([parts[i] for i in order])

    straight = apply(
        CONFIG, state_after(CONFIG, pairs, xp, shapes, blocks=blocks), gradient, xp, shapes, blocks=blocks
    )
    shapes_turned = [shapes[i] for i in order]
    pairs_turned = [(permute(s), permute(y)) for s, y in pairs]
    state = state_after(CONFIG, pairs_turned, xp, shapes_turned, blocks=turned)
    other = apply(CONFIG, state, permute(gradient), xp, shapes_turned, blocks=turned)
    assert relative(other, permute(straight)) < TOLERANCE


@given(rng=generators)
def test_blocks_without_length_control_are_separate_optimizers(xp, rng):
    pairs, gradient = curvature_pairs(rng, M + 1, 12), rng.normal(size=12)
    shapes, blocks = [(5,), (7,)], ((0,), (1,))
    # Curvature within each block, so that every block stores every pair.
    pairs = [
        (s, np.concatenate([spd5 @ s[:5], spd7 @ s[5:]]))
        for (s, _), spd5, spd7 in (
            (pair, spd(np.random.default_rng(1), 5), spd(np.random.default_rng(2), 7)) for pair in pairs
        )
    ]
    together = apply(
        CONFIG, state_after(CONFIG, pairs, xp, shapes, blocks=blocks), gradient, xp, shapes, blocks=blocks
    )
    apart = [
        apply(CONFIG, state_after(CONFIG, [(s[part], y[part]) for s, y in pairs], xp), gradient[part], xp)
        for part in (slice(0, 5), slice(5, 12))
    ]
    assert relative(together, np.concatenate(apart)) < TOLERANCE
