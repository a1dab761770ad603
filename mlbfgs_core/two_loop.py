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
        ``s.y / y.y`` of the newest pair; 1 where there is none.

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
    order = xp.concat([order, order + m], axis=1)
    ordered = _permute(gram, order, xp)
    sy, yy = ordered[:, :m, m:], ordered[:, m:, m:]
    curvature = xp.stack([sy[:, i, i] for i in range(m)], axis=1)
    rho = xp.where(curvature > 0, 1.0 / xp.where(curvature > 0, curvature, 1.0), 0.0)
    newest = curvature[:, 0] > 0
    gamma = xp.where(newest, curvature[:, 0] / xp.where(newest, yy[:, 0, 0], 1.0), 1.0)

    # First loop, newest to oldest: alpha_i = rho_i s_i.q, q <- q - alpha_i y_i. Row i of `left`
    # becomes s_i.q as a linear function of b.
    unit = xp.eye(2 * m, dtype=gram.dtype, device=device)[None, :, :]
    own = unit[0, :m, :m] > 0
    left = xp.broadcast_to(unit[:, :m, :], (gram.shape[0], m, 2 * m))

    def first(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left, alpha = carry
        row = rho[:, i, None] * left[:, i, :]
        return left - sy[:, :, i, None] * row[:, None, :], xp.where(own[i, :, None], row[:, None, :], alpha)

    _, alpha = repeat(m, first, (left, xp.zeros_like(left)))

    # r = gamma q; row i of `right` is y_i.r. The small sums are written out because a matrix
    # product may run in reduced precision.
    right = unit[:, m:, :] - xp.sum(yy[:, :, :, None] * alpha[:, None, :, :], axis=2)
    right = gamma[:, None, None] * right

    # Second loop, oldest to newest: r <- r + (alpha_i - rho_i y_i.r) s_i.
    def second(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        right, weight = carry
        i = m - 1 - i
        row = alpha[:, i, :] - rho[:, i, None] * right[:, i, :]
        return right + sy[:, i, :, None] * row[:, None, :], xp.where(own[i, :, None], row[:, None, :], weight)

    _, weight = repeat(m, second, (right, xp.zeros_like(right)))
    operator = xp.concat([weight, -gamma[:, None, None] * alpha], axis=1)
    return _permute(operator, order, xp), gamma


def _permute(matrix: Array, order: Array, xp: Any) -> Array:
    rows = xp.broadcast_to(order[:, :, None], matrix.shape)
    matrix = xp.take_along_axis(matrix, rows, axis=1)
    return xp.take_along_axis(matrix, xp.broadcast_to(order[:, None, :], matrix.shape), axis=2)
