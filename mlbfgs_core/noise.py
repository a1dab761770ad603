"""The noise of gradients: along the stored pairs, and how much of it is expected in a new pair."""

from __future__ import annotations

from typing import Any

from .call import Call
from .state import State

__all__ = ["follow_noise", "row_noise", "row_squares", "window_noise"]

Array = Any
NOISE_WEIGHT = 0.1
"""Least weight of a new sample in the running variance along a stored row."""


def follow_noise(call: Call, state: State, rows: Array, keep: Array) -> State:
    """Update the variance of the gradient along each stored `s`, from second differences of `rows` (B, 2m),
    where `keep`.

    ``(b_t - 2 b_{t-1} + b_{t-2})^2 / 6`` has the variance as its mean when the noise is independent
    from step to step and the drift linear; a first difference would count the drift as noise.
    """
    config, xp = call.config, call.xp
    if not config.uses_noise:
        return state
    now = rows[:, : config.history_size] / _row_norms(state, xp)
    last, before = state.row_projection[:, 0, :], state.row_projection[:, 1, :]
    projection = xp.concat([now[:, None, :], last[:, None, :]], axis=1)
    age = state.row_age + 1
    known = age >= 3
    count = xp.astype(xp.where(known, age - 2, 1), call.dtype)
    weight = xp.where(count * NOISE_WEIGHT < 1.0, 1.0 / count, NOISE_WEIGHT)
    sample = (now - 2.0 * last + before) ** 2 / 6.0
    noise = xp.where(keep & known, state.row_noise + weight * (sample - state.row_noise), state.row_noise)
    return state._replace(
        row_projection=xp.where(keep, projection, state.row_projection),
        row_noise=noise,
        row_age=xp.where(keep, age, state.row_age),
    )


def _row_norms(state: State, xp: Any) -> Array:
    """(B, m): norms of the stored `s`, 1 where there is none."""
    squares = row_squares(state, xp)
    return xp.sqrt(xp.where(squares > 0, squares, 1.0))


def row_squares(state: State, xp: Any) -> Array:
    """(B, m): squared norms of the stored `s`; 0 where there is none, or one that says nothing."""
    return xp.stack([state.gram[:, i, i] for i in range(state.row_age.shape[1])], axis=1)


def window_noise(call: Call, state: State) -> tuple[Array, Array]:
    """Variance of ``M_g - P_g`` in units of one gradient's; and the ``|y|``, over all blocks, that noise
    alone would give: from the scatters and their degrees of freedom."""
    config, xp = call.config, call.xp
    now = xp.astype(xp.maximum(state.window, xp.ones_like(state.window)), call.dtype)
    before = xp.astype(xp.maximum(state.prev_window, xp.ones_like(state.window)), call.dtype)
    if config.beta is None:
        spread, freedom = (now + before) / (now * before), now + before - 2.0
    else:
        # Exponential averages that started at their first value: P has the variance `prev`, a part of
        # which stays in M, and the `now` gradients since then have geometric weights.
        beta = xp.ones_like(now) * config.beta
        first = xp.astype(state.step - state.window, call.dtype)
        limit = (1.0 - beta) / (1.0 + beta)
        prev = limit + (1.0 - limit) * beta ** (2.0 * xp.maximum(first - 1.0, xp.zeros_like(first)))
        spread = (1.0 - beta**now) ** 2 * prev + limit * (1.0 - beta ** (2.0 * now))
        seen = now + before - xp.astype(first <= before, call.dtype)  # the very first adds no scatter
        freedom = seen * 2.0 * beta / (1.0 + beta)
    freedom = xp.maximum(freedom, xp.ones_like(freedom))
    return spread, xp.sqrt(spread * (state.scatter + state.prev_scatter) / freedom)


def row_noise(call: Call, state: State) -> tuple[Array, Array]:
    """(B,): mean variance along those stored `s` for which two or more samples are known; and whether
    there are any."""
    xp = call.xp
    known = (row_squares(state, xp) > 0) & (state.row_age >= 4)
    count = xp.sum(xp.astype(known, call.dtype), axis=1)
    total = xp.sum(xp.where(known, state.row_noise, 0.0), axis=1)
    return total / xp.maximum(count, xp.ones_like(count)), count > 0
