"""The core's kernels on NumPy: in place where the host knows what is masked."""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy as xp
import numpy as np

import mlbfgs_core as core
from mlbfgs_core.adapter import StepEnd, part, square_roots

__all__ = ["NumpyKernels"]

Array = Any


class NumpyKernels(core.Kernels):
    """Kernels for leaves that are flat NumPy arrays."""

    def __init__(self) -> None:
        super().__init__(xp)
        # The C library returns free memory to the system, and to get it back page by page costs more than
        # the arithmetic. But it keeps up to twice the size of the largest array that it has seen freed.
        np.empty(16 * self.tile)

    def finite(self, x: Array) -> Array:
        """`x` with zeros for what is not finite; `x` itself if there is no such value."""
        finite = np.isfinite(x)
        return x if finite.all() else np.where(finite, x, 0.0)

    def masked(self, x: Array, keep: Array) -> Array:
        """`x`, or zeros."""
        return x if keep else np.zeros_like(x)

    def diagonal(
        self,
        v: Array,
        entering: tuple[Array, Array] | None,
        floor: Array,
        exponent: Any,
        out: Array | None = None,
    ) -> Array:
        """``(v + floor) ** -exponent`` of a mean of squares, in place."""
        roots = square_roots(exponent)
        if roots is None:
            return super().diagonal(v, entering, floor, exponent)
        if entering is None:
            x = np.add(v, floor, out=out)
        else:
            value, weight = entering
            x = np.multiply(value, value, out=out)
            x -= v
            x *= weight
            x += v
            x += floor
        for _ in range(roots):
            np.sqrt(x, out=x)
        return np.divide(1.0, x, out=x)

    def largest(self, x: Array) -> Array:
        """The largest magnitude, without an array of magnitudes."""
        return np.maximum(np.max(x), -np.min(x))

    def average(
        self, mean: Array, value: Array, weight: Array, keep: Array, *, squared: bool = False
    ) -> Array:
        """``M += weight * (x - M)``; squares are those of gradients, which are finite if they are kept."""
        for tile in self.tiles(mean) if keep else ():
            old, x = part(mean, tile), self.cast(part(value, tile), mean.dtype)
            change = (x * x if squared else self.finite(x)) - old
            change *= weight
            old += change
        return mean

    def combine(self, history: Array, z: Array, coefficients: Array, gamma: Array) -> Array:
        """``gamma z + B^T c``."""
        d = self.weighted(coefficients, self.rows(history, z.dtype), z)
        d += gamma * z
        return d

    def push(
        self, history: Array, slot: Array, pair: tuple[Array, Array], keep: Array, z: Array | None
    ) -> tuple[Array, Array]:
        """Store a pair, and form the inner products of the rows there."""
        place, m = int(slot[0]), history.shape[1]
        if keep:
            history[0, place], history[1, place] = pair
        rows = self.rows(history, pair[0].dtype)
        new = rows[place], rows[place + m]
        products = [self.times(rows, row) for row in new]
        products.append(
            np.zeros_like(products[0][:2]) if z is None else np.stack([self.dot(row, z) for row in new])
        )
        return history, np.concatenate(products)

    def rotate(self, now: Array, before: Array, turn: Array, *, restart: bool) -> tuple[Array, Array]:
        """This window's average becomes the previous one."""
        for tile in self.tiles(now) if turn else ():
            own = part(now, tile)
            self.store(before, tile, own)
            if restart:
                own.fill(0.0)
        return now, before

    def apply(
        self, param: Array, update: Array, buffer: Array | None, end: StepEnd, keep: Array
    ) -> tuple[Array, Array | None]:
        """The end of a step."""
        decay, dtype = 1.0 - end.lr * end.weight_decay, update.dtype
        for tile in self.tiles(update) if keep else ():
            change, value = part(update, tile), self.cast(part(param, tile), dtype)
            change *= end.length
            if buffer is not None:
                carried = part(buffer, tile)
                carried *= end.momentum
                carried += change
                if end.nesterov:
                    change += end.momentum * carried
                else:
                    change[...] = carried
            change *= end.lr
            if decay != 1:
                np.multiply(value, decay, out=value, where=True if decay > 0 else np.isfinite(value))
            value -= change
            if value.dtype != param.dtype:  # rounded once
                self.store(param, tile, value)
        return param, buffer
