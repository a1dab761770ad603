"""The Kronecker preconditioner: running mean squares in the eigenbasis of each weight's two factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import array_api_extra as xpx

from .diagonal import Diagonal

if TYPE_CHECKING:
    from ..config import Config
    from ..kernels import Kernels

__all__ = ["FactorSums", "Kronecker", "KroneckerRoot", "Matrix", "is_basis_step"]

Array = Any

EARLY = (2, 4, 7)
"""The first steps after which bases are turned; then it is every `precondition_frequency` steps."""
RIDGE = 1e-6
"""What power iteration adds to a factor, in units of its largest eigenvalue: directions in which there was no
gradient keep their vectors, which rounding would otherwise choose."""
ROUNDING = 64.0
"""Mean squares below the square of this many roundings of the whole matrix are noise of the products."""
_SIDES = ("left", "right")
FactorSums = tuple[Callable[[Array], Array] | None, Callable[[Array], Array] | None]
"""What adds up a left factor, and a right one, over the shards that hold other parts of the same rows, or
columns; returns a new array. None: there are no others."""


class Matrix(NamedTuple):
    """How a leaf's values form matrices, ``count`` of them one after the other, row by row."""

    count: int  # type: ignore[assignment]  # hides the tuple's method
    """Number of matrices of equal shape."""
    rows: int
    columns: int
    left: bool
    """Whether rows have a factor; if not, theirs is the identity."""
    right: bool
    """Whether columns have one."""

    @classmethod
    def of(cls, shape: tuple[int, ...], largest: int, axes: tuple[int, int] = (0, 1)) -> Matrix | None:
        """The matrices of an array, or None if no side of them has a factor.

        Parameters
        ----------
        shape : tuple of int
        largest : int
            Longer sides keep the identity, as do sides of 1.
        axes : (int, int)
            How many leading axes count matrices, and how many of the following axes form their rows.

        Examples
        --------
        >>> Matrix.of((64, 32, 3, 3), 2048)
        Matrix(count=1, rows=64, columns=288, left=True, right=True)
        >>> Matrix.of((12, 768, 3072), 2048, (1, 1))
        Matrix(count=12, rows=768, columns=3072, left=True, right=False)
        """
        stacked, along = axes
        count, rows, columns = (
            math.prod(part)
            for part in (shape[:stacked], shape[stacked : stacked + along], shape[stacked + along :])
        )
        if len(shape) < stacked + 2 or count * rows * columns == 0:
            return None
        left, right = (1 < side <= largest for side in (rows, columns))
        return cls(count, rows, columns, left, right) if left or right else None

    @classmethod
    def found(cls, arrays: Mapping[str, Any], size: int) -> Matrix | None:
        """The matrices of a leaf of this many values, which has these arrays; None if it has no factor."""
        left, right = (arrays.get(f"{side}_factor") for side in _SIDES)
        if left is not None and right is not None:
            (count, rows), columns = left.shape[:2], right.shape[1]
        elif left is not None:
            count, rows = left.shape[:2]
            columns = size // max(count * rows, 1)
        elif right is not None:
            count, columns = right.shape[:2]
            rows = size // max(count * columns, 1)
        else:
            return None
        return cls(count, rows, columns, left is not None, right is not None)


def is_basis_step(config: Config, step: Array) -> Array:
    """Whether bases are turned after this accepted step; before the very first they are formed."""
    due = (step > 1) & (step % config.precondition_frequency == 0)
    for early in EARLY:
        due = due | (step == early)
    return due


