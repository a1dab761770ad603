"""The averages of parameters and gradients over a window, and the turn to the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .call import Call
from .config import Config
from .state import State

__all__ = ["Weights", "average", "mean_square_weight", "turn_averages", "turn_window", "weights_of"]

Array = Any


class Weights(NamedTuple):
    """How a step's gradient is weighted, per parameter (P,)."""

    increments: Array | int
    """Observations to add."""
    mean: Array
    """Weight of a new observation in the averages."""
    square: Array
    """Weight of its square in the preconditioner's mean of squares."""
    scatter: Array
    """Weight of its squared distance from the average in the scatter."""


def weights_of(call: Call, state: State, grads: Sequence[Array | None]) -> Weights:
    """How gradients are weighted; a leaf without one keeps what it has."""
    config, xp = call.config, call.xp
    increments: Array | int = 1
    steps, window = state.leaf_steps + 1, state.leaf_window + 1
    present = call.kernels.present(grads)
    if not all(present):
        yes = xp.ones_like(state.step)
        increments = xp.stack([yes if has else yes * 0 for has in present])
        # The weights of a parameter without a gradient are zero, and must be finite before that.
        steps, window = (xp.maximum(n - 1 + increments, xp.ones_like(n)) for n in (steps, window))
    steps, window = xp.astype(steps, call.dtype), xp.astype(window, call.dtype)
    if config.beta is None:
        mean = 1.0 / window
    else:
        mean = xp.where(steps == 1.0, 1.0, xp.ones_like(steps) - config.beta)
    weights = Weights(
        increments,
        mean,
        mean_square_weight(config, steps) if state.preconditioner else mean,
        1.0 - mean,
    )
    if not all(present):
        used = xp.astype(increments, call.dtype)
        weights = weights._replace(**{n: getattr(weights, n) * used for n in Weights._fields[1:]})
    return weights


def mean_square_weight(config: Config, steps: Array) -> Array:
    """Weight of the newest of this many squared gradients in their bias-corrected running mean."""
    return (1.0 - config.preconditioner_beta) / (1.0 - config.preconditioner_beta**steps)


def average(
    call: Call,
    state: State,
    params: Sequence[Array],
    grads: Sequence[Array | None],
    weights: Weights,
    keep: Array,
) -> State:
    """``M <- M + w (x - M)`` of parameters and gradients (Niu et al. 2023, Algorithm 1), where `keep`."""
    if not state.mean_params:
        return state
    kernels, kept = call.kernels, call.kernels.to_leaf(keep)
    mean_params, mean_grads = list(state.mean_params), list(state.mean_grads)
    for leaf, grad in enumerate(grads):
        if grad is None:
            continue
        weight = call.scalar(kernels.of_leaf(weights.mean, leaf), mean_grads[leaf].dtype)
        mean_params[leaf] = kernels.average(mean_params[leaf], params[leaf], weight, kept)
        mean_grads[leaf] = kernels.average(mean_grads[leaf], grad, weight, kept)
    return state._replace(mean_params=tuple(mean_params), mean_grads=tuple(mean_grads))


def turn_averages(call: Call, state: State, due: Array) -> State:
    """Where due, make this window's averages the previous ones; before `turn_window`."""
    kernels, restart = call.kernels, call.config.beta is None
    turned = due & (state.leaf_window > 0)
    turn = [kernels.to_leaf(kernels.of_leaf(turned, leaf)) for leaf in range(len(state.mean_params))]
    turns: dict[str, Any] = {}
    for now, before in (("mean_params", "prev_params"), ("mean_grads", "prev_grads")):
        pairs = [
            kernels.rotate(own, old, yes, restart=restart)
            for own, old, yes in zip(getattr(state, now), getattr(state, before), turn, strict=True)
        ]
        turns[now], turns[before] = (tuple(arrays) for arrays in zip(*pairs, strict=True))
    return state._replace(**turns)


def turn_window(call: Call, state: State, due: Array) -> State:
    """Where due, make this window's counts the previous ones."""
    xp, turned = call.xp, due & (state.leaf_window > 0)
    return state._replace(
        leaf_prev_window=xp.where(turned, state.leaf_window, state.leaf_prev_window),
        leaf_window=xp.where(due, 0, state.leaf_window),
        prev_window=xp.where(due, state.window, state.prev_window),
        window=xp.where(due, 0, state.window),
        prev_scatter=xp.where(due, state.scatter, state.prev_scatter),
        scatter=xp.where(due, 0.0, state.scatter),
        pending=state.pending & ~due,
    )
