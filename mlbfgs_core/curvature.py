"""The inverse Hessian times a vector; and eigenvalues of it and of the Hessian, from coefficients alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from array_api_compat import array_namespace
from array_api_compat import device as array_device

from .blocks import Blocks, one_block
from .call import Call, identity
from .config import Config
from .diagnostics import Diagnostics
from .kernels import Kernels
from .state import State
from .two_loop import ring_order

__all__ = ["Spectrum", "curvatures", "inverse_hessian", "spectrum"]

Array = Any


class Spectrum(NamedTuple):
    """Extreme eigenvalues, (B,) each, of the inverse Hessian `H` and of its inverse, in the coordinates of
    the preconditioner."""

    smallest: Array
    largest: Array
    inverse_smallest: Array
    inverse_largest: Array


def inverse_hessian(
    config: Config, state: State, vectors: Sequence[Array], *, blocks: Blocks | None = None
) -> list[Array]:
    """The inverse Hessian times a vector: ``R^T (gamma I + B^T C B) R v``, with no control of its length.

    Parameters
    ----------
    config : Config
    state : State
        Not consumed.
    vectors : sequence of arrays
        The parts of the vector: one for each leaf, of its shape and of its averages' dtype.
    blocks : tuple of tuples of int, optional
        The state's blocks; by default one block of all leaves.

    Returns
    -------
    list of arrays
        The parts of the product. A block without a pair has `gamma` 1.

    Notes
    -----
    Symmetric and positive definite. Reads the history twice: ``4 m`` values per parameter.

    Examples
    --------
    >>> import numpy as np
    >>> from mlbfgs_core import Config, Method
    >>> method, x = Method(Config(preset="lbfgs", history_size=1)), np.asarray([1.0, 1.0])
    >>> state = method.init([x])
    >>> for point in (x, x + [1.0, 0.0]):
    ...     state = method.observe(state, [point], [np.asarray([4.0, 1.0]) * point])
    ...     state = method.refresh(state, state.due)
    >>> inverse_hessian(method.config, state, [np.asarray([4.0, 0.0])])
    [array([1., 0.])]
    """
    xp = array_namespace(state.gamma)
    blocks = blocks or one_block(len(vectors))
    call = Call(config, blocks, Kernels(xp), identity, None, xp, state.gamma.dtype)
    dtypes = [vector.dtype for vector in vectors]
    leaves = [
        call.leaf(state, i, dtype, root)
        for i, (dtype, root) in enumerate(zip(dtypes, call.roots(state, dtypes), strict=True))
    ]
    always, one = xp.ones_like(state.accepted), xp.ones_like(state.grad_scale)
    roots, sums = zip(
        *(call.kernels.whiten(leaf, v, None, one) for leaf, v in zip(leaves, vectors, strict=True)),
        strict=True,
    )
    gamma = state.gamma * state.grad_scale
    if config.takes_pairs:
        rows = call.block_sums([own[0] for own in sums])
        c = state.grad_scale * xp.sum(state.middle_matrix * rows[:, None, :], axis=2)
    else:
        c = xp.zeros_like(gamma)[:, None]
    block_of = {i: number for number, block in enumerate(call.blocks) for i in block}
    products = []
    for i, (leaf, v, root) in enumerate(zip(leaves, vectors, roots, strict=True)):
        own = block_of[i]
        weights = call.scalar(c[own, :], leaf.dtype), call.scalar(gamma[own], leaf.dtype)
        products.append(call.kernels.direct(leaf._replace(root=root), v, weights, always)[0])
    return products


def spectrum(state: State) -> Spectrum:
    """Extreme eigenvalues of each block's inverse Hessian and of its inverse.

    Parameters
    ----------
    state : State
        Not consumed.

    Returns
    -------
    Spectrum
        Each end is computed where it is large, so that both keep their relative accuracy: the
        largest of `H` from `H`, its smallest as the reciprocal of the largest of the inverse.

    Notes
    -----
    From coefficients alone: on the span of the rows `B`, ``gamma I + B^T C B`` has the eigenvalues of
    ``gamma I + S C S`` with `S` the symmetric root of the Gram matrix ``B B^T``; outside it they are
    `gamma`. The inverse is the BFGS Hessian, built by the rank-two updates of Nocedal & Wright
    eq. 6.19 in coefficient space. Cost: ``O(m^3)`` per block.

    Examples
    --------
    >>> import numpy as np
    >>> from mlbfgs_core import Config, Method
    >>> float(spectrum(Method(Config()).init([np.zeros(3)])).largest[0])
    1.0
    """
    xp, unit = array_namespace(state.gamma), state.grad_scale
    hessian, scale = _hessian(state.gram, state.pairs, state.gamma, xp)
    largest = _largest(state.gram, state.middle_matrix, state.gamma, state.size, xp)
    inverse_largest = _largest(state.gram, hessian, scale, state.size, xp)
    return Spectrum(unit / inverse_largest, largest * unit, 1.0 / largest / unit, inverse_largest / unit)


def curvatures(state: State | Diagnostics) -> Array:
    """All eigenvalues of each block's Hessian approximation on the span of its pairs.

    Parameters
    ----------
    state : State or Diagnostics
        Only `gram`, `middle_matrix`, `gamma`, `pairs` and `grad_scale` are read. Not consumed.

    Returns
    -------
    (B, 2m) array
        Eigenvalues of the inverse of `H`, in ascending order, in the coordinates of the preconditioner,
        followed by NaN: a block with `k` pairs has `2 k` of them, or fewer if the pairs depend on one
        another or the block is small, and none before its first pair. In every direction outside the span
        the curvature is ``1 / gamma``.

    Notes
    -----
    From coefficients alone, as in `spectrum`, and each from the side on which it keeps more digits: the large
    ones from the Hessian, the small ones as reciprocals from `H`, divided at the geometric mean of the
    extremes. The relative error is then about ``eps * sqrt(condition)``. Cost: ``O(m^3)`` per block. On a GPU
    PyTorch's eigenvalue routines wait for the device (see `torch.linalg.eigh`); where that must not happen,
    pass a copy of the record on the host.

    References
    ----------
    Nocedal & Wright, Numerical Optimization, 2nd ed., eq. 6.17 (`H`) and 6.19 (its inverse).

    Examples
    --------
    One pair of a function with curvatures 4 and 1, along the first axis:

    >>> import numpy as np
    >>> from mlbfgs_core import Config, Method
    >>> method, x = Method(Config(preset="lbfgs", history_size=1)), np.asarray([1.0, 1.0])
    >>> state = method.init([x])
    >>> for point in (x, x + [1.0, 0.0]):
    ...     state = method.observe(state, [point], [np.asarray([4.0, 1.0]) * point])
    ...     state = method.refresh(state, state.due)
    >>> curvatures(state)
    array([[ 4., nan]])
    """
    xp = array_namespace(state.gamma)
    # A record holds gamma in the user's units, the state in the units of its gradients.
    gamma = state.gamma if isinstance(state, State) else state.gamma / state.grad_scale
    if state.gram.shape[-1] == 0:
        return xp.sum(state.gram, axis=2)  # (B, 0)
    hessian, scale = _hessian(state.gram, state.pairs, gamma, xp)
    large, spanned = _on_span(state.gram, hessian, scale, xp)
    small, _ = _on_span(state.gram, state.middle_matrix, gamma, xp)
    above = _eigenvalues_first(large, spanned, xp, descending=False)
    below = 1.0 / _eigenvalues_first(small, spanned, xp, descending=True)
    count = xp.sum(xp.astype(spanned, xp.int32), axis=1)
    places = xp.arange(above.shape[1], dtype=count.dtype, device=array_device(count))[None, :]
    inside = places < count[:, None]
    last = places == count[:, None] - 1
    top = xp.sum(xp.where(last, above, 0.0), axis=1)
    middle = xp.sqrt(xp.maximum(top * below[:, 0], xp.zeros_like(top)))
    values = xp.where(below > middle[:, None], above, below)
    # Where the two sides meet, they differ by rounding and could be out of order.
    values = xp.sort(xp.where(inside, values, xp.inf), axis=1)
    values = values / state.grad_scale
    return xp.where(inside, values, xp.nan)


def _largest(gram: Array, inner: Array, scale: Array, size: Array, xp: Any) -> Array:
    """Largest eigenvalue of ``scale I + B^T inner B``, from the Gram matrix of the rows."""
    if gram.shape[-1] == 0:
        return scale
    inner, spanned = _on_span(gram, inner, scale, xp)
    # A direction outside the span keeps `scale`, which counts only if the block has such a direction;
    # else it is given the value of a spanned direction, which lies between the extremes.
    full = xp.sum(xp.astype(spanned, gram.dtype), axis=1) >= size
    filler = xp.where(full, inner[:, -1, -1], scale)
    return xp.linalg.eigvalsh(_filled(inner, spanned, filler, xp))[:, -1]


def _eigenvalues_first(inner: Array, spanned: Array, xp: Any, *, descending: bool) -> Array:
    """Eigenvalues on the span, in order, followed by numbers without a meaning."""
    beyond = 2.0 * inner.shape[-1] * xp.max(xp.abs(inner), axis=(1, 2))
    beyond = xp.where(beyond > 0, beyond, 1.0)
    if descending:
        return xp.flip(xp.linalg.eigvalsh(_filled(inner, spanned, -beyond, xp)), axis=1)
    return xp.linalg.eigvalsh(_filled(inner, spanned, beyond, xp))


def _on_span(gram: Array, inner: Array, scale: Array, xp: Any) -> tuple[Array, Array]:
    """``scale I + B^T inner B`` in an orthonormal basis of the span of the rows: (B, 2m, 2m), and which of
    its rows and columns (B, 2m) belong to the span; the others are zero except for `scale`."""
    unit = xp.eye(gram.shape[-1], dtype=gram.dtype, device=array_device(gram))
    # Rows are brought to unit length, since `y` is as long as the curvature is large: any length must do.
    norms = xp.sqrt(xp.sum(gram * unit, axis=2))
    norms = xp.where(norms > 0, norms, 1.0)
    inner = inner * norms[:, :, None] * norms[:, None, :]
    values, vectors = xp.linalg.eigh(gram / norms[:, :, None] / norms[:, None, :])
    spanned = values > 10 * gram.shape[-1] * xp.finfo(gram.dtype).eps * values[:, -1:]
    root = xp.sqrt(xp.where(spanned, values, 0.0))
    inner = xp.matmul(xp.matrix_transpose(vectors), xp.matmul(inner, vectors))
    inner = inner * root[:, :, None] * root[:, None, :]
    return (inner + xp.matrix_transpose(inner)) / 2 + scale[:, None, None] * unit, spanned


def _filled(inner: Array, spanned: Array, filler: Array, xp: Any) -> Array:
    """The matrix with `filler` (B,) on the diagonal outside the span."""
    unit = xp.eye(inner.shape[-1], dtype=inner.dtype, device=array_device(inner))
    diagonal = xp.where(spanned, xp.sum(inner * unit, axis=1), filler[:, None])
    return xp.where(unit > 0, diagonal[:, None, :], inner)


def _hessian(gram: Array, pairs: Array, gamma: Array, xp: Any) -> tuple[Array, Array]:
    """The BFGS Hessian ``scale I + B^T D B``, the inverse of `H`: `D` (B, 2m, 2m) and scale (B,)."""
    m, device = gram.shape[-1] // 2, array_device(gram)
    order = ring_order(pairs, m, xp, device)
    scale = 1.0 / gamma
    columns = xp.arange(2 * m, device=device)
    inner = xp.zeros_like(gram)
    for i in reversed(range(m)):
        s = xp.astype(columns[None, :] == order[:, i, None], gram.dtype)
        y = xp.astype(columns[None, :] == order[:, i, None] + m, gram.dtype)
        gram_s = xp.sum(gram * s[:, None, :], axis=2)
        image = scale[:, None] * s + xp.sum(inner * gram_s[:, None, :], axis=2)
        before = xp.sum(image * gram_s, axis=1)
        curvature = xp.sum(y * gram_s, axis=1)
        there = curvature > 0
        change = y[:, :, None] * y[:, None, :] / xp.where(there, curvature, 1.0)[:, None, None]
        change = change - image[:, :, None] * image[:, None, :] / xp.where(there, before, 1.0)[:, None, None]
        inner = inner + xp.where(there[:, None, None], change, 0.0)
    return inner, scale
