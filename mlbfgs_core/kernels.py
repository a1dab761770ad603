"""The operations on parameter-sized arrays, in plain array-API calls: the seam for speed.

An adapter may subclass `Kernels` and override any method by a faster one of the same meaning.
Arrays that a method is documented to consume are updated in place where the backend allows it.
Coefficients may be of another library than the leaves: `xp` is theirs, and `cast` and `to_leaves` convert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import array_api_extra as xpx
from array_api_compat import device as array_device
from array_api_compat import is_array_api_obj, is_array_api_strict_namespace, is_jax_namespace

from .two_loop import repeat

__all__ = ["Array", "Kernels", "Means", "Metric", "PairTile", "Projection", "square_roots"]

Array = Any
Index = Any


class Metric(NamedTuple):
    """The diagonal metric ``q = (moment + floor) ** (power / 2)`` of one leaf."""

    moment: Array
    """`v`, the running mean of squared gradients, of the leaf's shape."""
    weight: Any
    """0-d: weight of this step's square in `v`; None where it has entered already."""
    floor: Array
    """0-d: keeps `q` positive where the gradient has always been zero."""
    power: Any

    kept: Array | None = None
    """``q ** -0.5`` as `Kernels.project` has kept it, of the leaf's shape."""

    def inverse_root(self, kernels: Kernels, tile: Index, grad: Array | None = None) -> Array:
        """A tile of ``q ** -0.5``; a gradient that is given enters first, with the metric's weight."""
        if self.kept is not None:
            return self.kept[tile]
        moment = self.moment[tile]
        if grad is not None and self.weight is not None:
            moment = kernels.lerp(moment, grad * grad, self.weight)
        return kernels.inverse_power(moment + self.floor, self.power / 4)


class Means(NamedTuple):
    """The averages of one leaf in this window and in the previous one."""

    params: Array
    grads: Array
    prev_params: Array
    prev_grads: Array


class PairTile(NamedTuple):
    """Inner products of a part of a pair, scaled so that no square over- or underflows."""

    s_scale: Array
    y_scale: Array
    ss: Array
    sy: Array
    yy: Array


class Projection(NamedTuple):
    """What one leaf adds to the inner products of a step; every sum in the scaled coordinates of the
    metric but `grad_square`."""

    rows: Array
    """(2m,): inner products of the stored rows with the gradient."""
    grad_square: Array
    metric_square: Array | None
    scatter: Array | None
    inverse_root: Array | None
    """The metric's ``q ** -0.5``, of the leaf's shape, for the other kernels of this step."""


def square_roots(exponent: Any) -> int | None:
    """How many square roots make a power (none at all for the first), or None where they don't."""
    halvings = -math.log2(exponent) if isinstance(exponent, float) and exponent > 0 else 0.5
    return int(halvings) if halvings.is_integer() and halvings >= 0 else None


