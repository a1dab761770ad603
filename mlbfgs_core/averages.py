"""What a step learns of its gradient, and the averages that it enters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .blocks import Blocks
from .call import Call, Reduce, When, prepare, run_if
from .config import Config
from .kernels import Kernels, Metric
from .pairs import check
from .scales import first_scale, is_scaled, param_squares
from .state import State

__all__ = ["Observation", "observe", "project"]

Array = Any
NOISE_WEIGHT = 0.1
"""Least weight of a new sample in the running variance along a stored row."""
DIVERGENCE = 6.0
"""How many times its running mean the squared norm of a gradient is where a run of ``step_length="clip"``
diverges."""


class Weights(NamedTuple):
    """How a step's gradient enters, per leaf (L,)."""

    increments: Array | int
    """Observations to add."""
    mean: Array
    """Weight of a new observation in the averages."""
    moment: Array
    """The same in the mean square."""


class Observation(NamedTuple):
    """The reduced inner products of one step, whether all of them are finite, and how the gradient enters
    averages and metric; all in the units of `State.grad_scale`."""

    rows: Array
    """(B, 2m): `b`, the stored rows times the gradient, in the metric."""
    grad_square: Array
    """(B,): squared norm of the gradient."""
    metric_square: Array
    """(B,): the same in the metric."""
    scatter: Array
    """(B,): what the gradient adds to the scatter of this window, in the metric."""
    param_squares: Array | None
    """(B, 3): squared norm of the parameters on three scales, where the length control needs it; see
    `mlbfgs_core.scales.norm_of_squares`."""
    finite: Array
    """0-d bool, over all blocks."""
    diverges: Array
    """0-d bool: whether the gradient is much longer than it was, where steps are as long as it makes them."""
    scale: Array
    """0-d: the state's `grad_scale`, which the very first gradient decides."""
    grads: tuple[Array | None, ...]
    """The gradients times `scale`, or as they were given where that is known to be 1."""
    weights: Weights
    metrics: tuple[Metric | None, ...]
    """The metric of each leaf with its ``q ** -0.5``, so that a step forms it once; the step consumes it."""


def project(
    config: Config,
    state: State,
    params: Sequence[Array],
    grads: Sequence[Array | None],
    *,
    blocks: Blocks | None = None,
    kernels: Kernels | None = None,
    reduce: Reduce | None = None,
    shares: Sequence[float] | None = None,
    when_scaled: When = None,
) -> Observation:
    """Everything a step must know of its gradient before it may write: one pass, one reduction.

    Parameters
    ----------
    config : Config
    state : State
        Not consumed.
    params, grads : sequence of arrays
        One per leaf; a gradient may be None.
    blocks, kernels, reduce, shares, when_scaled : optional
        As in `mlbfgs_core.step`.

    Returns
    -------
    Observation
        Coefficient-sized, except for the gradients. A gradient whose square overflows counts as non-finite:
        in float32 one with a norm of 1.8e19, where the first one was ordinary (`State.grad_scale` is 1).

    Notes
    -----
    Reads ``2 m + 1`` values per parameter, one more for the metric, one for an adaptive schedule and
    three for ``step_length="clip"``. Reduces ``B * (2 m + 1)`` numbers and as many more.

    Examples
    --------
    >>> import numpy as np
    >>> from mlbfgs_core import init
    >>> config, x = Config(preset="lbfgs"), np.asarray([1.0, 2.0])
    >>> project(config, init(config, [x]), [x], [3 * x]).grad_square
    array([45.])
    """
    call = prepare(config, state, blocks, kernels, reduce, shares, params=params, grads=grads)
    return project_call(call, state, params, grads, when_scaled=when_scaled)


