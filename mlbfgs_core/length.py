"""The length of a direction: one rule for each `step_length`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .call import Call
from .observation import Observation
from .state import State, has_rows

__all__ = ["LENGTHS", "clip", "none", "rms", "unit"]

Array = Any
LengthRule = Callable[[Call, State, Observation, Array, Array, Array], tuple[Array, Array]]
"""``(call, state, seen, norm, top, moving) -> (factor, length)``: the factor for a direction of this norm,
which stands for one that is `top` times as long; and the new running length. `moving` (B,) are the numbers of
parameters that have a gradient."""

WARM_UP, WARM_UP_GROWTH, WARM_UP_MOST = 0.01, 1.5, 0.3
"""Length of a direction before the first pair with ``step_length="clip"``, relative to the
parameters' norm; its growth from step to step, for as long as noise hides the pair; its limit."""
SHORTENING = 0.5
"""The factor of the running length at a step that diverges, since it would otherwise grow with the run."""
LEAST_NORM = 0.01
"""What counts as the norm of parameters that are all zero, relative to the root of the dimension."""


def rms(
    call: Call, state: State, seen: Observation, norm: Array, top: Array, moving: Array
) -> tuple[Array, Array]:
    """Root mean square 1 over the parameters that have a gradient."""
    xp = call.xp
    return xp.sqrt(xp.sum(moving)) / xp.where(norm > 0, norm, 1.0), state.length


def unit(
    call: Call, state: State, seen: Observation, norm: Array, top: Array, moving: Array
) -> tuple[Array, Array]:
    """Length 1."""
    return 1.0 / call.xp.where(norm > 0, norm, 1.0), state.length


def clip(
    call: Call, state: State, seen: Observation, norm: Array, top: Array, moving: Array
) -> tuple[Array, Array]:
    """The direction's own length, limited to a multiple of its running mean; before the first pair a part of
    the parameters' norm."""
    config, xp = call.config, call.xp
    norm_of_params: Array = seen.param_norm
    positive = norm > 0
    safe = xp.where(positive, norm, 1.0)
    full = xp.minimum(norm * top, xp.ones_like(norm) * xp.finfo(call.dtype).max)
    running = xp.where(state.length > 0, state.length, full)
    running = xp.where(seen.diverges, SHORTENING * running, running)
    length = xp.minimum(full, config.clip_factor * running)
    rate = 1.0 / xp.full_like(norm, config.update_every)
    followed = running + rate * (length - running)
    if not config.takes_pairs:
        return length / safe, xp.where(positive, followed, state.length)
    reach = xp.where(norm_of_params > 0, norm_of_params, LEAST_NORM * xp.sqrt(xp.sum(state.size)))
    growth = xp.astype(state.step - 1, call.dtype) * math.log(WARM_UP_GROWTH)
    part = WARM_UP * xp.exp(xp.minimum(growth, xp.ones_like(growth) * math.log(WARM_UP_MOST / WARM_UP)))
    started = xp.any(has_rows(state, xp))
    return (
        xp.where(started, length, part * reach) / safe,
        xp.where(started & positive, followed, state.length),
    )


def none(
    call: Call, state: State, seen: Observation, norm: Array, top: Array, moving: Array
) -> tuple[Array, Array]:
    """The direction's own length."""
    return top, state.length


LENGTHS: dict[str, LengthRule] = {"rms": rms, "unit": unit, "clip": clip, "none": none}
"""The rules, by the names of `mlbfgs_core.Config.step_length`."""
