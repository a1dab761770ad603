"""The direction ``d = R^T (gamma z + B^T c)``, up to a factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .call import Call, stack
from .length import LENGTHS
from .observation import Observation
from .state import State, has_rows
from .window import mean_square_weight

__all__ = ["direction", "scaled"]

Array = Any


def scaled(
    call: Call, grads: Sequence[Array | None], update: Sequence[Array | None], factor: Array
) -> list[Array | None]:
    """The updates times the factor, in the gradients' dtypes; consumes them."""
    return [
        None if d is None or grad is None else call.kernels.scale(d, call.scalar(factor, d.dtype), grad.dtype)
        for d, grad in zip(update, grads, strict=True)
    ]


def direction(
    call: Call, state: State, seen: Observation, when_rows: bool | None = None
) -> tuple[list[Array | None], Array, State]:
    """The update up to a factor, the factor, and the state; `when_rows` is False if no stored pair is known
    to say anything."""
    config, xp, keep = call.config, call.xp, seen.finite
    b, square = seen.rows, seen.white_square
    gamma = _scale_of_start(call, state, seen)
    # All that follows is in units of the largest gamma, which may be too large for a square.
    top = xp.max(gamma)
    part = gamma / top
    # Small sums instead of matrix products, which may run in reduced precision.
    c = xp.sum(state.middle_matrix / top * b[:, None, :], axis=2)
    bc = xp.sum(b * c, axis=1)
    cgc = xp.sum(c * xp.sum(state.gram * c[:, None, :], axis=2), axis=1)
    along = part * square + bc
    norm_square = xp.maximum(part**2 * square + 2.0 * part * bc + cgc, xp.zeros_like(square))
    norm = xp.sqrt(xp.sum(norm_square))

    # The coefficients give the norm of the whole ``H' z``: is it also the norm of the update?
    whole = all(call.kernels.present(seen.grads))
    exact = whole and call.preconditioner.isometric
    # The update has unit length in these coordinates first, so that nothing overflows outside of them.
    unit = 1.0 / xp.where(norm > 0, norm, 1.0) if config.step_length != "none" else xp.ones_like(norm)
    update, squares = _combine(call, state, seen, (c * unit, part * unit), when_rows)
    moving = state.size
    if not exact:
        if whole or config.step_length != "rms":
            sums = call.reduce(call.block_sums(squares))
        else:
            sums, moving = _with_sizes(call, squares, seen.grads)
        norm_square = sums / unit**2
        norm = xp.sqrt(xp.sum(norm_square))
    # The direction is `top` times as long as this norm, since gamma is in units of `top`.
    factor, length = LENGTHS[config.step_length](call, state, seen, norm, top, moving)
    factor = xp.where(keep, factor / unit, 0.0)

    both = xp.sqrt(norm_square) * xp.sqrt(seen.grad_square)
    cosine = along / xp.where(both > 0, both, 1.0)
    size = xp.where(state.size > 0, state.size, 1.0)
    steps = xp.astype(xp.maximum(state.step, xp.ones_like(state.step)), call.dtype)
    weight = mean_square_weight(config, steps)
    mean_square = state.mean_square + weight * (seen.grad_square / size - state.mean_square)
    state = state._replace(
        cosine=xp.where(keep, cosine, state.cosine),
        mean_square=xp.where(keep, mean_square, state.mean_square),
        length=xp.where(keep, length, state.length),
    )
    return update, factor, state


def _combine(
    call: Call, state: State, seen: Observation, weights: tuple[Array, Array], when_rows: bool | None
) -> tuple[list[Array | None], list[Array | None]]:
    """The updates, and their sums of squares."""
    keep, grads = call.kernels.to_leaf(seen.finite), seen.grads
    update: list[Array | None] = [None] * len(grads)
    squares: list[Array | None] = [None] * len(grads)
    for number, block in enumerate(call.blocks):
        for index in block:
            grad, dtype = grads[index], seen.dtypes[index]
            if grad is None:
                continue
            leaf = call.leaf(state, index, dtype, seen.roots[index], when_rows=when_rows)
            own = call.scalar(weights[0][number, :], dtype), call.scalar(weights[1][number], dtype)
            update[index], squares[index] = call.kernels.direct(leaf, grad, own, keep)
    return update, squares


def _with_sizes(
    call: Call, squares: Sequence[Array | None], grads: Sequence[Array | None]
) -> tuple[Array, Array]:
    """Each block's sum of squares, and its number of values that have a gradient, in one reduction."""
    parts: list[Array | None] = []
    for leaf, (square, grad) in enumerate(zip(squares, grads, strict=True)):
        if grad is None:
            parts.append(None)
            continue
        square = call.kernels.to_coefficients(square, call.dtype)
        moving = call.kernels.moving(leaf, grad)
        parts.append(stack([square, call.xp.full_like(square, moving)], call.xp))
    sums = call.reduce(call.block_sums(parts))
    return sums[:, 0], sums[:, 1]


def _scale_of_start(call: Call, state: State, seen: Observation) -> Array:
    """`gamma` of each block; for a block without a pair that says something the mean of the others', or if
    no block has one the paper's ``d = g``. With a pair at every step that direction is at most 1 long, and
    exactly 1 long if gradients are out of the ordinary.

    Nocedal & Wright, section 6.1, on the scale of the first step.
    """
    xp, has = call.xp, has_rows(state, call.xp)
    count = xp.sum(xp.astype(has, call.dtype))
    known = xp.sum(xp.where(has, state.gamma, 0.0)) / xp.where(count > 0, count, 1.0)
    first = 1.0 / seen.scale
    if call.config.caps_first_step:
        norm = xp.sqrt(xp.sum(seen.white_square))
        least = xp.where(seen.scale == 1.0, 1.0, xp.where(norm > 0, norm, 1.0))
        first = 1.0 / xp.maximum(norm, least)
    return xp.where(has, state.gamma, xp.where(count > 0, known, first))
