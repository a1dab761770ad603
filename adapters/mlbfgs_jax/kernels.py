"""The core's kernels in JAX: sharded axes are not reshaped, and products say how they are sharded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mlbfgs_core as core
from mlbfgs_core import adapter

from .decisions import decide
from .packing import Parts, Plan, may_be_sharded

__all__ = ["JaxKernels"]

Array = jax.Array


class JaxKernels(core.Kernels):
    """Kernels for whole leaves of any shape and sharding, at full precision on every device.

    Parameters
    ----------
    plan : Plan, optional
        Which leaves the parameters make; by default each is a leaf.
    present : sequence of bool
        Whether each parameter has a gradient; by default as the leaves.
    """

    def __init__(self, plan: Plan | None = None, present: Sequence[bool] | None = None) -> None:
        super().__init__(jnp)
        self._plan = plan
        packs = () if plan is None else plan.packs
        self._packs = {leaf: pack for leaf, pack in enumerate(packs) if pack is not None}
        self._present = present

    def of_leaf(self, values: Array, leaf: int) -> Array:
        """A leaf's number, 0-d; of a pack a number per value."""
        if (pack := self._packs.get(leaf)) is not None:
            return pack.spread(values)
        # Leaves are in the order of blocks and packs, parameters in that of the tree.
        return values[leaf if self._plan is None else self._plan.groups[leaf][0]]

    def present(self, grads: Sequence[Array | None]) -> list[bool]:
        """Whether each parameter has a gradient."""
        return super().present(grads) if self._present is None else list(self._present)

    def moving(self, leaf: int, grad: Array) -> int:
        """The number of a leaf's values that have a gradient."""
        pack = self._packs.get(leaf)
        if pack is None:
            return super().moving(leaf, grad)
        return sum(
            math.prod(shape) * self.present([])[i] for i, shape in zip(pack.members, pack.shapes, strict=True)
        )

    def cast(self, x: Any, dtype: Any) -> Array:
        """`x` in a dtype."""
        return x.join(dtype) if isinstance(x, Parts) else super().cast(x, dtype)

    def device(self, x: Any) -> Any:
        """The place of coefficients that belong to an array: all devices of its mesh, or its own device."""
        if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer) or not x.committed:
            return None
        if isinstance(x.sharding, NamedSharding):
            return NamedSharding(x.sharding.mesh, PartitionSpec())
        return x.sharding

    def zeros(self, leaf: Any, leading: tuple[int, ...], dtype: Any) -> Array:
        """Zeros that are sharded like the leaf."""
        zeros = jnp.zeros_like(leaf, dtype=dtype)
        if isinstance(leaf, jax.core.Tracer):
            # In a compiled `init` only what depends on the leaf is sharded like it.
            zeros = jnp.where(jnp.isnan(leaf), jnp.zeros((), dtype), zeros)
        return jnp.broadcast_to(zeros, (*leading, *leaf.shape))

    @staticmethod
    def repeat(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
        """A loop that is compiled once, and can be differentiated."""
        return lax.fori_loop(0, count, body, carry)

    def after(self, flag: Array, sums: Array) -> Array:
        """`flag`, which to XLA seems to depend on `sums`. So the write that it guards comes after all reads;
        otherwise XLA would copy the array that is written to."""
        total = jnp.sum(sums)
        return flag & ((total <= jnp.inf) | jnp.isnan(total))

    def scratch(self, number: int, leaf: Any, dtype: Any) -> None:
        """Nothing: no array can be written to."""

    def rows(self, history: Array, dtype: Any) -> Array:
        """The 2m rows of a history, each of the leaf's shape, in the history's own dtype."""
        return history.reshape(2 * history.shape[1], *history.shape[2:])

    def matmul(self, a: Array, b: Array) -> Array:
        """Products of stacks of matrices, at full precision on every device."""
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

    def dot(self, a: Array, b: Array) -> Array:
        """Inner product."""
        a, b = _flat(a), _flat(b)
        return _contract(a, b, b.ndim, 0)

    def weighted_square(self, leaf: int, x: Array, weight: Array) -> Array:
        """Sum of squares with a weight as `of_leaf` gives it; row by row, so that weights need no memory."""
        pack = self._packs.get(leaf)
        if pack is None:
            return self.dot(x, x) * weight
        rows = pack.by_row(x)
        return jnp.sum(jnp.sum(rows * rows, axis=-1) * pack.by_row(weight)[:, 0])

    def mean_square(self, leaf: adapter.Leaf, weight: Array) -> Array:
        """As `Kernels.mean_square`, with a weight for each parameter of a pack."""
        z = leaf.root.at(self, None).whiten(leaf.means.grads)
        return self.weighted_square(leaf.number, z, weight)

    def square(self, leaf: Array, dtype: Any, factor: float = 1.0) -> Array:
        """Sum of squares of a multiple, of the parameters that have a gradient. XLA would square the factor
        separately, which overflows."""
        if isinstance(leaf, Parts) and self._present is not None:
            leaf = leaf.only(self._present)
        x = self.finite(self.cast(leaf, dtype))
        x = x if factor == 1.0 else lax.optimization_barrier(x * factor)
        return self.dot(x, x)

    def times(self, rows: Array, x: Array) -> Array:
        """Inner products of rows of any dtype with a leaf."""
        rows, x = _flat(rows, 1), _flat(x)
        if rows.dtype == x.dtype:
            return _contract(rows, x, x.ndim, 1)
        # A sum reads rows of another dtype as they are stored; a product would convert all of them
        # beforehand. Both factors have the same number of axes, since JAX may be told to refuse others.
        return jnp.sum(rows.astype(x.dtype) * x[None, ...], axis=tuple(range(1, rows.ndim)))

    def weighted(self, coefficients: Array, rows: Array, like: Array) -> Array:
        """Sum of weighted rows."""
        if rows.dtype == coefficients.dtype:
            total = lax.dot_general(
                coefficients, _flat(rows, 1), (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST
            )
            return total.reshape(like.shape) if total.ndim != like.ndim else total
        return sum(coefficients[i] * rows[i].astype(coefficients.dtype) for i in range(rows.shape[0]))

    # Passes over a leaf. Memory that XLA takes anew in every step costs more time than arithmetic: so what is
    # cheap is formed again wherever it is needed, and reductions contain no factor that XLA would have to
    # spread out first.

    def whiten(
        self, leaf: adapter.Leaf, grad: Array, mean: Array | None, scatter_weight: Array
    ) -> tuple[Any, list[Array]]:
        """As `Kernels.whiten`; where `R` scales values, all sums come from ``z = R g`` and these scales."""
        g = self.cast(grad, leaf.dtype)
        root = leaf.root.at(self, None, g)
        kept, z = root.kept, root.white(g)
        scales = kept is not None and leaf.root.elementwise
        sums = [] if leaf.history is None else [self.project(leaf.history, z)]
        own = z / kept if scales else g
        sums += [self.dot(z, z)] if z is g else [self.dot(own, own), self.dot(z, z)]
        if mean is not None:
            off = z - mean * kept if scales else root.whiten(g - mean)
            sums.append(self.weighted_square(leaf.number, off, scatter_weight))
        return leaf.root if kept is None else leaf.root.keeping(kept), sums

    def direct(
        self, leaf: adapter.Leaf, grad: Array, weights: tuple[Array, Array], keep: Array
    ) -> tuple[Array, Array]:
        """As `Kernels.direct`; `z` is formed again, so that its memory is free meanwhile."""
        root = leaf.root if leaf.root.kept is None else leaf.root.keeping(_again(leaf.root.kept))
        if (pack := self._packs.get(leaf.number)) is not None and not all(self.present([])):
            keep = keep & pack.spread(jnp.asarray(self.present([])))
        return super().direct(leaf._replace(root=root), grad, weights, keep)

    def next_products(self, leaf: adapter.Leaf, valid: Array) -> list[adapter.PairTile]:
        """As `Kernels.next_products`; scaled and masked only where that matters, if the leaf is not sharded,
        so that all devices decide the same."""
        if may_be_sharded(leaf.means.params):
            return super().next_products(leaf, valid)

        means, pack = leaf.means, self._packs.get(leaf.number)
        s, y = self.pair(leaf, None, jnp.ones((), bool))
        # s'.y' is s.y; and turned around, so that XLA does not form the differences in memory for both.
        sy = self.dot(means.prev_params - means.params, means.prev_grads - means.grads)
        one = jnp.ones((), leaf.dtype)
        plain = adapter.PairTile(one, one, self.dot(s, s), sy, self.dot(y, y))
        rows = valid if pack is None else pack.by_row(valid)[:, 0]
        usual = jnp.all(rows) & _in_range(plain.ss) & _in_range(plain.yy)

        def scaled(plain: adapter.PairTile) -> adapter.PairTile:
            mask = rows if pack is None else pack.filled(rows)
            products = self.pair_products(*self.pair(leaf, None, mask))
            return adapter.PairTile(*map(partial(jnp.where, usual), plain, products))

        return [decide(~usual, scaled, plain)]

    def average(
        self, mean: Array, value: Array, weight: Array, keep: Array, *, squared: bool = False
    ) -> Array:
        """As `Kernels.average`; a weight of 1 replaces what the mean was, which `rotate` leaves as it is."""
        # Packed as late as possible, when the memory of other results is free again.
        x = value.join(mean.dtype, keep) if isinstance(value, Parts) else self.cast(value, mean.dtype)
        x = x * x if squared else self.finite(x)
        return jnp.where(keep, jnp.where(weight == 1.0, x, mean + weight * (x - mean)), mean)

    def rotate(self, now: Array, before: Array, turn: Array, *, restart: bool) -> tuple[Array, Array]:
        """As `Kernels.rotate`, except that an average which starts again keeps its values until then: to set
        them to zero, XLA would copy them in every step that does not."""
        return now, jnp.where(turn, now, before)

    def push(
        self, history: Array, slot: Array, pair: tuple[Array, Array], keep: Array, z: Array | None
    ) -> tuple[Array, Array]:
        """Store a pair and form its inner products with the history as it was before: to read the history
        after writing to it, XLA would copy it."""
        m, dtype = history.shape[1], pair[0].dtype
        new = [_again(member.astype(history.dtype)) for member in pair]
        s, y = (member.astype(dtype) for member in new)
        rows, own = self.rows(history, dtype), jnp.arange(m) == slot[0]
        sy = self.dot(s, y)
        parts = []
        for member, products in ((s, (self.dot(s, s), sy)), (y, (sy, self.dot(y, y)))):
            old = self.times(rows, member).reshape(2, m)
            parts.append(jnp.where(own, jnp.stack(products)[:, None], old).reshape(-1))
        along = jnp.zeros(2, dtype) if z is None else jnp.stack([self.dot(s, z), self.dot(y, z)])
        sums = jnp.concatenate([*parts, along])
        keep = self.after(keep, sums)
        for i, member in enumerate(new):
            start = (i, slot[0], *(0,) * s.ndim)
            old = lax.dynamic_slice(history, start, (1, 1, *s.shape))
            history = lax.dynamic_update_slice(history, jnp.where(keep, member[None, None], old), start)
        return history, sums


def _again(x: Any) -> Any:
    """The same array, from which XLA forms results that it does not share with others."""
    return lax.optimization_barrier(x)


def _in_range(square: Array) -> Array:
    """Whether a sum of squares has neither lost a part that counts nor come near the largest number."""
    limits = jnp.finfo(square.dtype)
    return (square > limits.tiny / limits.eps**2) & (square < limits.max * limits.eps**2)


def _flat(x: Array, lead: int = 0) -> Array:
    """The array with one axis after the leading ones, if it is not sharded."""
    return x if x.ndim == lead + 1 or may_be_sharded(x) else x.reshape((*x.shape[:lead], -1))


def _contract(a: Array, b: Array, count: int, first: int) -> Array:
    """Sum of products over `count` axes, in `a` from `first` on, at full precision on every device; the
    result is not sharded."""
    axes = tuple(range(count))
    mesh = jax.typeof(b).sharding.mesh
    return lax.dot_general(
        a,
        b,
        ((tuple(axis + first for axis in axes), axes), ((), ())),
        precision=lax.Precision.HIGHEST,
        out_sharding=NamedSharding(mesh, PartitionSpec()) if AxisType.Explicit in mesh.axis_types else None,
    )
