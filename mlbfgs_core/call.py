"""What one call of a verb of `Method` works with: settings, partition, kernels and reduction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .blocks import Blocks
from .config import Config
from .kernels import Kernels, Leaf, Means
from .preconditioner import FactorSums, Preconditioner, Root, preconditioner_of
from .state import State, accumulation_dtype

__all__ = ["Call", "Reduce", "When", "identity", "remembered", "run_if", "stack"]

Array = Any
Reduce = Callable[[Array], Array]
"""Sums an array of coefficients over all shards."""
When = bool | Callable[[Array, Callable[[Any], Any], Any], Any] | None
"""What decides whether a masked part runs. None: it always runs, and its results are masked. A bool:
the host knows. A function ``(predicate, part, operand) -> result``, such as a wrapper of
``jax.lax.cond``: it decides on the device."""

MEAN_SQUARE_FLOOR = 1e-16
"""What is added to mean squares in a preconditioner, in units of their mean over a block."""


class Call(NamedTuple):
    """The bundle that the parts of a step hand to one another."""

    config: Config
    blocks: Blocks
    kernels: Kernels
    reduce: Reduce
    shares: Sequence[float] | None
    xp: Any
    dtype: Any
    """The dtype of coefficients."""
    factor_sums: Sequence[FactorSums | None] | None = None

    def scalar(self, value: Array, dtype: Any) -> Array:
        """A coefficient as the kernels take it, in a leaf's dtype."""
        return self.kernels.to_leaf(value, dtype)

    @property
    def is_whole(self) -> bool:
        """Whether there are no other shards."""
        return self.reduce is identity

    @property
    def preconditioner(self) -> Preconditioner:
        """The one that the settings ask for."""
        return preconditioner_of(self.config)

    def device(self, state: State) -> Any:
        """The state's device, traced or not."""
        return self.kernels.device(state.gamma)

    def dtypes(self, leaves: Sequence[Array | None]) -> list[Any]:
        """The dtype of each leaf's averages and inner products; None for one that is None."""
        xp = self.kernels.leaf_xp
        return [None if leaf is None else getattr(xp, accumulation_dtype(leaf)) for leaf in leaves]

    def sums_of(self, leaf: int) -> FactorSums:
        """What adds up a leaf's factors over shards."""
        return (None if self.factor_sums is None else self.factor_sums[leaf]) or (None, None)

    def leaf(
        self, state: State, number: int, dtype: Any, root: Root, *, when_rows: bool | None = None
    ) -> Leaf:
        """What is remembered of a leaf; without its history if that is known to say nothing."""
        if not state.history:
            return Leaf(number, dtype, None, None, root)
        means = Means(
            state.mean_params[number],
            state.mean_grads[number],
            state.prev_params[number],
            state.prev_grads[number],
        )
        return Leaf(number, dtype, None if when_rows is False else state.history[number], means, root)

    def roots(self, state: State, dtypes: Sequence[Any], weights: Array | None = None) -> list[Any]:
        """`R` of each leaf whose dtype is given; with `weights` (P,), gradients are still to be added."""
        preconditioner, kernels = self.preconditioner, self.kernels
        floors = state.mean_square * MEAN_SQUARE_FLOOR
        roots: list[Root | None] = [None] * len(dtypes)
        for number, block in enumerate(self.blocks):
            floor: dict[Any, Array] = {}
            for leaf in block:
                dtype = dtypes[leaf]
                if dtype is None:
                    continue
                arrays = {name: own[leaf] for name, own in state.preconditioner.items()}
                if not arrays:
                    roots[leaf] = preconditioner.root(self.config, arrays, dtype, None, None)
                    continue
                weight = None if weights is None else self.scalar(kernels.of_leaf(weights, leaf), dtype)
                if dtype not in floor:
                    least = kernels.leaf_xp.finfo(dtype).smallest_normal
                    floor[dtype] = self.scalar(floors[number], dtype) + least
                roots[leaf] = preconditioner.root(self.config, arrays, dtype, weight, floor[dtype])
        return roots

    def shared(self, part: Array, leaf: int) -> Array:
        """This shard's part of a leaf's inner products; NaN and infinity remain visible with a share of 0."""
        if self.shares is None or self.shares[leaf] == 1.0:
            return part
        return part * self.shares[leaf]

    def block_sums(self, parts: Sequence[Array | None]) -> Array:
        """The sum of each block's parts, of shape (K,) or (), as (B, K) or (B,); None adds nothing."""
        convert, dtype = self.kernels.to_coefficients, self.dtype
        like = convert(next(part for part in parts if part is not None), dtype)
        sums = []
        for block in self.blocks:
            total = None
            for leaf in block:
                if parts[leaf] is not None:
                    part = convert(self.shared(parts[leaf], leaf), dtype)
                    total = part if total is None else total + part
            sums.append(self.xp.zeros_like(like) if total is None else total)
        return stack(sums, self.xp)


def remembered(state: State, roots: Sequence[Root | None]) -> dict[str, tuple[Array | None, ...]]:
    """A state's `preconditioner` with what these roots hold; a leaf without a root keeps what it has."""
    return {
        name: tuple(
            old if root is None else root.arrays.get(name) for root, old in zip(roots, arrays, strict=True)
        )
        for name, arrays in state.preconditioner.items()
    }


def stack(parts: Sequence[Array], xp: Any) -> Array:
    """Stack along a new first axis; cheaper than `xp.stack` for numbers and for a single part."""
    rows = [part[None, ...] for part in parts]
    return rows[0] if len(rows) == 1 else xp.concat(rows)


def run_if(when: When, predicate: Array, part: Callable[[Any], Any], operand: Any) -> Any:
    """Run a masked part as `when` says; else return the operand."""
    if when is None or when is True:
        return part(operand)
    if when is False:
        return operand
    return when(predicate, part, operand)


def identity(array: Array) -> Array:
    """The sum over the only shard."""
    return array