class Kronecker(Diagonal):
    """``R = V^(-p/4) (U_L x U_R)^T``: mean squares `V` in the eigenbases of ``L = E[G G^T]`` and
    ``R = E[G^T G]``; leaves without a matrix have the diagonal.

    References
    ----------
    Vyas et al., SOAP, 2024, arXiv:2409.11321: Adam in the eigenbasis of Shampoo's factors (Gupta, Koren &
    Singer, ICML 2018), which one power iteration and a QR decomposition keep up to date. Difference from
    SOAP: curvature pairs are taken in these coordinates; the root is applied to gradient and direction.
    """

    has_matrices = True
    names = ("exp_avg_sq", *(f"{side}_{kind}" for side in _SIDES for kind in ("factor", "basis")))

    def layout(
        self, config: Config, shape: tuple[int, ...], dtype: str, matrix: Matrix | None = None
    ) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Mean squares of the leaf's shape; for each side with a factor two stacks of square matrices."""
        yield from super().layout(config, shape, dtype)
        if matrix is not None:
            for side, there, order in zip(_SIDES, matrix[3:], matrix[1:3], strict=True):
                if there:
                    yield f"{side}_factor", (matrix.count, order, order), dtype
                    yield f"{side}_basis", (matrix.count, order, order), dtype

    def root(
        self, config: Config, arrays: dict[str, Array], dtype: Any, weight: Array | None, floor: Array
    ) -> Any:
        """`R` of a leaf."""
        arrays = {name: array for name, array in arrays.items() if array is not None}
        matrix = Matrix.found(arrays, math.prod(arrays["exp_avg_sq"].shape))
        if matrix is None:
            return super().root(config, arrays, dtype, weight, floor)
        exponent, shape = config.preconditioner_power / 4, (matrix.count, matrix.rows, matrix.columns)
        return KroneckerRoot(arrays, weight, floor, exponent, config.factor_beta, shape)


