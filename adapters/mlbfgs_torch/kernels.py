"""The core's kernels on flat PyTorch tensors: with the same meaning, in fewer and faster operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import array_api_compat.numpy
import array_api_compat.torch as xp
import numpy as np
import torch
from array_api_compat import device as array_device
from torch import Tensor

import mlbfgs_core as core
from mlbfgs_core.adapter import Leaf, PairTile, StepEnd, part, square_roots

__all__ = ["HostKernels", "TorchKernels", "as_array", "as_tensor", "quiet", "reduced"]

# Values handled at a time: a few such tensors fit the caches of a CPU; a GPU wants whole leaves.
_TILE = {"cpu": 2**19}
_DEVICE_TILE = 2**26
# A product with a tile's rows is a batch of products with parts of this many values: on a CPU this is twice
# as fast as one matrix-vector product, whose rows lie far apart; on a GPU it gives every processor work.
_PART = 2**15
_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


class TorchKernels(core.Kernels):
    """Kernels for leaves that are flat, contiguous tensors.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(xp, _TILE.get(device.type, _DEVICE_TILE))
        # The C library returns a large tensor to the system, and fetching it again each step would cost
        # as much as reading it five times. Other devices have an allocator that keeps memory.
        self._keeps = device.type == "cpu"
        self._scratch: dict[int, Tensor] = {}
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, torch.Size], Tensor] = {}

    def scratch(self, number: int, leaf: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for the diagonal of a leaf's root and then its update, on a CPU the same at every step."""
        if not self._keeps or torch.compiler.is_compiling():
            return torch.empty_like(leaf, dtype=dtype)
        kept = self._scratch.get(number)
        if kept is None or kept.shape != leaf.shape or kept.dtype != dtype:
            kept = self._scratch[number] = torch.empty_like(leaf, dtype=dtype)
        return kept

    def device(self, x: Any) -> Any:
        """The device of a tensor, or of an array of coefficients."""
        return x.device if isinstance(x, Tensor) else array_device(x)

    def tiles(self, leaf: Tensor) -> Iterator[Any]:
        """Indices of consecutive ranges."""
        size = leaf.shape[0]
        if size <= self.tile or torch.compiler.is_compiling():
            yield None
            return
        for start in range(0, size, self.tile):
            yield (slice(start, start + self.tile),)

    def buffer(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Memory for an intermediate result of a tile, the same each time, so that it stays in the cache;
        None: let the operation allocate it."""
        if not self._keeps or torch.compiler.is_compiling():
            return None
        key = name, dtype, like.shape
        view = self._views.get(key)
        if view is None:
            size = like.numel()
            kept = self._buffers.get((name, dtype))
            if kept is None or kept.shape[0] < size:
                kept = self._buffers[name, dtype] = like.new_empty(size, dtype=dtype)
                self._views.clear()
            view = self._views[key] = kept[:size].view(like.shape)
        return view

    def rows(self, history: Tensor, dtype: torch.dtype) -> Tensor:
        """A tile of a history as a matrix of 2m rows, in the history's own dtype."""
        return history.flatten(0, 1)

    def finite(self, x: Tensor) -> Tensor:
        """`x` with zeros for what is not finite."""
        return _finite(x, out=None)

    def masked(self, x: Tensor, keep: Tensor) -> Tensor:
        """Zeros for what is not finite, since the factor of a step that is not kept is zero."""
        return _finite(x, out=x)

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """``x * y``."""
        return torch.mul(x, y, out=self.buffer("product", x, x.dtype))

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        """``x - y``."""
        return torch.sub(x, y, out=self.buffer("difference", x, x.dtype))

    def diagonal(
        self,
        v: Tensor,
        entering: tuple[Tensor, Tensor] | None,
        floor: Tensor,
        exponent: Any,
        out: Tensor | None = None,
    ) -> Tensor:
        """``(v + floor) ** -exponent`` of a mean of squares."""
        x = self.buffer("diagonal", v, v.dtype) if out is None else out
        if entering is None:
            x = torch.add(v, floor, out=x)
        else:
            value, weight = entering
            x = torch.mul(value, value, out=x)
            x = torch.lerp(v, x, weight, out=x).add_(floor)
        roots = square_roots(exponent)
        if not roots:
            return x.pow_(-exponent)
        for _ in range(roots - 1):
            x.sqrt_()
        return x.rsqrt_()

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner product, of full precision inside `torch.autocast` too, unlike `matmul`."""
        return torch.dot(a, b)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Products of stacks of matrices, of full precision inside `torch.autocast` too."""
        with _in_full_precision(a):
            return torch.matmul(a, b)

    def ordered(self, x: Tensor, order: Tensor, axis: int) -> Tensor:
        """Matrices of a stack with their rows or columns in orders of their own."""
        return torch.gather(x, axis, order.unsqueeze(3 - axis).expand(x.shape))

    def largest(self, x: Tensor) -> Tensor:
        """The largest magnitude, in one pass."""
        low, high = torch.aminmax(x)
        return torch.maximum(high, -low)

    def times(self, rows: Tensor, x: Tensor) -> Tensor:
        """Inner products of rows of any dtype with a vector, accumulated in the vector's dtype."""
        if rows.dtype != x.dtype:
            products = [self.times(part, x[own]) for own, part in self._converted(rows, x.dtype)]
            return torch.stack(products).sum(0)
        parts = x.shape[0] // _PART
        whole = parts * _PART
        # With `out`, `torch.autocast` leaves a product in full precision.
        rest = (rows[:, whole:], x[whole:]) if parts else (rows, x)
        products = torch.mv(*rest, out=x.new_empty(rows.shape[0]))
        if parts == 0:
            return products
        split = rows[:, :whole].unflatten(1, (parts, _PART)).permute(1, 2, 0)
        out = x.new_empty((parts, 1, rows.shape[0]))
        return products + torch.bmm(x[:whole].view(parts, 1, _PART), split, out=out).sum((0, 1))

    def weighted(self, coefficients: Tensor, rows: Tensor, like: Tensor, out: Tensor | None = None) -> Tensor:
        """Weighted sum of rows of any dtype, in that of the coefficients, of the shape of `like`."""
        if out is None:
            out = torch.empty_like(like, dtype=coefficients.dtype)
        if rows.dtype != out.dtype:
            for own, part in self._converted(rows, out.dtype):
                self.weighted(coefficients, part, out[own], out[own])
            return out
        parts = out.shape[0] // _PART
        whole = parts * _PART
        if parts:
            split = rows[:, :whole].unflatten(1, (parts, _PART)).transpose(0, 1)
            torch.bmm(coefficients.expand(parts, 1, -1), split, out=out[:whole].view(parts, 1, _PART))
        if whole < out.shape[0]:
            torch.mv(rows[:, whole:].t(), coefficients, out=out[whole:])
        return out

    def _converted(self, rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Parts of rows in another dtype, each small enough for the caches, and where they lie."""
        length = max(4, self.tile // rows.shape[0] // _PART) * _PART
        for start in range(0, max(1, rows.shape[1]), length):
            own = slice(start, start + length)
            part = rows[:, own]
            buffer = self.buffer("rows", part, dtype)
            yield own, part.to(dtype) if buffer is None else buffer.copy_(part)

    def combine(self, history: Tensor, z: Tensor, coefficients: Tensor, gamma: Tensor) -> Tensor:
        """``gamma z + B^T c``."""
        d = self.weighted(coefficients, self.rows(history, z.dtype), z, self.buffer("combined", z, z.dtype))
        return d.addcmul_(z, gamma)

    def average(
        self, mean: Tensor, value: Tensor, weight: Tensor, keep: Tensor, *, squared: bool = False
    ) -> Tensor:
        """``M += weight * (x - M)`` for a value or its square where `keep`."""
        # Weights of zero take the place of a choice by element, which is slow; values are made finite, since
        # 0 * nan is nan.
        dtype = mean.dtype
        kept = keep.to(dtype)
        weight = weight * kept
        for tile in self.tiles(mean):
            x = self._clean(part(value, tile), dtype)
            if squared:  # the square of a gradient that is not kept may overflow
                x = x.mul_(kept).square_()
            part(mean, tile).lerp_(x, weight)
        return mean

    def pair(self, leaf: Leaf, tile: Any, valid: Tensor) -> tuple[Tensor, Tensor]:
        """A tile of the next pair, whitened."""
        means, root = leaf.means, leaf.root.at(self, tile)
        differences = []
        for name, now, before in (
            ("s", means.params, means.prev_params),
            ("y", means.grads, means.prev_grads),
        ):
            x = part(now, tile)
            x = torch.sub(x, part(before, tile), out=self.buffer(name, x, x.dtype))
            differences.append(x.mul_(valid))
        return root.dual(differences[0]), root.whiten(differences[1])

    def pair_products(self, s: Tensor, y: Tensor) -> PairTile:
        """Inner products of a pair."""
        if s.shape[0] == 0:
            return super().pair_products(s, y)
        scales = self.largest(s), self.largest(y)
        for x, scale in zip((s, y), scales, strict=True):
            x.div_(scale + (scale == 0))
        return PairTile(*scales, torch.dot(s, s), torch.dot(s, y), torch.dot(y, y))

    def push(
        self, history: Tensor, slot: Tensor, pair: tuple[Tensor, Tensor], keep: Tensor, z: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Store a pair at a slot of the ring, and form the inner products of the rows there."""
        dtype, rows = pair[0].dtype, self.rows(history, history.dtype)
        places = torch.cat([slot, slot + history.shape[1]])
        kept = keep.to(history.dtype)
        stored = torch.index_select(rows, 0, places)
        for old, new in zip(stored, pair, strict=True):
            old.lerp_(_finite(new, out=None).to(old.dtype), kept)
        rows.index_copy_(0, places, stored)
        new = stored.to(dtype)
        products = [self.times(rows, new[0]), self.times(rows, new[1])]
        products.append(torch.zeros_like(products[0][:2]) if z is None else self.times(new, z))
        return history, torch.cat(products)

    def rotate(self, now: Tensor, before: Tensor, turn: Tensor, *, restart: bool) -> tuple[Tensor, Tensor]:
        """An average becomes the previous one."""
        turned = turn.to(now.dtype)
        for tile in self.tiles(now):
            own = part(now, tile)
            part(before, tile).lerp_(own, turned)
            if restart:
                own.mul_(1 - turned)
        return now, before

    def apply(
        self, param: Tensor, update: Tensor, buffer: Tensor | None, end: StepEnd, keep: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Momentum, decoupled weight decay and learning rate where `keep`."""
        dtype = update.dtype
        if isinstance(keep, Tensor):
            accepted, length, rate = keep.to(dtype), end.length.to(dtype), _number(end.lr)
        else:
            accepted, length, rate = float(keep), float(end.length), float(end.lr)
        rate = accepted * rate
        decay = 1 - rate * end.weight_decay if end.weight_decay != 0 else None
        carry = None if buffer is None else 1 + accepted * (end.momentum - 1)
        weight = rate * length if buffer is None else rate
        for tile in self.tiles(update):
            change, own = part(update, tile), part(param, tile)
            if buffer is not None:
                carried = _add(part(buffer, tile).mul_(carry), change, length)
                change = change.mul_(length).add_(carried, alpha=end.momentum) if end.nesterov else carried
            value = own.to(dtype)  # rounded once, at the end
            if decay is not None:
                value.mul_(decay)
            _add(value, change, weight, sign=-1)
            if param.dtype != dtype:
                own.copy_(value)
        return param, buffer

    def _clean(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy in a dtype with zeros for what is not finite."""
        out = self.buffer("scaled", x, dtype) if x.dtype == dtype else None
        return _finite(x, out=out).to(dtype)


_NO_CONTEXT = nullcontext()


def _in_full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """A context without `torch.autocast`; entering one of that kind takes as long as a small operation."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NO_CONTEXT


def _finite(x: Tensor, out: Tensor | None) -> Tensor:
    """Zeros for what is not finite."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0, out=out)


def _add(x: Tensor, y: Tensor, weight: float | Tensor, sign: int = 1) -> Tensor:
    """``x + sign * weight * y`` in the place of `x`."""
    return x.addcmul_(y, weight, value=sign) if isinstance(weight, Tensor) else x.add_(y, alpha=sign * weight)


def _number(value: float | Tensor) -> float | Tensor:
    return value.reshape(()) if isinstance(value, Tensor) else value


class HostKernels(TorchKernels):
    """Kernels of a CPU's tensors whose coefficients are NumPy arrays, in the same memory.

    A step works on some hundred numbers one after the other; NumPy spends a fraction of a microsecond on each
    such operation, PyTorch several.

    Parameters
    ----------
    device : torch.device
        Of type "cpu".
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.xp = array_api_compat.numpy

    def average(
        self, mean: Tensor, value: Tensor, weight: Tensor, keep: Tensor, *, squared: bool = False
    ) -> Tensor:
        """``M += weight * (x - M)`` for a value or its square; the host knows whether it is kept."""
        for tile in self.tiles(mean) if keep else ():
            x = part(value, tile)
            if squared:
                x = x.to(mean.dtype)
                x = torch.mul(x, x, out=self.buffer("scaled", x, x.dtype))
            else:
                x = self._clean(x, mean.dtype)
            part(mean, tile).lerp_(x, weight)
        return mean

    def average_product(self, mean: Tensor, a: Tensor, b: Tensor, weight: Any, keep: Tensor) -> Tensor:
        """``M += weight * (A B - M)``, in the pass of the product; the host knows whether it is kept."""
        if keep:  # then all values are finite
            with _in_full_precision(mean):
                torch.baddbmm(mean, a, b, beta=1.0 - weight, alpha=weight, out=mean)
        return mean

    def known(self, flag: Tensor) -> bool | None:
        """What a flag is."""
        return bool(flag)

    def to_leaf(self, x: Any, dtype: torch.dtype | None = None) -> Tensor:
        """A coefficient as a tensor."""
        return as_tensor(x) if dtype is None else torch.from_numpy(np.asarray(x, _DTYPES[dtype]))

    def to_coefficients(self, x: Any, dtype: Any) -> Any:
        """A sum as an array."""
        x = as_array(x)
        return x if x.dtype == dtype else x.astype(dtype)


def as_tensor(x: Any) -> Tensor:
    """A NumPy array or number as a tensor, in the same memory; a tensor as it is."""
    return x if isinstance(x, Tensor) else torch.from_numpy(np.asarray(x))


def as_array(x: Any) -> Any:
    """A tensor on the CPU as an array in the same memory; an array as it is."""
    return x.numpy() if isinstance(x, Tensor) else x


def quiet() -> AbstractContextManager[Any]:
    """Suppress warnings about gradients that are not finite, and exceptions in the middle of a step."""
    return nullcontext() if torch.compiler.is_compiling() else np.errstate(all="ignore")


def reduced(reduce: Callable[[Tensor], Tensor] | None) -> Callable[[Any], Any] | None:
    """A sum over processes for arrays."""
    return None if reduce is None else lambda values: as_array(reduce(as_tensor(values)))
