"""The direction ``d = H g`` and the control of its length, and the whole step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from array_api_compat import array_namespace

from .averages import Observation, is_check, is_due, mean_square_weight, observe_call, project_call
from .blocks import Blocks
from .call import Call, Reduce, When, prepare, run_if, stack
from .config import Config
from .history import refresh_call
from .kernels import Kernels
from .scales import norm_of_squares
from .state import State

__all__ = ["direction", "step", "unscaled_step", "upcoming"]

Array = Any
WARM_UP, WARM_UP_GROWTH, WARM_UP_MOST = 0.01, 1.5, 0.3
"""Length of a direction before the first pair with ``step_length="clip"``, relative to the
parameters' norm; its growth from step to step, for as long as noise hides the pair; its limit."""
SHORTENING = 0.5
"""What the running length, which would grow with a run that diverges, is multiplied by at such a step."""
LEAST_NORM = 0.01
"""What counts as the norm of parameters that are all zero, relative to the root of the dimension."""


def step(
    config: Config,
    state: State,
    params: Sequence[Array],
    grads: Sequence[Array | None],
    *,
    blocks: Blocks | None = None,
    kernels: Kernels | None = None,
    reduce: Reduce | None = None,
    shares: Sequence[float] | None = None,
    when_check: When = None,
    when_due: When = None,
    when_scaled: When = None,
    observation: Observation | None = None,
) -> tuple[list[Array | None], State]:
    """One step: project, observe, refresh if due, direction; the history is read twice.

    Parameters
    ----------
    config : Config
    state : State
        Consumed: use the state that is returned.
    params : sequence of arrays
        The leaves given to `init`, with their present values.
    grads : sequence of arrays
        The gradient at `params`, of the same shapes and dtypes. None where there is none: that leaf
        keeps still.
    blocks : tuple of tuples of int, optional
        The blocks given to `init`.
    kernels : Kernels, optional
        The operations on parameter-sized arrays; by default plain array-API ones.
    reduce : callable, optional
        Sums an array of coefficients over all shards; by default the identity. Called once in a
        step, once more with a metric or a missing gradient, twice at a check, three times at a refresh.
    shares : sequence of float, optional
        For each leaf the part of its inner products that this shard adds, by default 1. Where several
        shards hold copies of a leaf, their shares sum to 1: say, 1 on one of them and 0 on the others.
    when_check, when_due : None, bool or callable
        Who decides whether the check or the refresh runs. None: both always run, and what is not
        asked for is masked. A bool: the caller knows, for instance from `upcoming`. A function
        ``(predicate, part, operand) -> result``, such as a wrapper of ``jax.lax.cond``. A part that
        runs unasked changes nothing; one that is asked for must run.
    when_scaled : None, bool or callable
        The same of the gradients' scale, which the very first gradient decides; see `is_scaled`. With None
        each step reads the gradient once more, and without False it multiplies it (which a compiler fuses).
    observation : Observation, optional
        From `project` of the same arguments; a caller with several states may replace its `finite`
        by the conjunction of all.

    Returns
    -------
    update : list of arrays
        `d`, of the gradients' shapes and dtypes, to be *subtracted*; None where the gradient is
        None; zero on a skipped step.
    state : State
        ``state.accepted`` and ``state.due`` are false where the gradient was non-finite: everything else
        but the counter `skipped` is then as it was.

    Raises
    ------
    ValueError, TypeError
        Leaves that do not match the state, before anything has changed.

    Notes
    -----
    Moves ``4 m`` values per parameter for the two passes over the history and, with default
    settings, about 18 more (9 without metric and adaptive schedule). A refresh adds about
    ``2 m + 22``.

    References
    ----------
    Niu et al. 2023, Algorithm 1.

    Examples
    --------
    Gradient descent turns into a quasi-Newton method on ``f(x) = x.A x / 2``.

    >>> import numpy as np
    >>> config, x = Config(preset="lbfgs"), np.asarray([1.0, 1.0])
    >>> from mlbfgs_core import init
    >>> state = init(config, [x])
    >>> for _ in range(4):
    ...     update, state = step(config, state, [x], [np.asarray([1.0, 3.0]) * x])
    ...     x = x - 0.5 * update[0]
    >>> int(state.pairs[0])
    3
    """
    call = prepare(config, state, blocks, kernels, reduce, shares, params=params, grads=grads)
    update, factor, state = _unscaled_step(
        call, state, params, grads, when_check, when_due, when_scaled, observation
    )
    return _scaled(call, grads, update, factor), state


