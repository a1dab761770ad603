"""What a step learns about its gradient before it may write, and what it then remembers of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .bases import form
from .call import Call, When, remembered, run_if
from .config import Config
from .noise import follow_noise
from .scales import first_scale, is_scaled, norm_of_squares, param_squares
from .schedule import diverges, is_due
from .state import State
from .window import Weights, average, weights_of

__all__ = ["Observation", "observe", "project", "rescaled"]

Array = Any


class Observation(NamedTuple):
    """The reduced inner products of one step, whether all of them are finite, and the whitened gradient; all
    in the units of `State.grad_scale`."""

    rows: Array
    """(B, 2m): `b`, the stored rows times the whitened gradient."""
    grad_square: Array
    """(B,): squared norm of the gradient."""
    white_square: Array
    """(B,): that of the whitened gradient."""
    scatter: Array
    """(B,): what the whitened gradient adds to the scatter of this window."""
    param_norm: Array | None
    """0-d: norm of the parameters, where the length control needs it."""
    finite: Array
    """0-d bool, over all blocks."""
    diverges: Array
    """0-d bool: whether the gradient is much longer than usual, with ``step_length="clip"`` only."""
    scale: Array
    """0-d: the state's `grad_scale`, which the very first gradient determines."""
    grads: tuple[Array | None, ...]
    """The gradients times `scale`, or as they were given if that is known to be 1."""
    given: tuple[Array | None, ...]
    """The gradients before that."""
    weights: Weights
    roots: tuple[Any, ...]
    """The `Root` of each leaf, to which its gradient has not been added yet, with what it keeps for this
    step, which consumes it; None for a leaf without a gradient if the parameters are not known."""
    dtypes: tuple[Any, ...]
    """The dtype of each leaf's averages; None where its root is None."""


def project(
    call: Call,
    state: State,
    params: Sequence[Array] | None,
    grads: Sequence[Array | None],
    *,
    observed: bool = False,
    when_scaled: When = None,
    when_formed: When = None,
    when_rows: bool | None = None,
) -> Observation:
    """Whiten a gradient and project it; `observed` says that it is in the averages already."""
    config, kernels, xp = call.config, call.kernels, call.xp
    scale = state.grad_scale
    dtypes = call.dtypes(grads if params is None else params)
    given = tuple(grads)
    if not observed:  # else the gradient of an earlier step has determined it
        scale = run_if(
            when_scaled, is_scaled(state, xp), lambda old: first_scale(call, state, params, grads, old), scale
        )
    if when_scaled is not False:
        grads = [
            None if grad is None else rescaled(call, grad, scale, dtype)
            for grad, dtype in zip(grads, dtypes, strict=True)
        ]
    weights = weights_of(call, state, grads)
    roots = call.roots(state, dtypes, weights=None if observed else weights.square)
    if not observed:
        roots = form(call, state, roots, grads, when_formed)
    clips = config.step_length == "clip"
    parts: list[Array | None] = [None] * len(grads)
    for number, (grad, dtype) in enumerate(zip(grads, dtypes, strict=True)):
        if grad is None:
            continue
        leaf = call.leaf(state, number, dtype, roots[number], when_rows=when_rows)
        mean = state.mean_grads[number] if config.is_adaptive and not config.sums_squares else None
        weight = call.scalar(kernels.of_leaf(weights.scatter, number), dtype)
        roots[number], sums = kernels.whiten(leaf, grad, mean, weight)
        if clips:
            sums = [*sums, *param_squares(call, _needed(params), number, dtype)]
        sums = [kernels.to_coefficients(x, call.dtype) for x in sums]
        parts[number] = xp.concat([x if x.ndim else x[None] for x in sums])
    sums, isometric = call.block_sums(parts), call.preconditioner.isometric
    if when_rows is False:  # all shards send the same numbers, whatever they are told
        none = xp.zeros((sums.shape[0], 2 * config.history_size), dtype=call.dtype, device=call.device(state))
        sums = xp.concat([none, sums], axis=1)
    sums = call.reduce(sums)
    rows, last = 2 * config.history_size, sums.shape[1] - (3 if clips else 0)
    return Observation(
        rows=sums[:, :rows],
        grad_square=sums[:, rows],
        white_square=sums[:, rows if isometric else rows + 1],
        scatter=_scatter(config, sums[:, rows:], isometric, xp),
        param_norm=norm_of_squares(_needed(params), sums[:, last:], xp) if clips else None,
        finite=xp.all(xp.isfinite(sums[:, :last])),
        diverges=diverges(call, state, sums[:, rows]),
        scale=scale,
        grads=tuple(grads),
        given=given,
        weights=weights,
        roots=tuple(roots),
        dtypes=tuple(dtypes),
    )


def _scatter(config: Config, squares: Array, isometric: bool, xp: Any) -> Array:
    """What a gradient adds to the scatter: to be lessened by the square of the mean with `sums_squares`."""
    if not config.is_adaptive:
        return xp.zeros_like(squares[:, 0])
    return squares[:, (0 if isometric else 1) + (0 if config.sums_squares else 1)]


def rescaled(call: Call, grad: Array, scale: Array, dtype: Any) -> Array:
    """A gradient in the units of `State.grad_scale`."""
    return call.kernels.cast(grad, dtype) * call.scalar(scale, dtype)


def _needed(params: Sequence[Array] | None) -> Sequence[Array]:
    if params is None:
        msg = "`params` must be given with step_length='clip', got None"
        raise ValueError(msg)
    return params


def observe(
    call: Call, state: State, params: Sequence[Array], seen: Observation
) -> tuple[State, Observation]:
    """Add parameters and gradients to averages and preconditioner.

    The observation that is returned holds the updated roots.
    """
    config, xp, keep = call.config, call.xp, seen.finite
    one, kept = xp.astype(keep, xp.int32), call.kernels.to_leaf(keep)
    roots = tuple(
        root if root is None or grad is None else root.update(call.kernels, grad, kept)
        for root, grad in zip(seen.roots, seen.grads, strict=True)
    )
    seen = seen._replace(roots=roots)
    state = average(call, state, params, seen.grads, seen.weights, keep)
    state = follow_noise(call, state, seen.rows, keep)
    increments, window = seen.weights.increments * one, state.window + one
    state = state._replace(
        preconditioner=remembered(state, roots),
        leaf_steps=state.leaf_steps + increments,
        leaf_window=state.leaf_window + increments,
        step=state.step + one,
        skipped=state.skipped + (1 - one),
        accepted=keep,
        window=window,
        scatter=state.scatter + xp.where(keep, xp.sum(seen.scatter), 0.0),
        due=keep & is_due(config, window, state),
        grad_scale=xp.where(keep, seen.scale, state.grad_scale),
    )
    if config.is_adaptive:
        state = state._replace(pending=state.pending | (keep & seen.diverges))
    return state, seen
