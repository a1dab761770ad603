"""What one call of a verb works with: settings, partition, kernels and reduction, checked once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from .blocks import Blocks, one_block, validate_blocks
from .config import Config
from .kernels import Kernels, Means, Metric
from .state import LEAF_DTYPES, State, accumulation_dtype, dtype_name

__all__ = ["Call", "Reduce", "When", "prepare", "run_if", "stack"]

Array = Any
Reduce = Callable[[Array], Array]
"""Sums an array of coefficients over all shards."""
When = bool | Callable[[Array, Callable[[Any], Any], Any], Any] | None
"""Who decides whether a masked part runs. None: it always runs, and its results are masked. A bool:
the host knows. A function ``(predicate, part, operand) -> result``, such as a wrapper of
``jax.lax.cond``: it decides on the device."""

MEAN_SQUARE_FLOOR = 1e-16
"""The metric's floor, in units of the mean of the running squares."""


class Call(NamedTuple):
    """The bundle that the verbs hand to one another."""

    config: Config
    blocks: Blocks
    kernels: Kernels
    reduce: Reduce
    shares: Sequence[float] | None
    xp: Any
    dtype: Any

    def scalar(self, value: Array, leaf: Array) -> Array:
        """A coefficient in the accumulation dtype of a leaf's average."""
        return self.kernels.cast(value, leaf.dtype)

    @property
    def is_whole(self) -> bool:
        """Whether there are no other shards."""
        return self.reduce is _identity

    def device(self, state: State) -> Any:
        """The state's device, traced or not."""
        return self.kernels.device(state.gamma)

    def means(self, state: State, leaf: int) -> Means:
        """The averages of one leaf."""
        return Means(
            state.mean_params[leaf], state.mean_grads[leaf], state.prev_params[leaf], state.prev_grads[leaf]
        )

    def metrics(self, state: State, weights: Array | None = None) -> list[Metric | None]:
        """The metric of each leaf; `weights` (L,) are those with which a gradient is to enter."""
        if not self.config.uses_metric:
            return [None] * len(state.history)
        floors = state.mean_square * MEAN_SQUARE_FLOOR
        result: list[Metric | None] = [None] * len(state.history)
        for number, block in enumerate(self.blocks):
            for leaf in block:
                moment = state.moment[leaf]
                weight = None if weights is None else self.scalar(weights[leaf], moment)
                result[leaf] = Metric(
                    moment,
                    weight,
                    self.scalar(floors[number], moment) + self.kernels.least(moment.dtype),
                    self.config.metric_power,
                )
        return result

    def valid(self, state: State, leaf: int) -> Array:
        """0-d bool: whether a leaf has been observed in this window and in the previous one."""
        return self.kernels.to_leaves((state.leaf_window[leaf] > 0) & (state.leaf_prev_window[leaf] > 0))

    def shared(self, part: Array, leaf: int) -> Array:
        """What this shard adds of a leaf's inner products; a share of 0 keeps what is not finite."""
        if self.shares is None or self.shares[leaf] == 1.0:
            return part
        return part * self.shares[leaf]

    def block_sums(self, parts: Sequence[Array | None]) -> Array:
        """Sum each block's parts (None: nothing) of shape (K,) or (): (B, K) or (B,)."""
        like = self.kernels.cast(next(part for part in parts if part is not None), self.dtype)
        sums = []
        for block in self.blocks:
            total = None
            for leaf in block:
                if parts[leaf] is not None:
                    part = self.kernels.cast(self.shared(parts[leaf], leaf), self.dtype)
                    total = part if total is None else total + part
            sums.append(self.xp.zeros_like(like) if total is None else total)
        return stack(sums, self.xp)


def prepare(
    config: Config,
    state: State,
    blocks: Blocks | None,
    kernels: Kernels | None,
    reduce: Reduce | None,
    shares: Sequence[float] | None = None,
    **leaves: Sequence[Array | None] | None,
) -> Call:
    """Check the arguments of a verb and bundle them.

    Raises
    ------
    ValueError
        A number of leaves or of shares, a shape or a partition that does not match the state, or no
        gradient at all.
    TypeError
        A gradient whose dtype is neither its parameter's nor that of its averages.
    """
    count = len(state.history)
    if blocks is None:
        blocks = one_block(count)
    else:
        validate_blocks(blocks, count)
    if len(blocks) != state.gamma.shape[0]:
        msg = f"`blocks` must be the state's {state.gamma.shape[0]} blocks, got {len(blocks)}"
        raise ValueError(msg)
    if shares is not None and len(shares) != count:
        msg = f"`shares` must hold a number for each of {count} leaves, got {len(shares)}"
        raise ValueError(msg)
    for name, arrays in leaves.items():
        if arrays is not None:
            _check_leaves(name, arrays, state)
    params, grads = leaves.get("params"), leaves.get("grads")
    if grads is not None and all(grad is None for grad in grads):
        msg = "`grads` must hold at least one array, got only None"
        raise ValueError(msg)
    for index, (param, grad) in enumerate(zip(params or (), grads or (), strict=False)):
        own, wider = dtype_name(param), accumulation_dtype(param)
        if grad is None or dtype_name(grad) in (own, wider):
            continue
        rule = f"must have the parameter's dtype {own}"
        rule += "" if wider == own else f" or {wider}"
        msg = f"`grads`[{index}] {rule}, got {dtype_name(grad)}"
        raise TypeError(msg)
    xp = kernels.xp if kernels is not None else array_namespace(state.gamma)
    return Call(config, blocks, kernels or Kernels(xp), reduce or _identity, shares, xp, state.gamma.dtype)


def stack(parts: Sequence[Array], xp: Any) -> Array:
    """Along a new first axis; cheaper than `xp.stack` for numbers and for a single part."""
    rows = [part[None, ...] for part in parts]
    return rows[0] if len(rows) == 1 else xp.concat(rows)


def run_if(when: When, predicate: Array, part: Callable[[Any], Any], operand: Any) -> Any:
    """Run a masked part as `when` says; else return the operand."""
    if when is None or when is True:
        return part(operand)
    if when is False:
        return operand
    return when(predicate, part, operand)


def _check_leaves(name: str, arrays: Sequence[Array | None], state: State) -> None:
    if len(arrays) != len(state.history):
        msg = f"`{name}` must hold {len(state.history)} leaves, got {len(arrays)}"
        raise ValueError(msg)
    for index, (array, history) in enumerate(zip(arrays, state.history, strict=True)):
        if array is None:
            if name == "params":
                msg = f"`params`[{index}] must be an array, got None"
                raise TypeError(msg)
            continue
        if tuple(array.shape) != tuple(history.shape[2:]):
            msg = (
                f"`{name}`[{index}] must have the shape {tuple(history.shape[2:])}, got {tuple(array.shape)}"
            )
            raise ValueError(msg)
        if dtype_name(array) not in LEAF_DTYPES:
            msg = f"`{name}`[{index}] must be of a real floating-point dtype, got {array.dtype}"
            raise TypeError(msg)


def _identity(array: Array) -> Array:
    return array