class Kernels:
    """Plain array-API kernels; leaves larger than a tile are worked through in parts.

    Parameters
    ----------
    xp : array namespace
        From `array_api_compat.array_namespace`.
    tile : int
        Values of a leaf handled at a time where arrays can be written in place: the size of every
        temporary array. A few times ``2**16`` fits processor caches; a GPU wants it large.
        Backends that cannot write in place always take whole leaves.
    """

    def __init__(self, xp: Any, tile: int = 2**16) -> None:
        if not isinstance(tile, int) or tile < 1:
            msg = f"`tile` must be an int >= 1, got {tile!r}"
            raise ValueError(msg)
        self.xp = xp
        self.tile = tile
        self.in_place = not is_jax_namespace(xp)
        # The standard itself has no assignment by an index array.
        self.indexes_by_array = not is_array_api_strict_namespace(xp)

    # Elementary operations.

    def device(self, x: Array) -> Any:
        """Where coefficients that belong to an array are to lie; None (the default device) for a traced or
        an abstract one."""
        return array_device(x) if is_array_api_obj(x) else None

    def tiles(self, leaf: Array) -> Iterator[Index]:
        """Indices that cut a leaf along its first axis."""
        size = math.prod(leaf.shape)
        if not self.in_place or size <= self.tile:
            yield (...,)
            return
        rows = leaf.shape[0]
        step = max(1, self.tile * rows // size)
        for start in range(0, rows, step):
            yield (slice(start, start + step), ...)

    def scratch(self, history: Array, leaf: Array, dtype: Any) -> Array:
        """An array of a leaf's shape, of any values, for one step's root and update; `history` tells
        which leaf it is."""
        return self.xp.empty_like(leaf, dtype=dtype)

    def cast(self, x: Array, dtype: Any) -> Array:
        """`x` in a dtype; itself where it has that already, which saves a call."""
        return x if x.dtype == dtype else self.xp.astype(x, dtype, copy=False)

    def to_leaves(self, x: Array) -> Array:
        """A flag or an index among the coefficients, as the kernels take it."""
        return x

    def least(self, dtype: Any) -> Any:
        """The smallest normal number of a dtype."""
        return self.xp.finfo(dtype).smallest_normal

    def store(self, array: Array, tile: Index, value: Array) -> Array:
        """`array` with `value` at the tile; consumes `array`."""
        if not self.in_place:
            return value
        array[tile] = value
        return array

    def finite(self, x: Array) -> Array:
        """`x` with zeros for what is not finite."""
        return self.xp.where(self.xp.isfinite(x), x, 0.0)

    def lerp(self, start: Array, end: Array, weight: Array) -> Array:
        """``start + weight * (end - start)`` with a 0-d weight; consumes neither."""
        return start + weight * (end - start)

    def blend(self, array: Array, tile: Index, value: Array, weight: Array, keep: Array) -> Array:
        """`array` moved by `weight` (0-d) towards a value at the tile where `keep` (0-d), whatever the
        value holds where not; consumes `array`."""
        old = array[tile]
        return self.store(array, tile, self.xp.where(keep, self.lerp(old, value, weight), old))

    def pick(self, array: Array, index: Array, axis: int) -> Array:
        """`array` at the positions of a 1-d index array along an axis."""
        if not self.indexes_by_array:
            return self.xp.take(array, index, axis=axis)
        return array[(slice(None),) * axis + (index, ...)]  # NumPy's take copies a strided array whole

    def put(self, array: Array, index: Array, axis: int, value: Array) -> Array:
        """`array` with `value` at the positions of a 1-d index array along an axis; consumes `array`."""
        where = (slice(None),) * axis
        if self.indexes_by_array:
            return xpx.at(array)[(*where, index, ...)].set(value)
        xp, length = self.xp, array.shape[axis]
        ring = xp.reshape(xp.arange(length), (-1,) + (1,) * (array.ndim - axis - 1))
        array[...] = xp.where(ring == index[0], value, array)
        return array

    def zeros(self, leaf: Array, leading: tuple[int, ...], dtype: Any) -> Array:
        """Zeros of the shape ``(*leading, *leaf.shape)``, placed like the leaf, which may be abstract."""
        return self.xp.zeros((*leading, *leaf.shape), dtype=dtype, device=self.device(leaf))

    def dot(self, a: Array, b: Array) -> Array:
        """Inner product over all axes, in the arrays' (full) precision."""
        return self.xp.matmul(self.xp.reshape(a, (-1,)), self.xp.reshape(b, (-1,)))

    def largest(self, x: Array) -> Array:
        """The largest magnitude, 0-d."""
        return self.xp.max(self.xp.abs(x))

    def times(self, rows: Array, x: Array) -> Array:
        """Inner products (2m,) of a tile's rows with a tile of a leaf, in the arrays' full precision."""
        return self.xp.matmul(rows, self.xp.reshape(x, (-1,)))

    def weighted(self, coefficients: Array, rows: Array, like: Array) -> Array:
        """The sum of a tile's rows with these weights, of the shape of `like`, in the arrays' full
        precision."""
        return self.xp.reshape(self.xp.matmul(coefficients, rows), like.shape)

    def inverse_power(self, x: Array, exponent: Any) -> Array:
        """``x ** -exponent`` of a positive array; by square roots where they suffice (far cheaper).
        May consume `x`."""
        roots = square_roots(exponent)
        if roots is None:
            return x**-exponent
        for _ in range(roots):
            x = self.xp.sqrt(x)
        return 1.0 / x

    def rows(self, history: Array, tile: Index, dtype: Any) -> Array:
        """The tile of a history as a matrix of 2m rows in `dtype`; a view where it can be."""
        part = history[(slice(None), slice(None), *tile)]
        return self.cast(self.xp.reshape(part, (2 * history.shape[1], -1)), dtype)

    repeat = staticmethod(repeat)
    """Runs the two loops of the recursion; see `mlbfgs_core.two_loop.two_loop`."""

    def after(self, flag: Array, sums: Array) -> Array:
        """`flag`, once `sums` are known: for a backend that orders its work by data alone."""
        return flag

    # The kernels. Each names the values it moves per parameter.

    def project(
        self,
        history: Array,
        grad: Array,
        mean_grad: Array | None,
        scatter_weight: Array,
        metric: Metric | None,
        dtype: Any,
    ) -> Projection:
        """Project a gradient on the stored rows; reads 2m + 1 values (+ 1 scatter, + 1 metric, of which
        it writes the root).

        Where `metric` has a weight, the gradient enters it first. `mean_grad` is None where no scatter
        is needed.
        """
        total: list[Array] = []
        inverse_root = None if metric is None else self.scratch(history, grad, dtype)
        for tile in self.tiles(grad):
            scaled = g = self.cast(grad[tile], dtype)
            parts = [self.dot(g, g)]
            if metric is not None:
                root = metric.inverse_root(self, tile, g)
                inverse_root = self.store(inverse_root, tile, root)
                scaled = g * root
                parts.append(self.dot(scaled, scaled))
            if mean_grad is not None:
                off = g - mean_grad[tile]
                off = off if metric is None else off * root
                parts.append(self.dot(off, off) * scatter_weight)
            parts.insert(0, self.times(self.rows(history, tile, dtype), scaled))
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
        rest = iter(total[2:])
        return Projection(
            total[0],
            total[1],
            None if metric is None else next(rest),
            None if mean_grad is None else next(rest),
            inverse_root,
        )

    def peak(self, leaf: Array, dtype: Any) -> Array:
        """The largest magnitude of a leaf in `dtype`, 0-d; 0 for one without values; reads 1 value."""
        total = None
        for tile in self.tiles(leaf):
            x = self.cast(leaf[tile], dtype)
            top = self.xp.sum(x) if math.prod(x.shape) == 0 else self.largest(x)
            total = top if total is None else self.xp.maximum(total, top)
        return total

    def scaled(self, leaf: Array, factor: Array, dtype: Any) -> Array:
        """``leaf * factor`` in `dtype`, a new array; moves 2 values."""
        return self.cast(leaf, dtype) * factor

    def square(self, leaf: Array, dtype: Any, factor: float = 1.0) -> Array:
        """Sum of squares of ``factor`` times a leaf's finite values, in `dtype`; reads 1 value."""
        total = None
        for tile in self.tiles(leaf):
            x = self.finite(self.cast(leaf[tile], dtype))
            x = x if factor == 1.0 else x * factor
            total = self.dot(x, x) if total is None else total + self.dot(x, x)
        return total

    def update_means(
        self,
        mean_params: Array,
        mean_grads: Array,
        metric: Metric | None,
        param: Array,
        grad: Array,
        weight: Array,
        keep: Array,
    ) -> tuple[Array, Array, Array | None]:
        """``M += weight * (x - M)`` of parameter, gradient and squared gradient; reads 4 values and
        writes 2 (+ 2 metric). Consumes the means. Nothing changes where `keep` (0-d) is false; a value of
        the parameter that is not finite enters as zero, so that it does not spoil the others' pairs."""
        dtype = mean_params.dtype
        moment = None if metric is None else metric.moment
        for tile in self.tiles(param):
            value = self.finite(self.cast(param[tile], dtype))
            mean_params = self.blend(mean_params, tile, value, weight, keep)
            g = self.cast(grad[tile], dtype)
            mean_grads = self.blend(mean_grads, tile, g, weight, keep)
            if metric is not None:
                moment = self.blend(moment, tile, g * g, metric.weight, keep)
        return mean_params, mean_grads, moment

    def pair(self, means: Means, metric: Metric | None, tile: Index, valid: Array) -> tuple[Array, Array]:
        """A tile of the differences ``s`` and ``y``, in the metric; zero where `valid` (0-d) is false.
        The caller may write to them."""
        xp = self.xp
        s = xp.where(valid, means.params[tile] - means.prev_params[tile], 0.0)
        y = xp.where(valid, means.grads[tile] - means.prev_grads[tile], 0.0)
        if metric is None:
            return s, y
        root = metric.inverse_root(self, tile)
        return s / root, y * root

    def damped_pair(
        self,
        means: Means,
        metric: Metric | None,
        tile: Index,
        valid: Array,
        inverse_norm: Array,
        damping: tuple[Array, Array],
    ) -> Array:
        """A tile of ``(s, a y + b s) * inverse_norm`` with ``(a, b) = damping``, stacked."""
        s, y = self.pair(means, metric, tile, valid)
        s, y = s * inverse_norm, y * inverse_norm
        return self.xp.stack([s, damping[0] * y + damping[1] * s])

    def pair_products(self, means: Means, metric: Metric | None, valid: Array) -> list[PairTile]:
        """Inner products of ``s`` and ``y``, tile by tile; reads 4 values (+ 1 metric)."""
        xp = self.xp
        products = []
        for tile in self.tiles(means.params):
            s, y = self.pair(means, metric, tile, valid)
            if math.prod(s.shape) == 0:
                zero = xp.sum(s)
                products.append(PairTile(zero, zero, zero, zero, zero))
                continue
            s_scale, y_scale = self.largest(s), self.largest(y)
            s /= xp.where(s_scale > 0, s_scale, 1.0)
            y /= xp.where(y_scale > 0, y_scale, 1.0)
            products.append(PairTile(s_scale, y_scale, self.dot(s, s), self.dot(s, y), self.dot(y, y)))
        return products

    def push(
        self,
        history: Array,
        slot: Array,
        means: Means,
        metric: Metric | None,
        valid: Array,
        inverse_norm: Array,
        damping: tuple[Array, Array],
        keep: Array,
        grad: Array | None,
    ) -> tuple[Array, Array]:
        """Store a pair (`write_pair`) and form its inner products (`gram`)."""
        history = self.write_pair(history, slot, means, metric, valid, inverse_norm, damping, keep)
        return history, self.gram(history, slot, grad, metric, means.params.dtype)

    def write_pair(
        self,
        history: Array,
        slot: Array,
        means: Means,
        metric: Metric | None,
        valid: Array,
        inverse_norm: Array,
        damping: tuple[Array, Array],
        keep: Array,
    ) -> Array:
        """Store ``(s, a y + b s) * inverse_norm`` with ``(a, b) = damping`` at a slot of the ring.

        Consumes the history; moves about 8 values. `slot` is an index array of shape (1,).
        """
        xp = self.xp
        for tile in self.tiles(means.params):
            new = self.damped_pair(means, metric, tile, valid, inverse_norm, damping)
            new = xp.expand_dims(self.cast(new, history.dtype), axis=1)
            where = (slice(None), slice(None), *tile)
            part = history[where]
            new = xp.where(keep, new, self.pick(part, slot, 1))
            part = self.put(part, slot, 1, new)
            history = history if self.in_place else part
        return history

    def gram(
        self, history: Array, slot: Array, grad: Array | None, metric: Metric | None, dtype: Any
    ) -> Array:
        """Inner products of the two rows at a slot, as stored: with all 2m rows, and with a gradient
        (0 where it is None). Shape (4m + 2,): those of `s`, of `y`, and the two; reads 2m values, and
        as many again where a tile does not fit the caches."""
        xp, total = self.xp, None
        m = history.shape[1]
        picked = xp.concat([slot, slot + m])
        for tile in self.tiles(history[0, 0, ...]):
            rows = self.rows(history, tile, dtype)
            new = self.cast(self.pick(rows, picked, 0), dtype)
            parts = [self.times(rows, new[0, ...]), self.times(rows, new[1, ...])]
            if grad is None:
                parts.append(xp.zeros_like(parts[0][:2]))
            else:
                g = self.cast(grad[tile], dtype)
                g = g if metric is None else g * metric.inverse_root(self, tile)
                parts.append(self.times(new, g))
            part = xp.concat(parts)
            total = part if total is None else total + part
        return total

    def rotate(self, means: Means, turn: Array, *, restart: bool) -> Means:
        """Where `turn` (0-d): the averages become the previous ones and, with `restart`, begin
        anew at zero. Consumes the averages; moves 8 values."""
        xp = self.xp
        params, grads, prev_params, prev_grads = means
        for tile in self.tiles(params):
            now_p, now_g = params[tile], grads[tile]
            prev_params = self.store(prev_params, tile, xp.where(turn, now_p, prev_params[tile]))
            prev_grads = self.store(prev_grads, tile, xp.where(turn, now_g, prev_grads[tile]))
            if restart:
                params = self.store(params, tile, xp.where(turn, 0.0, now_p))
                grads = self.store(grads, tile, xp.where(turn, 0.0, now_g))
        return Means(params, grads, prev_params, prev_grads)

    def combine(
        self,
        history: Array,
        grad: Array,
        coefficients: Array,
        gamma: Array,
        metric: Metric | None,
        keep: Array,
        dtype: Any,
    ) -> tuple[Array, Array | None]:
        """``gamma g + B^T c`` in `dtype`, and its sum of squares in a metric; zero where `keep` is
        false. Consumes the root that the metric has kept.

        Reads 2m + 1 values (+ 1 metric), writes 1.
        """
        xp, square = self.xp, None
        update = None if metric is None else metric.kept
        update = self.scratch(history, grad, dtype) if update is None else update
        for tile in self.tiles(grad):
            g = self.cast(grad[tile], dtype)
            root = None if metric is None else metric.inverse_root(self, tile)
            g = g if root is None else g * root
            d = gamma * g + self.weighted(coefficients, self.rows(history, tile, dtype), g)
            d = xp.where(keep, d if root is None else d * root, 0.0)
            if root is not None:
                square = self.dot(d, d) if square is None else square + self.dot(d, d)
            update = self.store(update, tile, d)
        return update, square

    def scale(self, update: Array, factor: Array, dtype: Any) -> Array:
        """``update * factor`` in `dtype`; consumes the update; moves 2 values."""
        scaled = update if update.dtype == dtype else self.xp.empty_like(update, dtype=dtype)
        for tile in self.tiles(update):
            scaled = self.store(scaled, tile, self.cast(update[tile] * factor, dtype))
        return scaled
