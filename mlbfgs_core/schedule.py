"""What a step is to do: when a pair is asked for, and when it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .call import Call, When, run_if
from .config import Config
from .noise import row_noise, window_noise
from .pairs import PairProducts, common_scale, joint_norm, products, scatter
from .preconditioner import Root
from .state import State

__all__ = ["Upcoming", "check", "diverges", "is_check", "is_due", "next_pair"]

Array = Any
DIVERGENCE = 6.0
"""A run with ``step_length="clip"`` diverges where the squared norm of a gradient exceeds its running mean by
this factor."""


class Upcoming(NamedTuple):
    """What the next accepted step is to do; None where nobody knows: then it is done, and masked.

    The fields are called like the arguments ``when_...`` of `Method.step`.
    """

    check: bool | None
    """Ask whether a pair stands out of the noise."""
    due: bool | None
    """Take a pair."""
    formed: bool | None
    """Form the bases of a Kronecker preconditioner."""
    turned: bool | None
    """Turn them."""
    scaled: bool | None
    """Multiply gradients."""
    rows: bool | None
    """Read the stored pairs, since one of them says something."""


def is_check(config: Config, window: Array, state: State) -> Array:
    """Whether an accepted step that makes the window this long asks if a pair is due."""
    return (window % config.check_every == 0) & (state.prev_window > 0) & config.is_adaptive


def is_due(config: Config, window: Array, state: State) -> Array:
    """Whether an accepted step that makes the window this long takes a pair."""
    due = ((window >= config.update_every) | state.pending) & config.takes_pairs
    if config.is_adaptive:  # the first window has nothing to be compared with: end it at its first check
        due = due | ((state.prev_window == 0) & (window >= config.check_every))
    return due


def next_pair(
    call: Call, state: State, roots: Sequence[Root], when_check: When, when_due: When = False
) -> tuple[State, PairProducts | None]:
    """The inner products of the next pair, formed once for the check and the refresh of one step, and the
    check's verdict; None where neither runs."""
    adaptive = call.config.is_adaptive
    when_check = when_check if adaptive else False
    asked = state.accepted & is_check(call.config, state.window, state) if adaptive else state.due & False
    if when_check is False and when_due is False:
        return state, None

    def part(operand: tuple[Array, Array, PairProducts | None]) -> tuple[Array, Array, PairProducts]:
        pair = products(call, state, roots)
        verdict = operand[:2] if when_check is False else check(call, state, pair, asked)
        return *verdict, pair

    before = state.pending, state.signal_to_noise
    if callable(when_check) or callable(when_due):
        decide = when_check if callable(when_check) else when_due
        none = PairProducts(*(call.xp.zeros_like(state.gamma) for _ in PairProducts._fields))
        pending, ratio, pair = run_if(decide, asked | state.due, part, (*before, none))
    else:
        pending, ratio, pair = part((*before, None))
    return state._replace(pending=pending, signal_to_noise=ratio), pair


def check(call: Call, state: State, pair: PairProducts, asked: Array) -> tuple[Array, Array]:
    """Whether the pair stands out of the gradient noise, so that the next step takes it, and how far: the
    state's `pending` and `signal_to_noise`.

    ``|y|^2`` must exceed `signal_to_noise` times the noise expected in it, and the curvature
    `noise_floor` times its standard deviation, once that is known.
    """
    config, xp = call.config, call.xp
    state = state._replace(scatter=scatter(call, state, pair))
    _, s_part = common_scale(pair.s_scale, xp)
    y_top, y_part = common_scale(pair.y_scale, xp)
    y_norm = joint_norm(pair.yy, y_top, y_part, xp)
    spread, y_noise = window_noise(call, state)
    noise, known = row_noise(call, state)
    rise = y_top * xp.sum(pair.sy * s_part * y_part)  # s.y in units of the largest s_scale; so is the next
    rise_noise = xp.sqrt(spread * xp.sum(pair.ss * s_part**2 * noise))
    passed = (y_norm > xp.sqrt(xp.ones_like(y_norm) * config.signal_to_noise) * y_noise) & (
        (rise > config.noise_floor * rise_noise) | ~xp.any(known)
    )
    ratio = (y_norm / xp.where(y_noise > 0, y_noise, 1.0)) ** 2
    return (
        state.pending | (asked & passed),
        xp.where(asked, xp.where(y_noise > 0, ratio, 0.0), state.signal_to_noise),
    )


def diverges(call: Call, state: State, grad_square: Array) -> Array:
    """Whether the inverse Hessian must be too large along some direction, since gradients have grown.

    Steps that overshoot there go back and forth, which the means over a window of even length hide from the
    next pair. So a pair is taken at once, and steps are shortened.
    """
    xp = call.xp
    if call.config.step_length != "clip":
        return xp.zeros_like(state.pending)
    usual = xp.sum(state.mean_square * state.size)
    return (usual > 0) & (xp.sum(grad_square) > DIVERGENCE * usual)
