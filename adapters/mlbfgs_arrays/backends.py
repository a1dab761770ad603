"""Where arrays lie: NumPy's on the host, CuPy's on a device, each with kernels and a way to decide what a
step does. CuPy is imported only if arrays of it are given."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import array_api_compat.numpy
import numpy as np
from array_api_compat import is_cupy_array

from .kernels import NumpyKernels

__all__ = ["Backend", "Cuda", "Host", "as_numpy", "backend_of"]

Array = Any


def as_numpy(array: Array) -> Array:
    """An array of either library as one of NumPy; a NumPy array itself."""
    return array.get() if is_cupy_array(array) else np.asarray(array)


class Host:
    """NumPy arrays."""

    xp = array_api_compat.numpy
    small = 2**16
    """Parameters of at most this many values are laid side by side."""

    def __init__(self) -> None:
        self.kernels = NumpyKernels()

    def __str__(self) -> str:
        return "the host"

    def on(self) -> AbstractContextManager[Any]:
        """Suppress warnings about gradients that are not finite, and exceptions in the middle of a step."""
        return np.errstate(all="ignore")

    def asarray(self, array: Array) -> Array:
        """An array of either library as one of NumPy."""
        return as_numpy(array)

    def rate(self, lr: Any, dtype: Any) -> Any:
        """A learning rate as `Kernels.apply` takes it."""
        return float(lr)

    def flags(self, count: int) -> HostFlags:
        """A new memory of this many flags."""
        return HostFlags()


class Cuda:
    """CuPy arrays on one device."""

    small = 2**23
    """The same limit as in `Host`, larger on a GPU."""

    def __init__(self, number: int) -> None:
        import array_api_compat.cupy
        import cupy

        from .cuda import CupyKernels

        self.xp = array_api_compat.cupy
        self.number = number
        self.kernels = CupyKernels(self.xp, cupy.ElementwiseKernel)
        self._cupy = cupy

    def __str__(self) -> str:
        return f"cuda:{self.number}"

    def on(self) -> AbstractContextManager[Any]:
        """Work on the device, on its current stream."""
        return self._cupy.cuda.Device(self.number)

    def asarray(self, array: Array) -> Array:
        """An array of either library on this device."""
        return self._cupy.asarray(array)

    def rate(self, lr: Any, dtype: Any) -> Any:
        """A learning rate as `Kernels.apply` takes it; only one that lies elsewhere is read."""
        if is_cupy_array(lr) and lr.device.id == self.number:
            return lr.reshape(()).astype(dtype, copy=False)
        return float(lr)

    def flags(self, count: int) -> CudaFlags:
        """A new memory of this many flags."""
        return CudaFlags(count)


Backend = Host | Cuda


class HostFlags:
    """Flags that a state has given, already on the host."""

    at_once = True
    """Whether they are known without waiting for them."""

    def send(self, flags: Array) -> None:
        """Remember it."""
        self._flags = flags

    def read(self) -> list[bool]:
        """What was sent."""
        return list(map(bool, self._flags))


class CudaFlags:
    """Flags that a state has given, copied from the device without waiting for it."""

    at_once = False

    def __init__(self, count: int) -> None:
        import cupy
        import cupyx

        self._host = cupyx.empty_pinned(count, dtype=bool)
        self._event = cupy.cuda.Event(disable_timing=True)
        # The memory must not be reused while a copy to it is under way.
        weakref.finalize(self, self._event.synchronize)

    def send(self, flags: Array) -> None:
        """Start copying."""
        flags.get(out=self._host, blocking=False)
        self._event.record()

    def read(self) -> list[bool]:
        """What was sent one step ago."""
        self._event.synchronize()
        return list(map(bool, self._host))


def backend_of(array: Array) -> Backend:
    """Where an array of NumPy or CuPy lies; the same object for the same place."""
    return _cuda(array.device.id) if is_cupy_array(array) else _host()


@lru_cache
def _host() -> Host:
    return Host()


@lru_cache
def _cuda(number: int) -> Cuda:
    return Cuda(number)
