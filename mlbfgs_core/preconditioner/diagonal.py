"""The diagonal preconditioner: Adam's running mean of squared gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..config import Config
    from ..kernels import Kernels
    from .kronecker import Matrix

__all__ = ["Diagonal", "DiagonalRoot"]

Array = Any


class Diagonal:
    """``R = diag((v + floor) ** (-p / 4))`` with the running mean `v` of squared gradients.

    References
    ----------
    Kingma & Ba, ICLR 2015: the bias-corrected mean of squares; with ``p = 1`` ``R^T R`` is Adam's diagonal.
    """

    isometric = has_matrices = False
    names: tuple[str, ...] = ("exp_avg_sq",)

    def layout(
        self, config: Config, shape: tuple[int, ...], dtype: str, matrix: Matrix | None = None
    ) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """One array of the leaf's shape."""
        yield "exp_avg_sq", shape, dtype

    def root(
        self, config: Config, arrays: dict[str, Array], dtype: Any, weight: Array | None, floor: Array
    ) -> DiagonalRoot:
        """`R` of a leaf."""
        return DiagonalRoot(arrays["exp_avg_sq"], weight, floor, config.preconditioner_power / 4)


class DiagonalRoot(NamedTuple):
    """`R` of one leaf during one step."""

    exp_avg_sq: Array
    """`v`, of the leaf's shape."""
    weight: Array | None
    """0-d: the weight of this step's square in `v`; None if it has been added already."""
    floor: Array
    """0-d: what is added to `v`."""
    exponent: Any
    """``p / 4``."""
    kept: Array | None = None
    """The diagonal itself, of the leaf's shape."""

    @property
    def elementwise(self) -> bool:
        """Always: a diagonal acts on each value alone."""
        return True

    @property
    def keeps(self) -> bool:
        """Always: the diagonal."""
        return True

    @property
    def arrays(self) -> dict[str, Array]:
        """The mean of squares."""
        return {"exp_avg_sq": self.exp_avg_sq}

    def keeping(self, kept: Array) -> DiagonalRoot:
        """The same root with its diagonal."""
        return self._replace(kept=kept)

    def at(
        self, kernels: Kernels, tile: Any, grad: Array | None = None, out: Array | None = None
    ) -> _Scaling:
        """`R` at a tile; reads 1 value."""
        if self.kept is not None:
            return _Scaling(kernels, self.kept if tile is None else self.kept[tile])
        v = self.exp_avg_sq if tile is None else self.exp_avg_sq[tile]
        entering = None if grad is None or self.weight is None else (grad, self.weight)
        return _Scaling(kernels, kernels.diagonal(v, entering, self.floor, self.exponent, out))

    def update(self, kernels: Kernels, grad: Array, keep: Array) -> DiagonalRoot:
        """Add the gradient's square to the mean; reads 2 values, writes 1."""
        if self.weight is None:
            return self
        entered = kernels.average(self.exp_avg_sq, grad, self.weight, keep, squared=True)
        return self._replace(exp_avg_sq=entered, weight=None)


class _Scaling(NamedTuple):
    """The diagonal at a tile."""

    kernels: Kernels
    kept: Array

    def white(self, grad: Array) -> Array:
        """``R g``."""
        return self.kernels.product(grad, self.kept)

    def whiten(self, x: Array) -> Array:
        """``R x``."""
        x *= self.kept
        return x

    def dual(self, x: Array) -> Array:
        """``R^-1 x``."""
        x /= self.kept
        return x

    def back(self, x: Array) -> Array:
        """``R x``, since `R` is symmetric."""
        kept = self.kept
        kept *= x
        return kept
