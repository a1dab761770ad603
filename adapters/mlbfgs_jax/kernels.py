"""The core's kernels in JAX: sharded axes are not reshaped, and products say how they are sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mlbfgs_core as core

__all__ = ["JaxKernels"]

Array = jax.Array
_LARGE = 2**14
"""From this many values on, a matrix product is worth its compilation, which takes longer than a sum's."""


class JaxKernels(core.Kernels):
    """Kernels for whole leaves of any shape and sharding, at full precision on every device."""

    def __init__(self) -> None:
        super().__init__(jnp)

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

    def dot(self, a: Array, b: Array) -> Array:
        """Inner product."""
        return _contract(a, b, b.ndim, 0) if b.size >= _LARGE else jnp.sum(a * b)

    def square(self, leaf: Array, dtype: Any, factor: float = 1.0) -> Array:
        """Sum of squares of a multiple. XLA would square the factor separately, which overflows."""
        x = self.finite(leaf.astype(dtype))
        x = x if factor == 1.0 else lax.optimization_barrier(x * factor)
        return self.dot(x, x)

    def times(self, rows: Array, x: Array) -> Array:
        """Inner products of rows of any dtype with a leaf."""
        if rows.dtype == x.dtype and x.size >= _LARGE:
            return _contract(rows, x, x.ndim, 1)
        # A sum reads rows of another dtype as they are stored; a product would convert all of them
        # beforehand. Both factors have the same number of axes, since JAX may be told to refuse others.
        return jnp.sum(rows.astype(x.dtype) * x[None, ...], axis=tuple(range(1, rows.ndim)))

    def weighted(self, coefficients: Array, rows: Array, like: Array) -> Array:
        """Sum of weighted rows."""
        if rows.dtype == coefficients.dtype:
            return lax.dot_general(
                coefficients, rows, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST
            )
        return sum(coefficients[i] * rows[i].astype(coefficients.dtype) for i in range(rows.shape[0]))

    def push(
        self, history: Array, slot: Array, pair: tuple[Array, Array], keep: Array, z: Array | None
    ) -> tuple[Array, Array]:
        """Store a pair and form its inner products with the history as it was before: to read the history
        after writing to it, XLA would copy it."""
        m, dtype = history.shape[1], pair[0].dtype
        old = lax.dynamic_index_in_dim(history, slot[0], axis=1, keepdims=False)
        new = jnp.where(keep, jnp.stack(pair).astype(history.dtype), old)
        stored = new.astype(dtype)
        rows, own = self.rows(history, dtype), jnp.arange(m) == slot[0]
        parts = []
        for i in (0, 1):
            products = jnp.where(
                own, self.times(stored, stored[i])[:, None], self.times(rows, stored[i]).reshape(2, m)
            )
            parts.append(products.reshape(-1))
        parts.append(jnp.zeros(2, dtype) if z is None else self.times(stored, z))
        sums = jnp.concatenate(parts)
        new = jnp.where(self.after(keep, sums), new, old)
        return lax.dynamic_update_index_in_dim(history, new, slot[0], axis=1), sums


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
