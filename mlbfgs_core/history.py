"""The ring of pairs and its Gram matrix: a new pair in, a new operator out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .averages import Observation
from .blocks import Blocks
from .call import Call, Reduce, prepare
from .config import Config
from .kernels import Kernels
from .pairs import damp, products
from .state import State
from .two_loop import two_loop

__all__ = ["refresh"]

Array = Any


def refresh(
    config: Config,
    state: State,
    due: Array | bool,
    *,
    blocks: Blocks | None = None,
    kernels: Kernels | None = None,
    reduce: Reduce | None = None,
    shares: Sequence[float] | None = None,
) -> State:
    """Take the pair of this window and the previous one, and form the new inverse Hessian.

    Parameters
    ----------
    config : Config
    state : State
        As `observe` returned it. Consumed.
    due : bool or 0-d bool array
        Where false, the state stays as it is; ``state.due`` is what the schedule asks for.
    blocks, kernels, reduce, shares : optional
        As in `mlbfgs_core.step`.

    Returns
    -------
    State
        With the window closed. A pair without usable curvature is not stored, and counted.

    Notes
    -----
    Reads ``2 m`` values per parameter, and moves about 22 more: inner products, the new row, the
    exchange of averages. Reduces three times, ``B * (4 m + 7)`` numbers in all.

    References
    ----------
    Niu et al. 2023, Algorithm 1: ``s = M_theta(t) - M_theta(t')``, ``y = M_g(t) - M_g(t')``, damping,
    push. Difference from the paper: both members are divided by ``|s|``, which leaves `H` as it is.

    Examples
    --------
    >>> import numpy as np
    >>> from mlbfgs_core import init, observe
    >>> config, x = Config(preset="lbfgs"), np.asarray([1.0, 2.0])
    >>> state = init(config, [x])
    >>> for point in (x, 2 * x):
    ...     state = observe(config, state, [point], [3 * point])
    ...     state = refresh(config, state, state.due)
    >>> state.mu
    array([3.])
    """
    call = prepare(config, state, blocks, kernels, reduce, shares)
    due = call.xp.ones_like(state.due) & due
    return refresh_call(call, state, None, due)[0]


def refresh_call(
    call: Call,
    state: State,
    seen: Observation | None,
    due: Array,
) -> tuple[State, Array | None]:
    """`refresh` after its arguments have been checked; with an observation also its `rows`, with the
    gradient projected on the new pair too."""
    xp, m = call.xp, call.config.history_size
    metrics = call.metrics(state) if seen is None else seen.metrics
    pair = products(call, state, metrics)
    damping = damp(call, state, pair)
    complete = due & (state.prev_window > 0)
    keep = complete & damping.usable
    index = xp.arange(m, device=call.device(state))
    slots = xp.astype(state.pairs, index.dtype) % m

    history = list(state.history)
    grams: list[Array] = [None] * len(history)
    for number, block in enumerate(call.blocks):
        slot = call.kernels.to_leaves(slots[number : number + 1])
        kept = call.kernels.to_leaves(keep[number])
        for leaf in block:
            mean = state.mean_params[leaf]
            weights = (damping.weight[number], damping.along[number])
            history[leaf], grams[leaf] = call.kernels.push(
                history[leaf],
                slot,
                call.means(state, leaf),
                metrics[leaf],
                call.valid(state, leaf),
                call.scalar(damping.inverse_norm[number], mean),
                (call.scalar(weights[0], mean), call.scalar(weights[1], mean)),
                kept,
                None if seen is None else seen.grads[leaf],
            )
    sums = call.reduce(call.block_sums(grams))

    chosen = index[None, :] == slots[:, None]
    is_s = xp.concat([chosen, chosen & False], axis=1)
    is_y = xp.concat([chosen & False, chosen], axis=1)
    gram = _replace_row(state.gram, sums[:, : 2 * m], is_s, xp)
    gram = _replace_row(gram, sums[:, 2 * m : 4 * m], is_y, xp)
    gram = xp.where(keep[:, None, None], gram, state.gram)
    pairs = state.pairs + xp.astype(keep, xp.int32)
    operator, gamma = two_loop(gram, pairs, xp, call.device(state), call.kernels.repeat)
    # Products that overflow all the same, as those of float16 rows may, must not stay: begin anew.
    sane = xp.all(xp.isfinite(gram), axis=(1, 2)) & xp.all(xp.isfinite(operator), axis=(1, 2))
    lost = keep & ~(sane & xp.isfinite(gamma) & (gamma > 0))
    gram = xp.where(lost[:, None, None], 0.0, gram)
    operator = xp.where(lost[:, None, None], 0.0, operator)
    gamma = xp.where(lost, 1.0, gamma)
    pairs = xp.where(lost, 0, pairs)
    rows = None
    if seen is not None:
        along = xp.where(is_s, sums[:, 4 * m, None], xp.where(is_y, sums[:, 4 * m + 1, None], seen.rows))
        rows = xp.where(keep[:, None], along, seen.rows)

    fresh = keep[:, None] & chosen
    state = state._replace(
        history=tuple(history),
        gram=gram,
        operator=xp.where(keep[:, None, None], operator, state.operator),
        gamma=xp.where(keep, gamma, state.gamma),
        pairs=pairs,
        rejected=state.rejected + xp.astype((complete & ~damping.usable) | lost, xp.int32),
        row_noise=xp.where(fresh, 0.0, state.row_noise),
        row_age=xp.where(fresh, 0, state.row_age),
        mu=xp.where(complete, damping.mu, state.mu),
        tau=xp.where(keep, damping.tau, state.tau),
        delta=xp.where(keep, damping.delta, state.delta),
    )
    return _turn_window(call, state, call.kernels.after(due, sums)), rows


def _turn_window(call: Call, state: State, due: Array) -> State:
    """Where due: this window's averages and counts become the previous ones."""
    xp = call.xp
    turned = due & (state.leaf_window > 0)
    means = [
        call.kernels.rotate(
            call.means(state, leaf), call.kernels.to_leaves(turned[leaf]), restart=call.config.beta is None
        )
        for leaf in range(len(state.history))
    ]
    return state._replace(
        mean_params=tuple(mean.params for mean in means),
        mean_grads=tuple(mean.grads for mean in means),
        prev_params=tuple(mean.prev_params for mean in means),
        prev_grads=tuple(mean.prev_grads for mean in means),
        leaf_prev_window=xp.where(turned, state.leaf_window, state.leaf_prev_window),
        leaf_window=xp.where(due, 0, state.leaf_window),
        prev_window=xp.where(due, state.window, state.prev_window),
        window=xp.where(due, 0, state.window),
        prev_scatter=xp.where(due, state.scatter, state.prev_scatter),
        scatter=xp.where(due, 0.0, state.scatter),
        pending=state.pending & ~due,
    )


def _replace_row(gram: Array, column: Array, chosen: Array, xp: Any) -> Array:
    """Put a column of inner products in the chosen row and column of each Gram matrix."""
    gram = xp.where(chosen[:, :, None], column[:, None, :], gram)
    return xp.where(chosen[:, None, :], column[:, :, None], gram)
