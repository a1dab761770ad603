"""The operations on parameter-sized arrays, in plain array-API calls: the seam for speed.

An adapter may subclass `Kernels` and override any method with a faster one of the same meaning. Arrays that a
method is documented to consume are updated in place where the backend allows it. No kernel knows of a
preconditioner: all whitening goes through the leaf's `Root`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import array_api_extra as xpx
from array_api_compat import device as array_device
from array_api_compat import (
    is_array_api_obj,
    is_array_api_strict_namespace,
    is_jax_namespace,
    is_numpy_namespace,
)

from .preconditioner.root import Root
from .two_loop import repeat

__all__ = ["Array", "Kernels", "Leaf", "Means", "PairTile", "StepEnd", "part", "square_roots"]

Array = Any
Tile = tuple[Any, ...] | None
"""An index that cuts a tile out of a leaf; None: all of it."""


class Means(NamedTuple):
    """The averages of one leaf in this window and in the previous one."""

    params: Array
    grads: Array
    prev_params: Array
    prev_grads: Array


class Leaf(NamedTuple):
    """What is remembered of one leaf, as an argument of the passes over it."""

    number: int
    dtype: Any
    """The dtype of averages and inner products."""
    history: Array | None
    """None where no pairs are stored."""
    means: Any
    """`Means`, or None where no pairs are stored."""
    root: Root
    """`R` of this step."""


class PairTile(NamedTuple):
    """Inner products of a part of a pair, scaled so that no square over- or underflows."""

    s_scale: Array
    y_scale: Array
    ss: Array
    sy: Array
    yy: Array


class StepEnd(NamedTuple):
    """The numbers of the end of a step: Python's, or 0-d arrays on the leaf's device."""

    length: Any
    """The factor by which the update is to be multiplied."""
    lr: Any
    momentum: Any
    weight_decay: Any
    """Decoupled."""
    nesterov: bool


def square_roots(exponent: Any) -> int | None:
    """How many square roots give a power (0 for the first power), or None if no number of them does."""
    halvings = -math.log2(exponent) if isinstance(exponent, float) and exponent > 0 else 0.5
    return int(halvings) if halvings.is_integer() and halvings >= 0 else None


def part(array: Array, tile: Tile, axes: int = 0) -> Array:
    """A tile of an array that has `axes` more axes than the leaf, in front."""
    return array if tile is None else array[(*(slice(None),) * axes, *tile)]


class Kernels:
    """Plain array-API kernels; leaves larger than a tile are worked through in parts.

    Parameters
    ----------
    xp : array namespace
        The namespace of the coefficients, from `array_api_compat.array_namespace`.
    tile : int
        Values of a leaf handled at a time where arrays can be written in place: the size of every
        temporary array. A few times ``2**16`` fits processor caches; a GPU wants it large.
        Backends that cannot write in place always take whole leaves.
    leaf_xp : array namespace, optional
        The namespace of the leaves, if it is a different one.
    """

    def __init__(self, xp: Any, tile: int = 2**16, leaf_xp: Any = None) -> None:
        if not isinstance(tile, int) or tile < 1:
            msg = f"`tile` must be an int >= 1, got {tile!r}"
            raise ValueError(msg)
        self.xp = xp
        self.leaf_xp = xp if leaf_xp is None else leaf_xp
        self.tile = tile
        self.in_place = not is_jax_namespace(self.leaf_xp)
        # The standard itself has no assignment by an index array.
        self.indexes_by_array = not is_array_api_strict_namespace(self.leaf_xp)

    # How parameters lie in leaves: each is a leaf of its own, unless an adapter packs several into one.

    def of_leaf(self, values: Array, leaf: int) -> Array:
        """A leaf's number among those of all parameters (P,): 0-d, or of a shape that broadcasts with the
        leaf if it holds several parameters."""
        return values[leaf]

    def present(self, grads: Sequence[Array | None]) -> list[bool]:
        """Whether each parameter has a gradient."""
        return [grad is not None for grad in grads]

    def moving(self, leaf: int, grad: Array) -> int:
        """The number of a leaf's values that have a gradient."""
        return math.prod(grad.shape)

    # Between leaves and coefficients.

    def device(self, x: Array) -> Any:
        """The device for coefficients that belong to an array; None (the default device) for a traced or
        abstract one."""
        return array_device(x) if is_array_api_obj(x) else None

    def to_leaf(self, x: Array, dtype: Any = None) -> Array:
        """A coefficient as the kernels take it, in a leaf's dtype if one is given."""
        return x if dtype is None else self.cast(x, dtype)

    def to_coefficients(self, x: Array, dtype: Any) -> Array:
        """What a kernel has summed as a coefficient, in the coefficients' dtype."""
        return self.cast(x, dtype)

    def known(self, flag: Array) -> bool | None:
        """What a flag of the leaves (0-d bool) is, where the host knows that without waiting; else None."""
        return bool(flag) if is_numpy_namespace(self.leaf_xp) else None

    repeat = staticmethod(repeat)
    """Runs the two loops of the recursion; see `mlbfgs_core.two_loop.two_loop`."""

    def after(self, flag: Array, sums: Array) -> Array:
        """`flag`, but not before `sums` are known: for a backend that orders its work by its data alone."""
        return flag

    # Memory and tiles.

    def zeros(self, leaf: Array, leading: tuple[int, ...], dtype: Any) -> Array:
        """Zeros of the shape ``(*leading, *leaf.shape)``, placed like the leaf, which may be abstract."""
        return self.leaf_xp.zeros((*leading, *leaf.shape), dtype=dtype, device=self.device(leaf))

    def scratch(self, number: int, leaf: Array, dtype: Any) -> Array:
        """An array of a leaf's shape with arbitrary values, for one step; `number` tells which leaf it is."""
        return self.leaf_xp.empty_like(leaf, dtype=dtype)

    def tiles(self, leaf: Array) -> Iterator[Tile]:
        """Indices that cut a leaf along its first axis."""
        size = math.prod(leaf.shape)
        if not self.in_place or size <= self.tile:
            yield None
            return
        rows = leaf.shape[0]
        step = max(1, self.tile * rows // size)
        for start in range(0, rows, step):
            yield slice(start, start + step), ...

    def store(self, array: Array, tile: Tile, value: Array) -> Array:
        """`array` with `value` at the tile; consumes `array`."""
        if not self.in_place:
            return value
        if value is not array:
            array[... if tile is None else tile] = value
        return array

    # Elementary operations.

    def cast(self, x: Array, dtype: Any) -> Array:
        """`x` in a dtype; `x` itself if it has that already, which saves a call."""
        return x if x.dtype == dtype else self.leaf_xp.astype(x, dtype, copy=False)

    def finite(self, x: Array) -> Array:
        """`x` with zeros for what is not finite."""
        return self.leaf_xp.where(self.leaf_xp.isfinite(x), x, 0.0)

    def masked(self, x: Array, keep: Array) -> Array:
        """`x` if `keep` (0-d) is true, else zeros, whatever it holds; consumes `x`."""
        return self.leaf_xp.where(keep, x, 0.0)

    def product(self, x: Array, y: Array) -> Array:
        """``x * y``, a new array, which the next call may reuse."""
        return x * y

    def difference(self, x: Array, y: Array) -> Array:
        """``x - y``, a new array, which the next call may reuse."""
        return x - y

    def diagonal(
        self,
        v: Array,
        entering: tuple[Array, Array] | None,
        floor: Array,
        exponent: Any,
        out: Array | None = None,
    ) -> Array:
        """``(v + floor) ** -exponent`` for a mean of squares, to which the square of a value is added first
        if ``(value, weight)`` is given; by square roots where they suffice, which is far cheaper. The
        result may be `out`."""
        if entering is not None:
            value, weight = entering
            v = v + weight * (value * value - v)
        x = v + floor
        roots = square_roots(exponent)
        if roots is None:
            return x**-exponent
        for _ in range(roots):
            x = self.leaf_xp.sqrt(x)
        return 1.0 / x

    def chosen(self, flag: Array, new: Array, old: Array) -> Array:
        """`new` if `flag` (0-d) is true, else `old`."""
        known = self.known(flag)
        if known is None:
            return self.leaf_xp.where(flag, new, old)
        return new if known else old

    def ordered(self, x: Array, order: Array, axis: int) -> Array:
        """Each matrix of a stack (N, a, b) with its rows (axis 1) or columns (axis 2) in an order of its own,
        (N, a) or (N, b)."""
        index = self.leaf_xp.expand_dims(order, axis=3 - axis)
        return self.leaf_xp.take_along_axis(x, self.leaf_xp.broadcast_to(index, x.shape), axis=axis)

    def matmul(self, a: Array, b: Array) -> Array:
        """Products of stacks of matrices, in the arrays' full precision."""
        return self.leaf_xp.matmul(a, b)

    def dot(self, a: Array, b: Array) -> Array:
        """Inner product over all axes, in the arrays' (full) precision."""
        return self.leaf_xp.matmul(self.leaf_xp.reshape(a, (-1,)), self.leaf_xp.reshape(b, (-1,)))

    def largest(self, x: Array) -> Array:
        """The largest magnitude, 0-d."""
        return self.leaf_xp.max(self.leaf_xp.abs(x))

    def rows(self, history: Array, dtype: Any) -> Array:
        """A tile of a history as a matrix of 2m rows in `dtype`; a view if possible."""
        return self.cast(self.leaf_xp.reshape(history, (2 * history.shape[1], -1)), dtype)

    def times(self, rows: Array, x: Array) -> Array:
        """Inner products (2m,) of a tile's rows with a tile of a leaf, in the arrays' full precision."""
        return self.leaf_xp.matmul(rows, self.leaf_xp.reshape(x, (-1,)))

    def weighted(self, coefficients: Array, rows: Array, like: Array) -> Array:
        """The sum of a tile's rows with these weights, of the shape of `like`, in the arrays' full
        precision."""
        return self.leaf_xp.reshape(self.leaf_xp.matmul(coefficients, rows), like.shape)

    # Kernels, on tiles. Each names the values it moves per parameter.

    def project(self, history: Array, z: Array) -> Array:
        """Inner products (2m,) of the stored rows with a whitened gradient; reads 2m + 1 values."""
        return self.times(self.rows(history, z.dtype), z)

    def combine(self, history: Array, z: Array, coefficients: Array, gamma: Array) -> Array:
        """``gamma z + B^T c``; reads 2m + 1 values, writes 1."""
        return gamma * z + self.weighted(coefficients, self.rows(history, z.dtype), z)

    def average(
        self, mean: Array, value: Array, weight: Array, keep: Array, *, squared: bool = False
    ) -> Array:
        """``M += weight * (x - M)`` for a value (or its square) where `keep` (0-d); reads 2 values, writes 1.

        Consumes the mean. A value that is not finite counts as zero, so that it does not spoil the others'
        pairs; squares are all finite if `keep`. If not, the mean stays as it is, whatever the value holds.
        """
        for tile in self.tiles(mean):
            old, x = part(mean, tile), self.cast(part(value, tile), mean.dtype)
            x = x * x if squared else self.finite(x)
            mean = self.store(mean, tile, self.leaf_xp.where(keep, old + weight * (x - old), old))
        return mean

    def average_product(self, mean: Array, a: Array, b: Array, weight: Any, keep: Array) -> Array:
        """``M += weight * (A B - M)`` for stacks of matrices where `keep` (0-d). Consumes the mean."""
        weight = self.leaf_xp.astype(keep, mean.dtype) * weight
        return self.average(mean, self.matmul(a, b), weight, keep)

    def eigh(self, x: Array) -> tuple[Array, Array]:
        """Eigenvalues (N, n), rising, and eigenvectors of stacks (N, n, n) of symmetric matrices.

        Some libraries fail on a matrix of low rank in float32 that they solve in float64. Where both fail,
        all is NaN, as in JAX.
        """
        xp = self.leaf_xp
        for dtype in dict.fromkeys((x.dtype, xp.float64)):
            try:
                values, vectors = xp.linalg.eigh(self.cast(x, dtype))
            except (RuntimeError, TypeError, ValueError):  # NumPy's and PyTorch's errors; no float64 there
                continue
            return self.cast(values, x.dtype), self.cast(vectors, x.dtype)
        nan = xp.full_like(x, xp.nan)
        return nan[..., 0], nan

    def pair_products(self, s: Array, y: Array) -> PairTile:
        """Inner products of a pair, which it consumes; reads 2 values."""
        xp = self.leaf_xp
        if math.prod(s.shape) == 0:
            zero = xp.sum(s)
            return PairTile(zero, zero, zero, zero, zero)
        s_scale, y_scale = self.largest(s), self.largest(y)
        s /= xp.where(s_scale > 0, s_scale, 1.0)
        y /= xp.where(y_scale > 0, y_scale, 1.0)
        return PairTile(s_scale, y_scale, self.dot(s, s), self.dot(s, y), self.dot(y, y))

    def push(
        self, history: Array, slot: Array, pair: tuple[Array, Array], keep: Array, z: Array | None
    ) -> tuple[Array, Array]:
        """Store a pair at a slot of the ring where `keep` (0-d), and form the inner products of the rows
        there, as stored.

        Consumes the history; reads ``2 m`` values and moves about 8 more. `slot` is an index array of shape
        (1,). The products (4m + 2,) are those of `s` and of `y` with all 2m rows, and of both with the
        whitened gradient `z` (0 where it is None).
        """
        xp, m, dtype = self.leaf_xp, history.shape[1], pair[0].dtype
        new = xp.expand_dims(self.cast(xp.stack(pair), history.dtype), axis=1)
        new = xp.where(keep, new, self._pick(history, slot, 1))
        history = self._put(history, slot, 1, new)
        rows = self.rows(history, dtype)
        new = self.cast(self._pick(rows, xp.concat([slot, slot + m]), 0), dtype)
        products = [self.times(rows, new[0, ...]), self.times(rows, new[1, ...])]
        products.append(xp.zeros_like(products[0][:2]) if z is None else self.times(new, z))
        return history, xp.concat(products)

    def rotate(self, now: Array, before: Array, turn: Array, *, restart: bool) -> tuple[Array, Array]:
        """If `turn` (0-d), an average becomes the previous one and, with `restart`, starts again at zero.
        Consumes both; moves 4 values."""
        xp = self.leaf_xp
        for tile in self.tiles(now):
            own = part(now, tile)
            before = self.store(before, tile, xp.where(turn, own, part(before, tile)))
            if restart:
                now = self.store(now, tile, xp.where(turn, 0.0, own))
        return now, before

    def apply(
        self, param: Array, update: Array, buffer: Array | None, end: StepEnd, keep: Array
    ) -> tuple[Array, Array | None]:
        """The end of a step: momentum, weight decay and learning rate where `keep` (0-d).

        Consumes parameter, update and buffer (of the update's dtype; None: no momentum); returns parameter
        and buffer. With ``d = length * update`` the buffer becomes ``u = momentum * u + d``, the step
        `p` is `u`, or ``d + momentum * u`` with `nesterov`, and the parameter
        ``(1 - lr * weight_decay) * theta - lr * p``, rounded once. A value that is not finite stays as it is.
        Moves 5 values.
        """
        xp, dtype = self.leaf_xp, update.dtype
        for tile in self.tiles(update):
            old, change = part(param, tile), part(update, tile) * end.length
            if buffer is not None:
                carried = part(buffer, tile)
                carried = xp.where(keep, end.momentum * carried + change, carried)
                change = change + end.momentum * carried if end.nesterov else carried
                buffer = self.store(buffer, tile, carried)
            value = self.cast(old, dtype)
            moved = value * (1.0 - end.lr * end.weight_decay) - end.lr * change
            new = self.cast(xp.where(keep & xp.isfinite(value), moved, value), param.dtype)
            param = self.store(param, tile, new)
        return param, buffer

    # Passes over a leaf, built from the kernels. A backend may fuse the whitening of an elementwise root.

    def whiten(
        self, leaf: Leaf, grad: Array, mean: Array | None, scatter_weight: Array
    ) -> tuple[Root, list[Array]]:
        """Project ``z = R g`` on the stored rows: reads 2m + 1 values (+ 1 for the scatter, + those of `R`),
        and may write 1 of `R`.

        Returns
        -------
        root : Root
            `R`, with what it keeps for the other passes of this step.
        sums : list of arrays
            The rows' inner products with `z` (2m,), where there are any; ``|g|^2``; ``|z|^2`` where `z` is
            not `g`; and ``scatter_weight * |R (g - mean)|^2`` where a mean is given.
        """
        whole = not leaf.root.elementwise
        keeps = self.in_place and leaf.root.keeps
        kept = self.scratch(leaf.number, grad, leaf.dtype) if keeps else None
        total: list[Array] = []
        for tile in self._tiles(grad, leaf.root):
            g = self.cast(part(grad, tile), leaf.dtype)
            own = None if kept is None else part(kept, tile)
            root = leaf.root.at(self, tile, g, own)
            z = root.white(g)
            sums = [] if leaf.history is None else [self.project(part(leaf.history, tile, 2), z)]
            sums += [self.dot(g, g)] if z is g else [self.dot(g, g), self.dot(z, z)]
            if mean is not None:
                off = root.whiten(self.difference(g, part(mean, tile)))
                sums.append(self.dot(off, off) * scatter_weight)
            total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
            if whole:  # in one tile
                return leaf.root.keeping(root.kept), sums
            if root.kept is not own:
                kept = self.store(kept, tile, root.kept)
        return leaf.root if kept is None else leaf.root.keeping(kept), total

    def direct(
        self, leaf: Leaf, grad: Array, weights: tuple[Array, Array], keep: Array
    ) -> tuple[Array, Array]:
        """``d = R^T (gamma z + B^T c)`` with ``(c, gamma) = weights``, zero where `keep` (0-d) is false, and
        ``|d|^2``; reads 2m + 1 values (+ those of `R`), writes 1. Consumes what the root has kept."""
        coefficients, gamma = weights
        whole, kept = not leaf.root.elementwise, leaf.root.kept
        update = self.scratch(leaf.number, grad, leaf.dtype) if kept is None else kept
        total = None
        for tile in self._tiles(grad, leaf.root):
            root = leaf.root.at(self, tile)
            z = root.white(self.cast(part(grad, tile), leaf.dtype))
            if leaf.history is None:
                d = gamma * z
            else:
                d = self.combine(part(leaf.history, tile, 2), z, coefficients, gamma)
            d = self.masked(root.back(d), keep)
            square = self.dot(d, d)
            if whole:
                return d, square
            total = square if total is None else total + square
            if kept is None or d is not root.kept:
                update = self.store(update, tile, d)
        return update, total

    def pair(self, leaf: Leaf, tile: Tile, valid: Array) -> tuple[Array, Array]:
        """A tile of the next pair, ``s' = R^-T s`` and ``y' = R y``, zero where `valid` (0-d) is false; the
        caller may write to it. Moves 6 values (+ those of `R`)."""
        means, root = leaf.means, leaf.root.at(self, tile)
        s = self.masked(part(means.params, tile) - part(means.prev_params, tile), valid)
        y = self.masked(part(means.grads, tile) - part(means.prev_grads, tile), valid)
        return root.dual(s), root.whiten(y)

    def mean_square(self, leaf: Leaf, weight: Array) -> Array:
        """``weight * |R M_g|^2``, with a weight as `of_leaf` gives it; reads 1 value (+ those of `R`)."""
        total = None
        for tile in self._tiles(leaf.means.grads, leaf.root):
            z = leaf.root.at(self, tile).whiten(part(leaf.means.grads, tile) + 0.0)
            square = self.dot(z, z)
            total = square if total is None else total + square
        return total * weight

    def next_products(self, leaf: Leaf, valid: Array) -> list[PairTile]:
        """Inner products of the next pair, tile by tile."""
        return [
            self.pair_products(*self.pair(leaf, tile, valid))
            for tile in self._tiles(leaf.means.params, leaf.root)
        ]

    def push_next(
        self,
        leaf: Leaf,
        slot: Array,
        damping: tuple[Array, ...],
        flags: tuple[Array, Array],
        grad: Array | None,
    ) -> tuple[Array, Array]:
        """`push` the next pair as ``(s, a y + b s) / c`` with ``(a, b, 1 / c) = damping``, and the gradient's
        `z`.

        `flags` (0-d each) are whether the pair is valid, and whether it is kept.
        """
        history, total = leaf.history, None
        for tile in self._tiles(leaf.means.params, leaf.root):
            s, y = self.pair(leaf, tile, flags[0])
            s *= damping[2]
            y *= damping[2]
            z = None
            if grad is not None:
                z = leaf.root.at(self, tile).white(self.cast(part(grad, tile), leaf.dtype))
            pair = s, damping[0] * y + damping[1] * s
            own, sums = self.push(part(history, tile, 2), slot, pair, flags[1], z)
            history = history if self.in_place else own
            total = sums if total is None else total + sums
        return history, total

    # Reductions of a leaf for the control of scales and lengths.

    def peak(self, leaf: Array, dtype: Any) -> Array:
        """The largest magnitude of a leaf in `dtype`, 0-d; 0 for one without values; reads 1 value."""
        total = None
        for tile in self.tiles(leaf):
            x = self.cast(part(leaf, tile), dtype)
            top = self.leaf_xp.sum(x) if math.prod(x.shape) == 0 else self.largest(x)
            total = top if total is None else self.leaf_xp.maximum(total, top)
        return total

    def square(self, leaf: Array, dtype: Any, factor: float = 1.0) -> Array:
        """Sum of squares of ``factor`` times a leaf's finite values, in `dtype`; reads 1 value."""
        total = None
        for tile in self.tiles(leaf):
            x = self.finite(self.cast(part(leaf, tile), dtype))
            x = x if factor == 1.0 else x * factor
            total = self.dot(x, x) if total is None else total + self.dot(x, x)
        return total

    def scale(self, update: Array, factor: Array, dtype: Any) -> Array:
        """``update * factor`` in `dtype`; consumes the update; moves 2 values."""
        scaled = update if update.dtype == dtype else self.leaf_xp.empty_like(update, dtype=dtype)
        for tile in self.tiles(update):
            scaled = self.store(scaled, tile, self.cast(part(update, tile) * factor, dtype))
        return scaled

    def _tiles(self, leaf: Array, root: Root) -> Iterator[Tile]:
        """Tiles of a leaf; the whole leaf if its root is not elementwise."""
        return self.tiles(leaf) if root.elementwise else iter((None,))

    def _pick(self, array: Array, index: Array, axis: int) -> Array:
        """`array` at the positions of a 1-d index array along an axis."""
        if not self.indexes_by_array:
            return self.leaf_xp.take(array, index, axis=axis)
        return array[(slice(None),) * axis + (index, ...)]  # NumPy's take copies a strided array whole

    def _put(self, array: Array, index: Array, axis: int, value: Array) -> Array:
        """`array` with `value` at the positions of a 1-d index array along an axis; consumes `array`."""
        where = (slice(None),) * axis
        if self.indexes_by_array:
            return xpx.at(array)[(*where, index, ...)].set(value)
        xp, length = self.leaf_xp, array.shape[axis]
        ring = xp.reshape(xp.arange(length), (-1,) + (1,) * (array.ndim - axis - 1))
        array[...] = xp.where(ring == index[0], value, array)
        return array
