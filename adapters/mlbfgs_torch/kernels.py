"""The core's kernels on flat PyTorch tensors: the same meaning, fewer and faster operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

import mlbfgs_core as core
from mlbfgs_core.kernels import Means, Metric, PairTile, Projection, square_roots

__all__ = ["TorchKernels"]

# Values handled at a time: a few such tensors fit the caches of a CPU; a GPU wants whole leaves.
_TILE = {"cpu": 2**19}
_DEVICE_TILE = 2**26
# A product with a tile's rows is a batch of products with parts of so many values: on a CPU twice as fast
# as one matrix-vector product, whose rows lie far apart; on a GPU work for every processor.
_PART = 2**15


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

    def scratch(self, history: Tensor, leaf: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for a leaf's root and update, on a CPU the same at every step."""
        if not self._keeps or torch.compiler.is_compiling():
            return torch.empty_like(leaf, dtype=dtype)
        kept = self._scratch.get(id(history))
        if kept is None:
            kept = self._scratch[id(history)] = torch.empty_like(leaf, dtype=dtype)
        return kept

    def device(self, x: Tensor) -> torch.device:
        """The device of a tensor."""
        return x.device

    def tiles(self, leaf: Tensor) -> Iterator[Any]:
        """Indices of consecutive ranges."""
        size = leaf.shape[0]
        if size <= self.tile or torch.compiler.is_compiling():
            yield (...,)
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

    def rows(self, history: Tensor, tile: Any, dtype: torch.dtype) -> Tensor:
        """The tile of a history as a matrix of 2m rows, in the history's own dtype."""
        return history[(slice(None), slice(None), *tile)].flatten(0, 1)

    def finite(self, x: Tensor) -> Tensor:
        """`x` with zeros for what is not finite."""
        return _finite(x, out=None)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner product, of full precision inside `torch.autocast` too, unlike `matmul`."""
        return torch.dot(a, b)

    def largest(self, x: Tensor) -> Tensor:
        """The largest magnitude, in one pass."""
        low, high = torch.aminmax(x)
        return torch.maximum(high, -low)

    def pick(self, array: Tensor, index: Tensor, axis: int) -> Tensor:
        """`array` at the positions of an index along an axis."""
        out = self.buffer("picked", array.narrow(axis, 0, index.shape[0]), array.dtype)
        return torch.index_select(array, axis, index, out=out)

    def times(self, rows: Tensor, x: Tensor) -> Tensor:
        """Inner products of rows of any dtype with a vector, accumulated in the vector's."""
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

    def inverse_power(self, x: Tensor, exponent: Any) -> Tensor:
        """``x ** -exponent``; consumes `x`."""
        roots = square_roots(exponent)
        if not roots:
            return x.pow_(-exponent)
        for _ in range(roots - 1):
            x.sqrt_()
        return x.rsqrt_()

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
        roots = None if metric is None else self.scratch(history, grad, dtype)
        total: list[Tensor] = []
        for tile in self.tiles(grad):
            scaled = g = grad[tile].to(dtype)
            rest = [torch.dot(g, g)]
            if metric is not None:
                root, scaled = roots[tile], torch.mul(g, g, out=self.buffer("scaled", g, dtype))
                if metric.weight is None:
                    root.copy_(metric.moment[tile])
                else:
                    torch.lerp(metric.moment[tile], scaled, metric.weight, out=root)
                self.inverse_power(root.add_(metric.floor), metric.power / 4)
                scaled = torch.mul(g, root, out=scaled)
                rest.append(torch.dot(scaled, scaled))
            if mean_grad is not None:
                off = torch.sub(g, mean_grad[tile], out=self.buffer("off", g, dtype))
                off = off if metric is None else off.mul_(root)
                rest.append(torch.dot(off, off) * scatter_weight)
            parts = [self.times(self.rows(history, tile, dtype), scaled), *rest]
            total = [one + other for one, other in zip(total, parts, strict=True)] if total else parts
        sums = iter(total[1:])
        return Projection(
            total[0],
            next(sums),
            None if metric is None else next(sums),
            None if mean_grad is None else next(sums),
            roots,
        )

    def update_means(
        self,
        mean_params: Tensor,
        mean_grads: Tensor,
        metric: Metric | None,
        param: Tensor,
        grad: Tensor,
        weight: Tensor,
        keep: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Averages of parameter, gradient and squared gradient."""
        # Weights of zero instead of a choice by element, which is slow; finite values, since 0 * nan
        # is nan.
        dtype = mean_params.dtype
        kept = keep.to(dtype)
        weight = weight * kept
        moment_weight = None if metric is None else metric.weight * kept
        for tile in self.tiles(param):
            value = self._clean(param[tile], dtype)
            mean_params[tile].lerp_(value, weight)
            value = self._clean(grad[tile], dtype).mul_(kept)
            mean_grads[tile].lerp_(value, weight)
            if metric is not None:
                metric.moment[tile].lerp_(value.square_(), moment_weight)
        return mean_params, mean_grads, None if metric is None else metric.moment

    def pair(self, means: Means, metric: Metric | None, tile: Any, valid: Tensor) -> tuple[Tensor, Tensor]:
        """A tile of ``s`` and ``y``."""
        dtype = means.params.dtype
        now, before = means.params[tile], means.prev_params[tile]
        s = torch.sub(now, before, out=self.buffer("scaled", now, dtype)).mul_(valid)
        now, before = means.grads[tile], means.prev_grads[tile]
        y = torch.sub(now, before, out=self.buffer("off", now, dtype)).mul_(valid)
        if metric is not None:
            root = metric.inverse_root(self, tile)
            s, y = s.div_(root), y.mul_(root)
        return s, y

    def pair_products(self, means: Means, metric: Metric | None, valid: Tensor) -> list[PairTile]:
        """Inner products of ``s`` and ``y``, tile by tile."""
        if means.params.shape[0] == 0:
            return super().pair_products(means, metric, valid)
        products = []
        for tile in self.tiles(means.params):
            s, y = self.pair(means, metric, tile, valid)
            scales = self.largest(s), self.largest(y)
            for x, scale in zip((s, y), scales, strict=True):
                x.div_(scale + (scale == 0))
            products.append(PairTile(*scales, torch.dot(s, s), torch.dot(s, y), torch.dot(y, y)))
        return products

    def write_pair(
        self,
        history: Tensor,
        slot: Tensor,
        means: Means,
        metric: Metric | None,
        valid: Tensor,
        inverse_norm: Tensor,
        damping: tuple[Tensor, Tensor],
        keep: Tensor,
    ) -> Tensor:
        """Store a pair at a slot of the ring."""
        places = torch.cat([slot, slot + history.shape[1]])
        kept = keep.to(history.dtype)
        for tile in self.tiles(means.params):
            s, y = self.pair(means, metric, tile, valid)
            s = s.mul_(inverse_norm)
            y = y.mul_(inverse_norm * damping[0]).addcmul_(s, damping[1])
            rows = self.rows(history, tile, history.dtype)
            stored = self.pick(rows, places, 0)
            for old, new in zip(stored, (s, y), strict=True):
                old.lerp_(_finite(new, out=new).to(old.dtype), kept)
            rows.index_copy_(0, places, stored)
        return history

    def rotate(self, means: Means, turn: Tensor, *, restart: bool) -> Means:
        """This window's averages become the previous ones."""
        turned = turn.to(means.params.dtype)
        for tile in self.tiles(means.params):
            for now, before in ((means.params, means.prev_params), (means.grads, means.prev_grads)):
                before[tile].lerp_(now[tile], turned)
                if restart:
                    now[tile].mul_(1 - turned)
        return means

    def combine(
        self,
        history: Tensor,
        grad: Tensor,
        coefficients: Tensor,
        gamma: Tensor,
        metric: Metric | None,
        keep: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        """``gamma g + B^T c``."""
        square: Tensor | None = None
        update = None if metric is None else metric.kept
        update = self.scratch(history, grad, dtype) if update is None else update
        for tile in self.tiles(grad):
            g, own = grad[tile].to(dtype), update[tile]
            rows, out = self.rows(history, tile, dtype), self.buffer("off", g, dtype)
            d = self.weighted(coefficients, rows, g, out)
            if metric is None:
                torch.addcmul(d, g, gamma, out=own)
            else:
                root = metric.inverse_root(self, tile)
                d.addcmul_(torch.mul(g, root, out=self.buffer("scaled", g, dtype)), gamma)
                torch.mul(d, root, out=own)
            _finite(own, out=own)
            if metric is not None:
                part = torch.dot(own, own)
                square = part if square is None else square + part
        return update, square

    def descend(
        self,
        param: Tensor,
        update: Tensor,
        length: Any,
        buffer: Tensor | None,
        lr: float | Tensor,
        momentum: float,
        weight_decay: float,
        keep: Any,
        *,
        nesterov: bool,
    ) -> None:
        """Momentum, decoupled weight decay and learning rate where `keep`; writes to the parameter and the
        buffer, and consumes the update. Moves 5 values."""
        dtype = update.dtype
        if isinstance(keep, Tensor):
            accepted, length, rate = keep.to(dtype), length.to(dtype), _number(lr)
        else:
            accepted, length, rate = float(keep), float(length), float(lr)
        rate = accepted * rate
        decay = 1 - rate * weight_decay if weight_decay != 0 else None
        carry = None if buffer is None else 1 + accepted * (momentum - 1)
        weight = rate * length if buffer is None else rate
        for tile in self.tiles(update):
            change = update[tile]
            if buffer is not None:
                carried = _add(buffer[tile].mul_(carry), change, length)
                change = change.mul_(length).add_(carried, alpha=momentum) if nesterov else carried
            value = param[tile].to(dtype)  # rounded once, at the end
            if decay is not None:
                value.mul_(decay)
            _add(value, change, weight, sign=-1)
            if param.dtype != dtype:
                param[tile].copy_(value)

    def _clean(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy in a dtype with zeros for what is not finite."""
        out = self.buffer("scaled", x, dtype) if x.dtype == dtype else None
        return _finite(x, out=out).to(dtype)


def _finite(x: Tensor, out: Tensor | None) -> Tensor:
    """Zeros for what is not finite."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0, out=out)


def _add(x: Tensor, y: Tensor, weight: float | Tensor, sign: int = 1) -> Tensor:
    """``x + sign * weight * y`` in the place of `x`."""
    return x.addcmul_(y, weight, value=sign) if isinstance(weight, Tensor) else x.add_(y, alpha=sign * weight)


def _number(value: float | Tensor) -> float | Tensor:
    return value.reshape(()) if isinstance(value, Tensor) else value
