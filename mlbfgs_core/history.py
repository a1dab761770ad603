"""The ring of pairs and its Gram matrix: a new pair in, a new middle matrix out."""

from __future__ import annotations

from typing import Any

from .call import Call
from .observation import Observation, rescaled
from .pairs import PairProducts, damp, products, scatter, valid
from .state import State
from .two_loop import two_loop
from .window import turn_averages

__all__ = ["refresh"]

Array = Any


def refresh(
    call: Call, state: State, seen: Observation | None, pair: PairProducts | None, due: Array
) -> tuple[State, Array | None]:
    """Take the pair of this window and the previous one where due, and form the new inverse Hessian; counts
    are left to `turn_window`. With an observation also return its `rows`, with the gradient projected on the
    new pair, too. `pair` are the pair's `products` if they are known."""
    xp, kernels, m = call.xp, call.kernels, call.config.history_size
    if seen is None:
        roots = call.roots(state, [mean.dtype for mean in state.mean_params])
    else:
        roots = list(seen.roots)
    pair = products(call, state, roots) if pair is None else pair
    state = state._replace(scatter=xp.where(due, scatter(call, state, pair), state.scatter))
    damping = damp(call, state, pair)
    complete = due & (state.prev_window > 0)
    keep = complete & damping.usable
    index = xp.arange(m, device=call.device(state))
    slots = xp.astype(state.pairs, index.dtype) % m

    history = list(state.history)
    grams: list[Array] = [None] * len(history)
    for number, block in enumerate(call.blocks):
        slot = kernels.to_leaf(slots[number : number + 1])
        kept = kernels.to_leaf(keep[number])
        factors = (damping.weight[number], damping.along[number], damping.inverse_norm[number])
        for leaf in block:
            dtype = state.mean_params[leaf].dtype
            history[leaf], grams[leaf] = kernels.push_next(
                call.leaf(state, leaf, dtype, roots[leaf]),
                slot,
                tuple(call.scalar(factor, dtype) for factor in factors),
                (valid(call, state, leaf), kept),
                None if seen is None else _gradient(call, seen, leaf),
            )
    sums = call.reduce(call.block_sums(grams))

    rows_of = xp.arange(2 * m, device=call.device(state))[None, :]
    is_s, is_y = rows_of == slots[:, None], rows_of == slots[:, None] + m
    gram = _replace_row(state.gram, sums[:, : 2 * m], is_s, xp)
    gram = _replace_row(gram, sums[:, 2 * m : 4 * m], is_y, xp)
    gram = xp.where(keep[:, None, None], gram, state.gram)
    pairs = state.pairs + xp.astype(keep, xp.int32)
    middle, gamma = two_loop(gram, pairs, xp, call.device(state), kernels.repeat)
    # Products that overflow nevertheless, as those of float16 rows may, must not stay: start without pairs.
    # The direction is in units of gamma.
    sane = xp.all(xp.isfinite(gram) & xp.isfinite(middle / gamma[:, None, None]), axis=(1, 2))
    lost = keep & ~(sane & xp.isfinite(gamma) & (gamma > 0))
    gram = xp.where(lost[:, None, None], 0.0, gram)
    middle = xp.where(lost[:, None, None], 0.0, middle)
    gamma = xp.where(lost, 1.0, gamma)
    pairs = xp.where(lost, 0, pairs)
    rows = None
    if seen is not None:
        along = xp.where(is_s, sums[:, 4 * m, None], xp.where(is_y, sums[:, 4 * m + 1, None], seen.rows))
        rows = xp.where(keep[:, None], along, seen.rows)

    fresh = keep[:, None] & (index[None, :] == slots[:, None])
    state = state._replace(
        history=tuple(history),
        gram=gram,
        middle_matrix=xp.where(keep[:, None, None], middle, state.middle_matrix),
        gamma=xp.where(keep, gamma, state.gamma),
        pairs=pairs,
        rejected=state.rejected + xp.astype((complete & ~damping.usable) | lost, xp.int32),
        row_noise=xp.where(fresh, 0.0, state.row_noise),
        row_age=xp.where(fresh, 0, state.row_age),
        mu=xp.where(complete, damping.mu, state.mu),
        tau=xp.where(keep, damping.tau, state.tau),
        delta=xp.where(keep, damping.delta, state.delta),
    )
    return turn_averages(call, state, kernels.after(due, sums)), rows


def _gradient(call: Call, seen: Observation, leaf: int) -> Array | None:
    """The gradient of this step. Where a compiler decides what it keeps in memory, it is formed again, since
    this part seldom runs."""
    grad, given = seen.grads[leaf], seen.given[leaf]
    if given is None or call.kernels.in_place or grad is given:
        return grad
    return rescaled(call, given, seen.scale, seen.dtypes[leaf])


def _replace_row(gram: Array, column: Array, chosen: Array, xp: Any) -> Array:
    """Put a column of inner products in the chosen row and column of each Gram matrix."""
    gram = xp.where(chosen[:, :, None], column[:, None, :], gram)
    return xp.where(chosen[:, None, :], column[:, :, None], gram)