def project_call(
    call: Call,
    state: State,
    params: Sequence[Array] | None,
    grads: Sequence[Array | None],
    *,
    observed: bool = False,
    when_scaled: When = None,
) -> Observation:
    """`project` after its arguments have been checked; `observed`: the gradient is in the averages."""
    config, kernels, xp = call.config, call.kernels, call.xp
    scale = state.grad_scale
    if not observed:  # else the gradient of an earlier step has decided
        scale = run_if(
            when_scaled, is_scaled(state, xp), lambda old: first_scale(call, state, params, grads, old), scale
        )
    if when_scaled is not False:
        grads = [
            None if grad is None else kernels.scaled(grad, call.scalar(scale, mean), mean.dtype)
            for grad, mean in zip(grads, state.mean_grads, strict=True)
        ]
    weights = _weights(call, state, grads)
    metrics = call.metrics(state, weights=None if observed else weights.moment)
    parts: list[Array | None] = []
    for leaf, grad in enumerate(grads):
        if grad is None:
            parts.append(None)
            continue
        mean, metric = state.mean_grads[leaf], metrics[leaf]
        part = kernels.project(
            state.history[leaf],
            grad,
            mean if config.adaptive else None,
            call.scalar(1.0 - weights.mean[leaf], mean),
            metric,
            mean.dtype,
        )
        if metric is not None:
            metrics[leaf] = metric._replace(kept=part.inverse_root)
        numbers = [part.grad_square, part.metric_square, part.scatter]
        if config.step_length == "clip":
            numbers += param_squares(call, state, _needed(params)[leaf], mean.dtype)
        sums = [part.rows, *(x[None] for x in numbers if x is not None)]
        parts.append(xp.concat([kernels.cast(x, call.dtype) for x in sums]))
    sums = call.reduce(call.block_sums(parts))
    rows = 2 * config.history_size
    last = sums.shape[1] - (3 if config.step_length == "clip" else 0)
    rest = iter([sums[:, i] for i in range(rows, last)])
    grad_square = next(rest)
    metric_square = next(rest) if config.uses_metric else grad_square
    scatter = next(rest) if config.adaptive else xp.zeros_like(grad_square)
    return Observation(
        rows=sums[:, :rows],
        grad_square=grad_square,
        metric_square=metric_square,
        scatter=scatter,
        param_squares=sums[:, last:] if config.step_length == "clip" else None,
        finite=xp.all(xp.isfinite(sums[:, :last])),
        diverges=_diverges(call, state, grad_square),
        scale=scale,
        grads=tuple(grads),
        weights=weights,
        metrics=tuple(metrics),
    )


def observe(
    config: Config,
    state: State,
    params: Sequence[Array],
    grads: Sequence[Array | None],
    *,
    blocks: Blocks | None = None,
    kernels: Kernels | None = None,
    reduce: Reduce | None = None,
    shares: Sequence[float] | None = None,
    observation: Observation | None = None,
    when: When = None,
) -> State:
    """Enter parameters and gradients in the averages; at a check, ask whether a pair is due.

    Parameters
    ----------
    config : Config
    state : State
        Consumed.
    params, grads : sequence of arrays
        `theta` and the gradient at `theta`, both from before the update; a gradient may be None.
    blocks, kernels, reduce, shares : optional
        As in `mlbfgs_core.step`.
    observation : Observation, optional
        From `project` of the same arguments, which is called where it is not given.
    when : None, bool or callable
        Who decides whether the check runs; see `mlbfgs_core.step`.

    Returns
    -------
    State
        ``state.due`` tells whether this step's `refresh` takes a pair, ``state.accepted`` whether the
        gradient was finite; if not, only the counter `skipped` differs.

    Notes
    -----
    Reads 4 and writes 2 values per parameter (with a metric 5 and 3); a check reads 4 to 5 more.

    References
    ----------
    Niu et al. 2023, Algorithm 1, the momentum updates ``M <- beta M + (1 - beta) x``. Difference
    from the paper: with ``beta=None`` the plain mean over the window.

    Examples
    --------
    >>> import numpy as np
    >>> from mlbfgs_core import init
    >>> config, x = Config(preset="lbfgs"), np.asarray([1.0, 2.0])
    >>> state = observe(config, init(config, [x]), [x], [3 * x])
    >>> bool(state.due), state.mean_grads[0]
    (True, array([3., 6.]))
    """
    call = prepare(config, state, blocks, kernels, reduce, shares, params=params, grads=grads)
    if observation is None:
        observation = project_call(call, state, params, grads)
    return observe_call(call, state, params, observation, when)


