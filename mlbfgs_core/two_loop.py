"""The two-loop recursion in coefficient space: Gram matrix in, middle matrix out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Repeat", "repeat", "ring_order", "two_loop"]

Array = Any
Repeat = Callable[[int, Callable[[Any, Any], Any], Any], Any]


def ring_order(pairs: Array, m: int, xp: Any, device: Any = None) -> Array:
    """Slots of the ring from the newest pair to the oldest: a permutation that is its own inverse.

    Parameters
    ----------
    pairs : (B,) array of int
        Pairs stored so far.
    m : int
        Number of slots.

    Returns
    -------
    (B, m) array of the default integer dtype
    """
    slots = xp.arange(m, device=device)
    newest = xp.astype(pairs, slots.dtype) - 1
    return (newest[:, None] - slots[None, :]) % m


def repeat(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Repeat ``carry = body(i, carry)`` for each i below `count`."""
    for i in range(count):
        carry = body(i, carry)
    return carry


def two_loop(
    gram: Array, pairs: Array, xp: Any, device: Any = None, repeat: Repeat = repeat
) -> tuple[Array, Array]:
    """The inverse Hessian ``H = gamma I + B^T C B`` of each block from its Gram matrix.

    Parameters
    ----------
    gram : (B, 2m, 2m) array
        Inner products of the rows ``B = [s_1..s_m; y_1..y_m]`` as they lie in the ring; rows of
        empty slots are zero.
    pairs : (B,) array of int
        Pairs stored so far, which tells the newest slot.
    repeat : callable, optional
        ``(count, body, carry) -> carry``, a loop over ``carry = body(i, carry)``, such as
        ``jax.lax.fori_loop`` from 0; by default a Python loop.

    Returns
    -------
    middle_matrix : (B, 2m, 2m) array
        `C`, in the ring's order.
    gamma : (B,) array
        ``s.y / y.y`` of the newest pair; 1 where there is none. Pairs of zeros do not count.

    Notes
    -----
    Nocedal & Wright, Numerical Optimization, Algorithm 7.4 and eq. 7.20, run on the identity: a
    vector ``g + B^T A b`` (with ``b = B g``) is held as its matrix `A`, so that each inner product
    of the recursion is a row of the Gram matrix. Cost: ``O(m^3)`` per block, no access to
    parameter-sized arrays. Chen, Wang & Zhou (NIPS 2014) do the same for one vector at a time.

    Examples
    --------
    One pair with ``s = (1, 0)`` and ``y = (2, 0)`` on the identity: ``H`` maps `y` to `s`.

    >>> import numpy as np
    >>> rows = np.asarray([[1.0, 0.0], [2.0, 0.0]])
    >>> middle_matrix, gamma = two_loop((rows @ rows.T)[None], np.asarray([1]), np)
    >>> gamma[0] * np.eye(2) + rows.T @ middle_matrix[0] @ rows
    array([[0.5, 0. ],
           [0. , 0.5]])
    """
    m = gram.shape[-1] // 2
    order = ring_order(pairs, m, xp, device)
    ordered = _permute(gram, order, xp)
    sy, yy = ordered[:, :m, m:], ordered[:, m:, m:]
    curvature = xp.stack([sy[:, i, i] for i in range(m)], axis=1)
    rho = xp.where(curvature > 0, 1.0 / xp.where(curvature > 0, curvature, 1.0), 0.0)
    gamma = xp.ones_like(curvature[:, 0])
    for i in reversed(range(m)):
        there = curvature[:, i] > 0
        gamma = xp.where(there, curvature[:, i] / xp.where(there, yy[:, i, i], 1.0), gamma)

    # First loop, newest to oldest: alpha_i = rho_i s_i.q, q <- q - alpha_i y_i. Row i is s_i.q as a linear
    # function of the s_j.g, and from its turn on alpha_i.
    slots = xp.arange(m, device=device)

    def first(i: Any, alpha: Array) -> Array:
        row = rho[:, i, None] * alpha[:, i, :]
        left = alpha - sy[:, :, i, None] * row[:, None, :]
        own, older = (slots == i)[:, None], (slots > i)[:, None]
        return xp.where(own, row[:, None, :], xp.where(older, left, alpha))

    unit = xp.eye(m, dtype=gram.dtype, device=device)[None, :, :]
    alpha = repeat(m, first, xp.broadcast_to(unit, sy.shape))

    # Second loop, r = gamma q, oldest to newest: r <- r + (alpha_i - rho_i y_i.r) s_i. Its weights solve the
    # transpose of the first loop's triangular system, whose inverse is `alpha`. The small sums are written
    # out because a matrix product may run in reduced precision.
    gamma_alpha = gamma[:, None, None] * alpha
    inner = curvature[:, :, None] * alpha + xp.sum(yy[:, :, :, None] * gamma_alpha[:, None, :, :], axis=2)
    s_rows = xp.concat([_product(alpha, inner, xp), -_transposed(gamma_alpha, xp)], axis=2)
    y_rows = xp.concat([-gamma_alpha, xp.zeros_like(gamma_alpha)], axis=2)
    return _permute(xp.concat([s_rows, y_rows], axis=1), order, xp), gamma


def _product(a: Array, b: Array, xp: Any) -> Array:
    """``A^T B`` of each block."""
    return xp.sum(a[:, :, :, None] * b[:, :, None, :], axis=1)


def _transposed(matrix: Array, xp: Any) -> Array:
    return xp.permute_dims(matrix, (0, 2, 1))


def _permute(matrix: Array, order: Array, xp: Any) -> Array:
    """Rows and columns of each block's matrix, of `s` and of `y`, in this order."""
    order = xp.concat([order, order + order.shape[1]], axis=1)
    index = order[:, :, None] * matrix.shape[1] + order[:, None, :]
    flat = xp.take_along_axis(_flat(matrix, xp), _flat(index, xp), axis=1)
    return xp.reshape(flat, matrix.shape)


def _flat(matrix: Array, xp: Any) -> Array:
    return xp.reshape(matrix, (matrix.shape[0], -1))
