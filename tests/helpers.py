"""What several tests do with the core: convert, push pairs, apply the inverse Hessian, run a trajectory."""

from __future__ import annotations

import numpy as np
from array_api_compat import array_namespace
from array_api_extra.testing import lazy_xp_function

import mlbfgs_core as core
from mlbfgs_core.adapter import Upcoming, coefficients, leaf_arrays, with_leaf_arrays

for _name in ("direction", "observe", "project", "refresh", "step"):
    lazy_xp_function((core.Method, _name))
lazy_xp_function(core.spectrum)

PLAIN = {
    "adaptive": False,
    "noise_floor": 0.0,
    "min_cosine": 0.0,
    "step_length": "none",
    "preconditioner": "none",
}
"""No noise floor, no cosine floor, no length control, no preconditioner: the bare quasi-Newton method."""


def to_numpy(array):
    """As float64 NumPy (bfloat16 included)."""
    if hasattr(array, "detach"):
        array = array.detach().double()
    elif str(array.dtype) == "bfloat16":
        array = array.astype("float32")
    return np.asarray(array, dtype=np.float64)


def arrays_of(state):
    """All arrays of a state by their names: a tuple for each, with one array per leaf or a single one."""
    return {**leaf_arrays(state), **{name: (value,) for name, value in coefficients(state).items()}}


def mapped(state, function):
    """The state with each array replaced by a function of it."""
    leaves = {
        name: tuple(None if array is None else function(array) for array in arrays)
        for name, arrays in leaf_arrays(state).items()
    }
    numbers = {name: function(value) for name, value in coefficients(state).items()}
    return with_leaf_arrays(state, leaves)._replace(**numbers)


def spd(rng, dim, condition=100.0, largest=1.0):
    """A symmetric positive definite matrix with log-spaced eigenvalues."""
    basis, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    return basis * np.geomspace(largest / condition, largest, dim) @ basis.T


def curvature_pairs(rng, count, dim, condition=100.0):
    """Random `s` with ``y = A s``, which always have positive curvature."""
    matrix = spd(rng, dim, condition)
    s = rng.normal(size=(count, dim))
    return [(s[i], matrix @ s[i]) for i in range(count)]


def power_of(value):
    """The settings of a diagonal preconditioner with this power; of none for 0."""
    return (
        {"preconditioner": "diagonal", "preconditioner_power": value} if value else {"preconditioner": "none"}
    )


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
    return core.Method(config, blocks=blocks).refresh(state, True)


def _zeros(leaves):
    xp = array_namespace(*leaves)
    return tuple(xp.zeros_like(leaf) for leaf in leaves)


def state_after(config, pairs, xp, shapes=None, dtype="float64", blocks=None, start=None):
    """A state whose history was filled with pairs of flat vectors."""
    shapes = shapes or [pairs[0][0].shape]
    state = start or core.Method(config, blocks).init(split(pairs[0][0], shapes, xp, dtype), xp=xp)
    for s, y in pairs:
        state = push(config, state, split(s, shapes, xp, dtype), split(y, shapes, xp, dtype), blocks)
    return state


def apply(config, state, vector, xp, shapes=None, dtype="float64", blocks=None):
    """The direction for a flat gradient, as a flat NumPy vector."""
    update, _ = core.Method(config, blocks=blocks).direction(
        state, split(vector, shapes or [vector.shape], xp, dtype)
    )
    return join(update)


def operator_matrix(state, block=0, leaf=0):
    """The dense ``gamma I + B^T C B`` of a block of one leaf."""
    rows = to_numpy(state.history[leaf])
    rows = rows.reshape(2 * rows.shape[1], -1)
    inner = to_numpy(state.middle_matrix)[block]
    return to_numpy(state.gamma)[block] * np.eye(rows.shape[1]) + rows.T @ inner @ rows


def relative(actual, expected):
    """Largest deviation relative to the largest expected magnitude."""
    return np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), np.finfo(float).tiny)


def foreseen(method, state):
    """What a host tells the next `step`, as its keyword arguments."""
    asked = Upcoming(*map(bool, method.upcoming(state)))
    return {f"when_{name}": flag for name, flag in asked._asdict().items()}


def trajectory(
    config,
    xp,
    start,
    gradient,
    steps,
    rate=0.1,
    dtype="float64",
    shapes=None,
    blocks=None,
    kernels=None,
    **kw,
):
    """Follow ``x <- x - rate d`` and yield the flat update, parameters and the state of each step.

    ``gradient(t, x)`` maps a flat vector to a flat gradient.
    """
    shapes = shapes or [start.shape]
    x = start.copy()
    state = core.Method(config, blocks).init(split(x, shapes, xp, dtype), xp=xp)
    for t in range(steps):
        leaves = split(x, shapes, xp, dtype)
        grads = split(gradient(t, x), shapes, xp, dtype)
        update, state = core.Method(config, blocks, kernels).step(state, leaves, grads, **kw)
        update = join(update)
        yield update, x, state
        x = x - rate * update