def unscaled_step(
    config: Config,
    state: State,
    params: Sequence[Array],
    grads: Sequence[Array | None],
    *,
    blocks: Blocks | None = None,
    kernels: Kernels | None = None,
    reduce: Reduce | None = None,
    shares: Sequence[float] | None = None,
    when_check: When = None,
    when_due: When = None,
    when_scaled: When = None,
    observation: Observation | None = None,
) -> tuple[list[Array | None], Array, State]:
    """`step` for a caller that multiplies the update by a factor of its own anyway.

    Parameters
    ----------
    config, state, params, grads, blocks, kernels, reduce, shares
        As in `step`, and so are `when_check`, `when_due`, `when_scaled` and `observation`.

    Returns
    -------
    update : list of arrays
        In the accumulation dtype; None where the gradient is None.
    factor : array
        0-d: ``update * factor`` is what `step` returns; zero on a skipped step.
    state : State

    Raises
    ------
    ValueError, TypeError
        As `step`.

    Notes
    -----
    Moves 2 values per parameter less than `step`.

    Examples
    --------
    >>> import numpy as np
    >>> from mlbfgs_core import init
    >>> config, x = Config(), np.asarray([3.0, 4.0])
    >>> update, factor, _ = unscaled_step(config, init(config, [x]), [x], [x])
    >>> round(float(np.sqrt(np.mean((update[0] * factor) ** 2))), 6)
    1.0
    """
    call = prepare(config, state, blocks, kernels, reduce, shares, params=params, grads=grads)
    return _unscaled_step(call, state, params, grads, when_check, when_due, when_scaled, observation)


def _unscaled_step(
    call: Call,
    state: State,
    params: Sequence[Array],
    grads: Sequence[Array | None],
    when_check: When,
    when_due: When,
    when_scaled: When,
    seen: Observation | None,
) -> tuple[list[Array | None], Array, State]:
    if seen is None:
        seen = project_call(call, state, params, grads, when_scaled=when_scaled)
    state = observe_call(call, state, params, seen, when_check)

    def part(operand: tuple[State, Array]) -> tuple[State, Array | None]:
        return refresh_call(call, operand[0], seen, state.due)

    updated, rows = run_if(when_due, state.due, part, (state, seen.rows))
    return _direction(call, updated, seen._replace(rows=rows))


def upcoming(config: Config, state: State) -> Array:
    """Whether the next accepted step asks for a check and for a refresh: (2,) array of bool.

    A host that copies it without waiting can hand the two to the next `step` as `when_check` and
    `when_due`: it depends only on steps that are already done.
    """
    xp, window = array_namespace(state.window), state.window + 1
    return stack([is_check(config, window, state), is_due(config, window, state)], xp)


def direction(
    config: Config,
    state: State,
    grads: Sequence[Array | None],
    *,
    params: Sequence[Array] | None = None,
    blocks: Blocks | None = None,
    kernels: Kernels | None = None,
    reduce: Reduce | None = None,
    shares: Sequence[float] | None = None,
) -> tuple[list[Array | None], State]:
    """The direction ``H g`` for any gradient, with the length that the settings ask for.

    Parameters
    ----------
    config : Config
    state : State
        Consumed.
    grads : sequence of arrays
        One per leaf, or None.
    params : sequence of arrays, optional
        Needed with ``step_length="clip"``, which begins relative to their norm.
    blocks, kernels, reduce, shares : optional
        As in `step`.

    Returns
    -------
    update : list of arrays
    state : State

    Notes
    -----
    ``H = gamma I + B^T C B``: reads the history twice, and everything about `d` that is not `d`
    itself comes from coefficients: ``d.g = gamma |g|^2 + b.c``,
    ``|d|^2 = gamma^2 |g|^2 + 2 gamma b.c + c.G c``.

    References
    ----------
    Byrd, Nocedal & Schnabel 1994 for the compact form. Difference from the paper: its steps have no
    length control (``step_length="none"``).

    Examples
    --------
    >>> import numpy as np
    >>> from mlbfgs_core import init
    >>> config, x = Config(step_length="unit", metric_power=0.0), np.asarray([3.0, 4.0])
    >>> direction(config, init(config, [x]), [x])[0][0]
    array([0.6, 0.8])
    """
    call = prepare(config, state, blocks, kernels, reduce, shares, params=params, grads=grads)
    seen = project_call(call, state, params, grads, observed=True)
    update, factor, state = _direction(call, state, seen)
    return _scaled(call, grads, update, factor), state


def _scaled(
    call: Call, grads: Sequence[Array | None], update: Sequence[Array | None], factor: Array
) -> list[Array | None]:
    return [
        None if d is None or grad is None else call.kernels.scale(d, call.scalar(factor, d), grad.dtype)
        for d, grad in zip(update, grads, strict=True)
    ]


