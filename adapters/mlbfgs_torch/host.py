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

from .kernels import TorchKernels

__all__ = ["HostKernels", "as_array", "as_tensor", "quiet", "reduced"]

Array = Any
_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def as_tensor(x: Any) -> Tensor:
    """A NumPy array or number as a tensor, in the same memory; a tensor as it is."""
    return x if isinstance(x, Tensor) else torch.from_numpy(np.asarray(x))


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
        self.least, self.peak, self.scaled = leaves.least, leaves.peak, leaves.scaled
        self.project, self.square = leaves.project, leaves.square
        self.update_means, self.pair_products = leaves.update_means, leaves.pair_products
        self.push, self.rotate, self.combine = leaves.push, leaves.rotate, leaves.combine

    def cast(self, x: Any, dtype: Any) -> Any:
        """A number in a leaf's dtype is a tensor, in that of coefficients an array."""
        if isinstance(dtype, torch.dtype):
            return torch.from_numpy(np.asarray(x, _DTYPES[dtype]))
        return super().cast(as_array(x), dtype)

    def to_leaves(self, x: Array) -> Tensor:
        """A flag or an index as a tensor."""
        return as_tensor(x)
