"""What several tests do with the core: convert, push pairs, apply the inverse Hessian, run a trajectory."""

from __future__ import annotations

import numpy as np
from array_api_compat import array_namespace
from array_api_extra.testing import lazy_xp_function

import mlbfgs_core as core

for _name in ("direction", "observe", "project", "refresh", "spectrum", "step"):
    lazy_xp_function(getattr(core, _name))

PLAIN = {"adaptive": False, "noise_floor": 0.0, "min_cosine": 0.0, "step_length": "none", "metric_power": 0.0}
"""No noise floor, no cosine floor, no length control, no preconditioner: the bare quasi-Newton method."""


def to_numpy(array):
    """As float64 NumPy (bfloat16 included)."""
    if hasattr(array, "detach"):
        array = array.detach().double()
    elif str(array.dtype) == "bfloat16":
        array = array.astype("float32")
    return np.asarray(array, dtype=np.float64)


def spd(rng, dim, condition=100.0, largest=1.0):
    """A symmetric positive definite matrix with log-spaced eigenvalues."""
    basis, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    return basis * np.geomspace(largest / condition, largest, dim) @ basis.T


def curvature_pairs(rng, count, dim, condition=100.0):
    """Random `s` with ``y = A s``, which always have positive curvature."""
    matrix = spd(rng, dim, condition)
    s = rng.normal(size=(count, dim))
    return [(s[i], matrix @ s[i]) for i in range(count)]


def split(vector, shapes, xp, dtype="float64"):
    """Cut a flat vector into leaves of a namespace."""
    edges = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
    leaves = [vector[a:b].reshape(shape) for a, b, shape in zip(edges, edges[1:], shapes, strict=False)]
    return [xp.asarray(leaf.copy(), dtype=getattr(xp, dtype)) for leaf in leaves]


def join(leaves):
    """The leaves as one flat NumPy vector."""
    return np.concatenate([to_numpy(leaf).ravel() for leaf in leaves])


def push(config, state, s, y, blocks=None):
    """Make ``(s, y)`` (lists of leaves) the differences of two windows of one step, and refresh."""
    ones, one = state.leaf_window * 0 + 1, state.window * 0 + 1
    state = state._replace(
        mean_params=tuple(s),
        mean_grads=tuple(y),
        prev_params=_zeros(s),
        prev_grads=_zeros(y),
        leaf_window=ones,
        leaf_prev_window=ones,
        window=one,
        prev_window=one,
    )
    return core.refresh(config, state, True, blocks=blocks)


def _zeros(leaves):
    xp = array_namespace(*leaves)
    return tuple(xp.zeros_like(leaf) for leaf in leaves)


def state_after(config, pairs, xp, shapes=None, dtype="float64", blocks=None, start=None):
    """A state whose history was filled with pairs of flat vectors."""
    shapes = shapes or [pairs[0][0].shape]
    state = start or core.init(config, split(pairs[0][0], shapes, xp, dtype), blocks, xp)
    for s, y in pairs:
        state = push(config, state, split(s, shapes, xp, dtype), split(y, shapes, xp, dtype), blocks)
    return state


def apply(config, state, vector, xp, shapes=None, dtype="float64", blocks=None):
    """The direction for a flat gradient, as a flat NumPy vector."""
    update, _ = core.direction(
        config, state, split(vector, shapes or [vector.shape], xp, dtype), blocks=blocks
    )
    return join(update)


def operator_matrix(state, block=0, leaf=0):
    """The dense ``gamma I + B^T C B`` of a block of one leaf."""
    rows = to_numpy(state.history[leaf])
    rows = rows.reshape(2 * rows.shape[1], -1)
    inner = to_numpy(state.operator)[block]
    return to_numpy(state.gamma)[block] * np.eye(rows.shape[1]) + rows.T @ inner @ rows


def relative(actual, expected):
    """Largest deviation relative to the largest expected magnitude."""
    return np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), np.finfo(float).tiny)


def trajectory(config, xp, start, gradient, steps, rate=0.1, dtype="float64", shapes=None, blocks=None, **kw):
    """Follow ``x <- x - rate d`` and yield the flat update, parameters and the state of each step.

    ``gradient(t, x)`` maps a flat vector to a flat gradient.
    """
    shapes = shapes or [start.shape]
    x = start.copy()
    state = core.init(config, split(x, shapes, xp, dtype), blocks, xp)
    for t in range(steps):
        leaves = split(x, shapes, xp, dtype)
        grads = split(gradient(t, x), shapes, xp, dtype)
        update, state = core.step(config, state, leaves, grads, blocks=blocks, **kw)
        update = join(update)
        yield update, x, state
        x = x - rate * update