def _direction(call: Call, state: State, seen: Observation) -> tuple[list[Array | None], Array, State]:
    """The update up to a factor, the factor, and the state."""
    config, xp, keep = call.config, call.xp, seen.finite
    b, square = seen.rows, seen.metric_square
    gamma = _scale_of_start(call, state, seen)
    # All that follows is in units of the largest gamma, which may be too large for a square.
    top = xp.max(gamma)
    part = gamma / top
    # Small sums instead of matrix products, which may run in reduced precision.
    c = xp.sum(state.operator / top * b[:, None, :], axis=2)
    bc = xp.sum(b * c, axis=1)
    cgc = xp.sum(c * xp.sum(state.gram * c[:, None, :], axis=2), axis=1)
    along = part * square + bc
    norm_square = xp.maximum(part**2 * square + 2.0 * part * bc + cgc, xp.zeros_like(square))
    norm = xp.sqrt(xp.sum(norm_square))

    # The coefficients give the norm of all of `H g` in the metric: is it that of the update?
    whole = all(grad is not None for grad in seen.grads)
    exact = whole and not config.uses_metric
    # Of unit length in the metric first, so that nothing overflows outside of it.
    unit = 1.0 / xp.where(norm > 0, norm, 1.0) if config.step_length != "none" else xp.ones_like(norm)
    update, squares = _combine(call, state, seen, c * unit, part * unit, exact=exact)
    moving = state.size
    if not exact:
        if whole or config.step_length != "rms":
            sums = call.reduce(call.block_sums(squares))
        else:
            sums, moving = _with_sizes(call, squares, seen.grads)
        norm_square = sums / unit**2
        norm = xp.sqrt(xp.sum(norm_square))
    factor, length = top, state.length
    if config.step_length != "none":
        factor, length = _length(call, state, seen, norm, top, moving)
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
    call: Call,
    state: State,
    seen: Observation,
    c: Array,
    gamma: Array,
    *,
    exact: bool,
) -> tuple[list[Array | None], list[Array | None]]:
    """The updates, and where their norm is not `exact` already their sums of squares."""
    keep, grads = call.kernels.to_leaves(seen.finite), seen.grads
    update: list[Array | None] = [None] * len(grads)
    squares: list[Array | None] = [None] * len(grads)
    for number, block in enumerate(call.blocks):
        for leaf in block:
            grad, mean = grads[leaf], state.mean_grads[leaf]
            if grad is not None:
                d, square = call.kernels.combine(
                    state.history[leaf],
                    grad,
                    call.scalar(c[number, :], mean),
                    call.scalar(gamma[number], mean),
                    seen.metrics[leaf],
                    keep,
                    mean.dtype,
                )
                if square is None and not exact:
                    square = call.kernels.square(d, mean.dtype)
                update[leaf], squares[leaf] = d, square
    return update, squares


def _with_sizes(
    call: Call, squares: Sequence[Array | None], grads: Sequence[Array | None]
) -> tuple[Array, Array]:
    """Each block's sum of squares, and its number of values that have a gradient, in one reduction."""
    parts: list[Array | None] = []
    for square, grad in zip(squares, grads, strict=True):
        if grad is None:
            parts.append(None)
            continue
        square = call.kernels.cast(square, call.dtype)
        parts.append(stack([square, call.xp.full_like(square, math.prod(grad.shape))], call.xp))
    sums = call.reduce(call.block_sums(parts))
    return sums[:, 0], sums[:, 1]


def _scale_of_start(call: Call, state: State, seen: Observation) -> Array:
    """`gamma` of each block; for one without a pair that of the others, or the paper's ``d = g``, which is at
    most 1 long where a pair comes with every step, and just as long where gradients are out of the ordinary.

    Nocedal & Wright, section 6.1, on the scale of the first step.
    """
    xp, has = call.xp, state.pairs > 0
    count = xp.sum(xp.astype(has, call.dtype))
    known = xp.sum(xp.where(has, state.gamma, 0.0)) / xp.where(count > 0, count, 1.0)
    first = 1.0 / seen.scale
    if call.config.caps_first_step:
        norm = xp.sqrt(xp.sum(seen.metric_square))
        least = xp.where(seen.scale == 1.0, 1.0, xp.where(norm > 0, norm, 1.0))
        first = 1.0 / xp.maximum(norm, least)
    return xp.where(has, state.gamma, xp.where(count > 0, known, first))


def _length(
    call: Call, state: State, seen: Observation, norm: Array, unit: Array, moving: Array
) -> tuple[Array, Array]:
    """The factor that gives a direction of norm ``norm * unit`` and of which ``1 / unit`` times is given its
    length, and the new running length; `moving` (B,) are the numbers of parameters that have a gradient."""
    config, xp = call.config, call.xp
    positive = norm > 0
    safe = xp.where(positive, norm, 1.0)
    if config.step_length == "rms":
        return xp.sqrt(xp.sum(moving)) / safe, state.length
    if config.step_length == "unit":
        return 1.0 / safe, state.length
    full = xp.minimum(norm * unit, xp.ones_like(norm) * xp.finfo(call.dtype).max)
    running = xp.where(state.length > 0, state.length, full)
    running = xp.where(seen.diverges, SHORTENING * running, running)
    length = xp.minimum(full, config.clip_factor * running)
    rate = 1.0 / xp.full_like(norm, config.update_every)
    followed = running + rate * (length - running)
    norm_of_params = norm_of_squares(state, seen.param_squares, xp)
    reach = xp.where(norm_of_params > 0, norm_of_params, LEAST_NORM * xp.sqrt(xp.sum(state.size)))
    growth = xp.astype(state.step - 1, call.dtype) * math.log(WARM_UP_GROWTH)
    part = WARM_UP * xp.exp(xp.minimum(growth, xp.ones_like(growth) * math.log(WARM_UP_MOST / WARM_UP)))
    warm_up = part * reach
    started = xp.any(state.pairs > 0)
    return (
        xp.where(started, length, warm_up) / safe,
        xp.where(started & positive, followed, state.length),
    )