def observe_call(
    call: Call,
    state: State,
    params: Sequence[Array],
    seen: Observation,
    when: When,
) -> State:
    """`observe` after its arguments have been checked."""
    config, xp, keep = call.config, call.xp, seen.finite
    one, kept, grads = xp.astype(keep, xp.int32), call.kernels.to_leaves(keep), seen.grads
    increments = seen.weights.increments
    mean_params, mean_grads, moments = list(state.mean_params), list(state.mean_grads), list(state.moment)
    for leaf, grad in enumerate(grads):
        if grad is None:
            continue
        weight = call.scalar(seen.weights.mean[leaf], mean_params[leaf])
        mean_params[leaf], mean_grads[leaf], moment = call.kernels.update_means(
            mean_params[leaf], mean_grads[leaf], seen.metrics[leaf], params[leaf], grad, weight, kept
        )
        if moment is not None:
            moments[leaf] = moment
    window = state.window + one
    state = _follow_noise(call, state, seen)
    state = state._replace(
        mean_params=tuple(mean_params),
        mean_grads=tuple(mean_grads),
        moment=tuple(moments),
        leaf_steps=state.leaf_steps + increments * one,
        leaf_window=state.leaf_window + increments * one,
        step=state.step + one,
        skipped=state.skipped + (1 - one),
        accepted=keep,
        window=window,
        scatter=state.scatter + xp.where(keep, xp.sum(seen.scatter), 0.0),
        due=keep & is_due(config, window, state),
        grad_scale=xp.where(keep, seen.scale, state.grad_scale),
    )
    if not config.adaptive:
        return state
    state = state._replace(pending=state.pending | (keep & seen.diverges))
    asked = keep & is_check(config, window, state)

    def part(verdict: tuple[Array, Array]) -> tuple[Array, Array]:
        before = state._replace(pending=verdict[0], signal_to_noise=verdict[1])
        return check(call, before, seen.metrics, asked)

    pending, ratio = run_if(when, asked, part, (state.pending, state.signal_to_noise))
    return state._replace(pending=pending, signal_to_noise=ratio)


def _diverges(call: Call, state: State, grad_square: Array) -> Array:
    """Whether the inverse Hessian must be too large along some direction, since gradients have grown.

    Steps that overshoot there go to and fro, which the means over a window of even length hide from the
    next pair. So one falls due at once, and steps are shortened.
    """
    xp = call.xp
    if call.config.step_length != "clip":
        return xp.zeros_like(state.pending)
    usual = xp.sum(state.mean_square * state.size)
    return (usual > 0) & (xp.sum(grad_square) > DIVERGENCE * usual)


def is_check(config: Config, window: Array, state: State) -> Array:
    """Whether an accepted step that makes the window this long asks if a pair is due."""
    return (window % config.check_every == 0) & (state.prev_window > 0) & config.adaptive


def is_due(config: Config, window: Array, state: State) -> Array:
    """Whether an accepted step that makes the window this long takes a pair."""
    due = (window >= config.update_every) | state.pending
    if config.adaptive:  # the first window has nothing to be compared with: end it at its first check
        due = due | ((state.prev_window == 0) & (window >= config.check_every))
    return due


def _weights(call: Call, state: State, grads: Sequence[Array | None]) -> Weights:
    config, xp = call.config, call.xp
    increments: Array | int = 1
    steps, window = state.leaf_steps + 1, state.leaf_window + 1
    if any(grad is None for grad in grads):
        yes = xp.ones_like(state.step)
        increments = xp.stack([yes * 0 if grad is None else yes for grad in grads])
        # Of a leaf without a gradient, what is not used but must not be infinite.
        steps, window = (xp.maximum(n - 1 + increments, xp.ones_like(n)) for n in (steps, window))
    steps, window = xp.astype(steps, call.dtype), xp.astype(window, call.dtype)
    if config.beta is None:
        mean = 1.0 / window
    else:
        mean = xp.where(steps == 1.0, 1.0, xp.ones_like(steps) - config.beta)
    return Weights(increments, mean, mean_square_weight(config, steps) if config.uses_metric else mean)


def mean_square_weight(config: Config, steps: Array) -> Array:
    """Weight of the newest of so many squared gradients in their bias-corrected running mean."""
    return (1.0 - config.metric_beta) / (1.0 - config.metric_beta**steps)


def _follow_noise(call: Call, state: State, seen: Observation) -> State:
    """Update the variance of the gradient along each stored `s`, from second differences.

    ``(b_t - 2 b_{t-1} + b_{t-2})^2 / 6`` has the variance as its mean when the noise is independent
    from step to step and the drift linear; a first difference would count the drift as noise.
    """
    config, xp, keep = call.config, call.xp, seen.finite
    if not config.uses_noise:
        return state
    now = seen.rows[:, : config.history_size] / row_norms(state, xp)
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


def row_norms(state: State, xp: Any) -> Array:
    """(B, m): norms of the stored `s`, 1 where there is none."""
    m = state.row_age.shape[1]
    squares = xp.stack([state.gram[:, i, i] for i in range(m)], axis=1)
    return xp.sqrt(xp.where(squares > 0, squares, 1.0))


def _needed(params: Sequence[Array] | None) -> Sequence[Array]:
    if params is None:
        msg = "`params` must be given with step_length='clip', got None"
        raise ValueError(msg)
    return params
