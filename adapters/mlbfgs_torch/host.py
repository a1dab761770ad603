"""Kernels on PyTorch's leaves whose coefficients are NumPy arrays, in the same memory on a CPU.

A step works on some hundred numbers one after the other; NumPy spends a fraction of a microsecond on each
such operation, PyTorch several.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import torch
from torch import Tensor

import mlbfgs_core as core
from mlbfgs_core.kernels import Means, Metric, PairTile, Projection

from .kernels import TorchKernels

__all__ = ["HostKernels", "as_array", "as_tensor", "quiet", "reduced"]

Array = Any
_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def as_tensor(x: Any) -> Tensor:
    """A NumPy array or number as a tensor, in the same memory; a tensor as it is."""
    return x if isinstance(x, Tensor) else torch.from_numpy(np.asarray(x))


def as_number(x: Any, dtype: torch.dtype) -> Tensor:
    """A number or a flag as a tensor of a leaf's accumulation dtype."""
    return torch.from_numpy(np.asarray(x, _DTYPES[dtype]))


def as_array(x: Any) -> Array:
    """A tensor on the CPU as an array in the same memory; an array as it is."""
    return x.numpy() if isinstance(x, Tensor) else x


def quiet() -> AbstractContextManager[Any]:
    """No warning about a gradient that is not finite, and no exception in the middle of a step."""
    return nullcontext() if torch.compiler.is_compiling() else np.errstate(all="ignore")


def reduced(reduce: Callable[[Tensor], Tensor] | None) -> Callable[[Array], Array] | None:
    """A sum over processes for arrays."""
    return None if reduce is None else lambda values: as_array(reduce(as_tensor(values)))


class HostKernels(core.Kernels):
    """Those of a CPU's tensors, with NumPy's numbers going in and coming out.

    Parameters
    ----------
    leaves : TorchKernels
    """

    def __init__(self, leaves: TorchKernels) -> None:
        super().__init__(xp, leaves.tile)
        self.leaves = leaves

    def cast(self, x: Any, dtype: Any) -> Any:
        """A number in a leaf's dtype is a tensor, in that of coefficients an array."""
        if isinstance(dtype, torch.dtype):
            return as_number(x, dtype)
        return super().cast(as_array(x), dtype)

    def least(self, dtype: torch.dtype) -> float:
        """The smallest normal number of a leaf's dtype."""
        return self.leaves.least(dtype)

    def project(
        self,
        history: Tensor,
        grad: Tensor,
        mean_grad: Tensor | None,
        scatter_weight: Tensor,
        metric: Metric | None,
        dtype: torch.dtype,
    ) -> Projection:
        """Project a gradient on the stored rows."""
        *sums, root = self.leaves.project(history, grad, mean_grad, scatter_weight, metric, dtype)
        return Projection(*map(as_array, sums), root)

    def square(self, leaf: Tensor, dtype: torch.dtype) -> Array:
        """Sum of squares of a leaf's finite values."""
        return as_array(self.leaves.square(leaf, dtype))

    def update_means(
        self,
        mean_params: Tensor,
        mean_grads: Tensor,
        metric: Metric | None,
        param: Tensor,
        grad: Tensor,
        weight: Tensor,
        keep: Array,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Averages of parameter, gradient and squared gradient."""
        return self.leaves.update_means(
            mean_params, mean_grads, metric, param, grad, weight, as_number(keep, mean_params.dtype)
        )

    def pair_products(self, means: Means, metric: Metric | None, valid: Array) -> list[PairTile]:
        """Inner products of ``s`` and ``y``, tile by tile."""
        tiles = self.leaves.pair_products(means, metric, as_number(valid, means.params.dtype))
        return [PairTile(*map(as_array, tile)) for tile in tiles]

    def push(
        self,
        history: Tensor,
        slot: Array,
        means: Means,
        metric: Metric | None,
        valid: Array,
        inverse_norm: Tensor,
        damping: tuple[Tensor, Tensor],
        keep: Array,
        grad: Tensor | None,
    ) -> tuple[Tensor, Array]:
        """Store a pair and form its inner products."""
        history, sums = self.leaves.push(
            history,
            as_tensor(slot),
            means,
            metric,
            as_number(valid, means.params.dtype),
            inverse_norm,
            damping,
            as_number(keep, means.params.dtype),
            grad,
        )
        return history, as_array(sums)

    def rotate(self, means: Means, turn: Array, *, restart: bool) -> Means:
        """This window's averages become the previous ones."""
        return self.leaves.rotate(means, as_number(turn, means.params.dtype), restart=restart)

    def combine(
        self,
        history: Tensor,
        grad: Tensor,
        coefficients: Tensor,
        gamma: Tensor,
        metric: Metric | None,
        keep: Array,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Array | None]:
        """``gamma g + B^T c``."""
        kept = as_number(keep, dtype)
        update, square = self.leaves.combine(history, grad, coefficients, gamma, metric, kept, dtype)
        return update, as_array(square)
