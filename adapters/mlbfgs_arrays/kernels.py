"""The core's kernels on NumPy: in place where the host knows what is masked."""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy as xp
import numpy as np

import mlbfgs_core as core
from mlbfgs_core.kernels import Means, Metric

__all__ = ["NumpyKernels"]

Array = Any


class NumpyKernels(core.Kernels):
    """Kernels for leaves that are flat NumPy arrays."""

    def __init__(self) -> None:
        super().__init__(xp)

    def finite(self, x: Array) -> Array:
        """`x` with zeros for what is not finite; itself where there is no such value."""
        finite = np.isfinite(x)
        return x if finite.all() else np.where(finite, x, 0.0)

    def lerp(self, start: Array, end: Array, weight: Array) -> Array:
        """``start + weight * (end - start)``."""
        change = end - start
        change *= weight
        change += start
        return change

    def blend(self, array: Array, tile: Any, value: Array, weight: Array, keep: Array) -> Array:
        """`array` moved by `weight` towards a value at the tile where `keep`."""
        if keep:
            change = value - array[tile]
            change *= weight
            array[tile] += change
        return array

    def pair(self, means: Means, metric: Metric | None, tile: Any, valid: Array) -> tuple[Array, Array]:
        """A tile of ``s`` and ``y``."""
        s = means.params[tile] - means.prev_params[tile]
        y = means.grads[tile] - means.prev_grads[tile]
        if metric is not None:
            root = metric.inverse_root(self, tile)
            s /= root
            y *= root
        return (s, y) if valid else (np.zeros_like(s), np.zeros_like(y))

    def descend(
        self,
        param: Array,
        update: Array,
        length: Array,
        buffer: Array | None,
        lr: float,
        momentum: float,
        weight_decay: float,
        keep: Array,
        *,
        nesterov: bool,
    ) -> None:
        """Momentum, weight decay and learning rate where `keep`; writes to the parameter and the buffer,
        consumes the update. Moves 5 values."""
        if not keep:
            return
        decay, dtype = 1 - lr * weight_decay, update.dtype
        for tile in self.tiles(update):
            change = update[tile]
            change *= length
            if buffer is not None:
                buffer[tile] *= momentum
                buffer[tile] += change
                if nesterov:
                    change += momentum * buffer[tile]
                else:
                    change[...] = buffer[tile]
            change *= lr
            value = self.cast(param[tile], dtype)  # rounded once, at the end
            if decay != 1:
                value *= decay
            value -= change
            if value.dtype != param.dtype:
                param[tile] = value