class KroneckerRoot(NamedTuple):
    """`R` of one leaf during one step."""

    arrays: dict[str, Array]
    """Those of the layout that the leaf has."""
    weight: Array | None
    """0-d: the weight of this step's square in the mean squares; None if it has been added already."""
    floor: Array
    """0-d: what is added to mean squares."""
    exponent: Any
    """``p / 4``."""
    factor_beta: Any
    """Decay of the factors."""
    shape: tuple[int, int, int]
    """Count, rows and columns of the matrices."""
    kept: tuple[Array, Array] | None = None
    """The gradient in the eigenbasis, and ``V^(-p/4)``, both of the matrices' shape."""
    former: dict[str, Array] | None = None
    """The bases that the state has, if `arrays` may hold the first ones; `update` then writes them."""
    first: Array | None = None
    """0-d bool: whether it does."""

    @property
    def bases(self) -> dict[str, Array]:
        """Those arrays that are bases."""
        return {name: array for name, array in self.arrays.items() if name.endswith("basis")}

    @property
    def elementwise(self) -> bool:
        """Never: each value depends on those of its row and column."""
        return False

    @property
    def keeps(self) -> bool:
        """Always: the gradient's products are formed once a step."""
        return True

    def keeping(self, kept: tuple[Array, Array]) -> KroneckerRoot:
        """The same root with the gradient in the eigenbasis and the scales."""
        return self._replace(kept=kept)

    def at(
        self, kernels: Kernels, tile: Any, grad: Array | None = None, out: Array | None = None
    ) -> _Rotation:
        """`R` of the whole leaf; ``2 a b (a + b)`` operations if the gradient is given, for matrices of
        a x b."""
        xp, shape = kernels.leaf_xp, self.shape
        if grad is None and self.kept is not None:
            return _Rotation(kernels, self, *self.kept)
        v, trace = xp.reshape(self.arrays["exp_avg_sq"], shape), self._trace(kernels)
        rotated = entering = None
        if grad is not None:
            rotated = self.rotated(kernels, grad)
            if self.first is not None:
                rotated = self._resolved(kernels, rotated)
            if self.weight is not None:
                entering = rotated, self.weight
        # So that rounding of the products is not taken for gradients.
        floor = self.floor + (ROUNDING * xp.finfo(trace.dtype).eps) ** 2 * trace
        out = None if out is None else xp.reshape(out, shape)
        return _Rotation(kernels, self, rotated, kernels.diagonal(v, entering, floor, self.exponent, out))

    def update(self, kernels: Kernels, grad: Array, keep: Array) -> KroneckerRoot:
        """Add the gradient to mean squares and factors; ``2 a b (a + b)`` operations."""
        if self.weight is None or self.kept is None:
            return self
        xp, shape, arrays = kernels.leaf_xp, self.shape, dict(self.arrays)
        entering = xp.reshape(self.kept[0], arrays["exp_avg_sq"].shape)
        arrays["exp_avg_sq"] = kernels.average(
            arrays["exp_avg_sq"], entering, self.weight, keep, squared=True
        )
        G = xp.reshape(kernels.cast(grad, entering.dtype), shape)
        for side, factors in (("left", (G, _transposed(G))), ("right", (_transposed(G), G))):
            if (factor := arrays.get(f"{side}_factor")) is not None:
                arrays[f"{side}_factor"] = kernels.average_product(
                    factor, *factors, 1.0 - self.factor_beta, keep
                )
        for name, old in (self.former or {}).items():
            arrays[name] = kernels.store(old, None, xp.where(keep, arrays[name], old))
        return self._replace(arrays=arrays, weight=None, former=None, first=None)

    def formed(self, kernels: Kernels, grad: Array, due: Array, sums: FactorSums) -> dict[str, Array]:
        """`bases`, where `due` (0-d) of eigenvectors of a first gradient's products, which are formed here
        and added up over shards; consumes nothing."""
        xp, bases = kernels.leaf_xp, self.bases
        G = xp.reshape(kernels.cast(grad, self.arrays["exp_avg_sq"].dtype), self.shape)
        for side, total in zip(_SIDES, sums, strict=True):
            basis = bases.get(name := f"{side}_basis")
            if basis is None or 0 in basis.shape:
                continue
            X = G if side == "left" else _transposed(G)
            product = kernels.matmul(X, _transposed(X))
            product = product if total is None else total(product)
            usable = xp.all(xp.isfinite(product)) & due
            vectors = _eigenvectors(kernels, xp.where(usable, product, xp.zeros_like(product)))
            bases[name] = xp.where(due, vectors, basis)
        return bases

    def starting(self, bases: dict[str, Array], first: Array) -> KroneckerRoot:
        """The same root with these bases, which are new where `first` (0-d)."""
        return self._replace(arrays={**self.arrays, **bases}, former=self.bases, first=first)

    def turned(
        self, kernels: Kernels, history: Array | None, due: Array, sums: FactorSums
    ) -> tuple[KroneckerRoot, Array | None]:
        """New bases where `due` (0-d), by one power iteration with the factors of all shards and a QR
        decomposition; and the rows of the history in them, since a row is kept in the coordinates of its
        basis. Consumes both; with None there are none that need it."""
        xp, shape, arrays = kernels.leaf_xp, self.shape, dict(self.arrays)
        v = xp.reshape(arrays["exp_avg_sq"], shape)
        turns: list[Array | None] = []
        for axis, (side, total) in enumerate(zip(_SIDES, sums, strict=True), 1):
            factor = arrays.get(f"{side}_factor")
            if factor is None or 0 in factor.shape:
                turns.append(None)
                continue
            factor = factor if total is None else total(factor)
            basis = arrays[f"{side}_basis"]
            new, order = _iterated(kernels, factor, basis)
            new = kernels.chosen(due, new, basis)
            turns.append(None if history is None else kernels.matmul(_transposed(new), basis))
            v = kernels.ordered(v, order, axis)
            arrays[f"{side}_basis"] = kernels.store(basis, None, new)
        old = arrays["exp_avg_sq"]
        arrays["exp_avg_sq"] = kernels.store(old, None, kernels.chosen(due, xp.reshape(v, old.shape), old))
        if history is not None:
            history = self._rows(kernels, history, turns, due)
        return self._replace(arrays=arrays), history

    def rotated(self, kernels: Kernels, x: Array) -> Array:
        """``U_L^T X U_R``."""
        x = kernels.leaf_xp.reshape(x, self.shape)
        if "left_basis" in self.arrays:
            x = kernels.matmul(_transposed(self.arrays["left_basis"]), x)
        return kernels.matmul(x, self.arrays["right_basis"]) if "right_basis" in self.arrays else x

    def restored(self, kernels: Kernels, x: Array, like: tuple[int, ...]) -> Array:
        """``U_L X U_R^T``, of this shape."""
        if "left_basis" in self.arrays:
            x = kernels.matmul(self.arrays["left_basis"], x)
        if "right_basis" in self.arrays:
            x = kernels.matmul(x, _transposed(self.arrays["right_basis"]))
        return kernels.leaf_xp.reshape(x, like)

    def _resolved(self, kernels: Kernels, rotated: Array) -> Array:
        """A first gradient in its own basis, without what only rounding has put there: its mean squares are
        that gradient's, so the smallest value would count as much as the largest."""
        xp, squares = kernels.leaf_xp, rotated * rotated
        least = xp.finfo(rotated.dtype).eps * xp.sum(squares, axis=(1, 2), keepdims=True)
        return xp.where(self.first & (squares <= least), xp.zeros_like(rotated), rotated)

    def _trace(self, kernels: Kernels) -> Array:
        """(count, 1, 1): the running squared norm of the matrices."""
        xp, factor = kernels.leaf_xp, self.arrays.get("left_factor", self.arrays.get("right_factor"))
        return xp.sum(xp.linalg.diagonal(factor), axis=-1)[:, None, None]

    def _rows(self, kernels: Kernels, history: Array, turns: Sequence[Array | None], due: Array) -> Array:
        """The rows of a history in other bases, as many at a time as fit a tile if memory can be written."""
        xp, dtype, m = kernels.leaf_xp, self.arrays["exp_avg_sq"].dtype, history.shape[1]
        # Where arrays cannot be written to, a compiler still may: then half of the history at a time.
        some = max(1, kernels.tile // max(1, math.prod(self.shape))) if kernels.in_place else m
        for kind, first in product(range(2), range(0, m, some)):
            place = (kind, slice(first, min(first + some, m)), ...)
            rows = history[place]
            own = kernels.cast(xp.reshape(rows, (rows.shape[0], *self.shape)), dtype)
            new = kernels.cast(xp.reshape(_turned(kernels, own, turns), rows.shape), history.dtype)
            history = xpx.at(history)[place].set(kernels.chosen(due, new, rows))
        return history


class _Rotation(NamedTuple):
    """`R` of a whole leaf."""

    kernels: Kernels
    root: KroneckerRoot
    rotated: Array | None
    """The gradient in the eigenbasis."""
    scale: Array

    @property
    def kept(self) -> tuple[Array | None, Array]:
        """What `KroneckerRoot.keeping` takes."""
        return self.rotated, self.scale

    def white(self, grad: Array) -> Array:
        """``R g``."""
        rotated = self.root.rotated(self.kernels, grad) if self.rotated is None else self.rotated
        return self.kernels.leaf_xp.reshape(self.kernels.product(rotated, self.scale), grad.shape)

    def whiten(self, x: Array) -> Array:
        """``R x``."""
        rotated = self.root.rotated(self.kernels, x)
        rotated *= self.scale
        return self.kernels.leaf_xp.reshape(rotated, x.shape)

    def dual(self, x: Array) -> Array:
        """``R^-T x``."""
        rotated = self.root.rotated(self.kernels, x)
        rotated /= self.scale
        return self.kernels.leaf_xp.reshape(rotated, x.shape)

    def back(self, x: Array) -> Array:
        """``R^T x``."""
        scaled = self.kernels.leaf_xp.reshape(x, self.root.shape)
        scaled *= self.scale
        return self.root.restored(self.kernels, scaled, x.shape)


def _turned(kernels: Kernels, x: Array, turns: Sequence[Array | None]) -> Array:
    """``T_L X T_R^T``; None stands for the identity."""
    left, right = turns
    x = x if left is None else kernels.matmul(left, x)
    return x if right is None else kernels.matmul(x, _transposed(right))


def _eigenvectors(kernels: Kernels, factor: Array) -> Array:
    """Eigenvectors of factors (N, n, n) by falling eigenvalue. Where there was no gradient any basis would
    do, so it is completed in one way that does not depend on the library: by the first coordinates that are
    not dead, and then by those that are. The same is done for all if the library finds no eigenvectors."""
    xp, n, dead = kernels.leaf_xp, factor.shape[-1], _dead(factor, kernels.leaf_xp)
    top = xp.max(xp.abs(factor), axis=(-2, -1), keepdims=True)
    values, vectors = kernels.eigh(factor / xp.where(top > 0, top, 1.0))
    found = xp.all(xp.isfinite(vectors), axis=(-2, -1)) & xp.all(xp.isfinite(values), axis=-1)
    vectors = xp.where(found[:, None, None], vectors, xp.zeros_like(vectors))
    values, vectors = xp.flip(values, axis=-1), xp.flip(vectors, axis=-1)
    known = found[:, None] & (values > n * xp.finfo(factor.dtype).eps * values[:, :1])
    spanned = vectors * xp.astype(known, factor.dtype)[:, None, :]
    rest = _unit(kernels, factor) - kernels.matmul(spanned, _transposed(spanned))
    rank = xp.sum(xp.astype(known, xp.int32), axis=-1, keepdims=True)
    place = xp.arange(n, dtype=rank.dtype, device=kernels.device(factor))[None, :] - rank
    place = xp.where(place < 0, xp.zeros_like(place), place)
    alive_first = xp.argsort(xp.astype(dead, xp.int32), axis=-1, stable=True)
    place = xp.take_along_axis(alive_first, place, axis=-1)
    others = xp.take_along_axis(rest, xp.broadcast_to(place[:, None, :], rest.shape), axis=-1)
    columns = xp.where(known[:, None, :], vectors, others)
    return _orthonormal(kernels, _apart(kernels, columns, dead), dead)


def _iterated(kernels: Kernels, factor: Array, basis: Array) -> tuple[Array, Array]:
    """Bases after one power iteration, and the order (N, n) into which vectors are brought before, by falling
    eigenvalue."""
    xp = kernels.leaf_xp
    image = kernels.matmul(factor, basis)
    values = xp.sum(basis * image, axis=-2)
    values = xp.where(values > 0, values, xp.zeros_like(values))  # so that dead coordinates stay the last
    order = xp.argsort(values, axis=-1, descending=True, stable=True)
    top = xp.max(values, axis=-1)[:, None, None]
    image = image * xp.where(top > 0, 1.0 / xp.where(top > 0, top, 1.0), 0.0)
    image += RIDGE * basis
    return _orthonormal(kernels, kernels.ordered(image, order, 2), _dead(factor, xp)), order


def _orthonormal(kernels: Kernels, columns: Array, dead: Array) -> Array:
    """Orthonormal columns that span the same, each on the side of its own; dead coordinates come last."""
    xp = kernels.leaf_xp
    q, r = xp.linalg.qr(columns)
    diagonal = xp.linalg.diagonal(r)
    q = q * xp.where(diagonal < 0, -xp.ones_like(diagonal), xp.ones_like(diagonal))[:, None, :]
    return _apart(kernels, q, dead)


def _dead(factor: Array, xp: Any) -> Array:
    """(N, n): the rows or columns of a weight that never had a gradient, such as an embedding's padding."""
    return xp.linalg.diagonal(factor) == 0


def _apart(kernels: Kernels, columns: Array, dead: Array) -> Array:
    """Columns (N, n, n) without the dead coordinates, which have the last columns for themselves: so what has
    no gradient does not move, not even by rounding."""
    xp, n = kernels.leaf_xp, columns.shape[-1]
    if kernels.known(xp.any(dead)) is False:
        return columns
    number = xp.cumulative_sum(xp.astype(dead, xp.int32), axis=-1)
    first = n - number[:, -1:]
    place = xp.arange(n, dtype=number.dtype, device=kernels.device(columns))[None, :]
    own = dead[:, :, None] & (place[:, None, :] == (first + number - 1)[:, :, None])
    others = dead[:, :, None] | (place >= first)[:, None, :]
    return xp.where(others, xp.astype(own, columns.dtype), columns)


def _unit(kernels: Kernels, like: Array) -> Array:
    return kernels.leaf_xp.eye(like.shape[-1], dtype=like.dtype, device=kernels.device(like))[None, ...]


def _transposed(x: Array) -> Array:
    try:
        return x.mT
    except AttributeError:  # CuPy before version 14
        return x.swapaxes(-1, -2)
