"""The contract of a preconditioner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..config import Config
    from ..kernels import Kernels

__all__ = ["Preconditioner", "Root", "TileRoot"]

Array = Any


class TileRoot(Protocol):
    """`R` on a tile of a leaf, or on all of it. Arrays are of the leaf's shape and its averages' dtype."""

    @property
    def kept(self) -> Array | None:
        """What `Root.keeping` is to be handed of this tile, of its shape; None where there is nothing."""
        ...

    def white(self, grad: Array) -> Array:
        """``R g`` of this step's gradient: a new array, or the gradient where `R` leaves it as it is."""
        ...

    def whiten(self, x: Array) -> Array:
        """``R x``, for differences of gradients; consumes `x`."""
        ...

    def dual(self, x: Array) -> Array:
        """``R^-T x``, for differences of parameters, so that ``dual(s) . whiten(y) = s . y``; consumes
        `x`."""
        ...

    def back(self, x: Array) -> Array:
        """``R^T x``, for directions; consumes `x` and what is kept, in whose memory the result may be."""
        ...


class Root(Protocol):
    """`R` of one leaf during one step."""

    @property
    def elementwise(self) -> bool:
        """Whether each value of ``R x`` depends on the same value of `x` alone, so that a leaf may be packed
        with others, tiled and sharded."""
        ...

    @property
    def arrays(self) -> dict[str, Array]:
        """What the state remembers of it, by names."""
        ...

    @property
    def keeps(self) -> bool:
        """Whether its tiles have something to keep."""
        ...

    @property
    def kept(self) -> Array | None:
        """What `keeping` was handed."""
        ...

    def at(
        self, kernels: Kernels, tile: Any, grad: Array | None = None, out: Array | None = None
    ) -> TileRoot:
        """`R` at a tile, which is None for a leaf that is not `elementwise`.

        With a gradient of that tile: as `R` will be once the gradient has been entered by `update`. What the
        tile keeps may be put into `out`, of its shape.
        """
        ...

    def keeping(self, kept: Array) -> Root:
        """The same with what its tiles have `kept`, an array of the leaf's shape, for the rest of the step,
        whose last pass writes the update over it."""
        ...

    def update(self, kernels: Kernels, grad: Array, keep: Array) -> Root:
        """Enter the gradient where `keep` (0-d) is true; consumes the arrays. Where it is false nothing
        changes, whatever the gradient holds."""
        ...


class Preconditioner(Protocol):
    """One kind of `R`, for leaves of any shape."""

    @property
    def isometric(self) -> bool:
        """Whether ``|R x| = |x|``: then norms need not be formed anew behind it."""
        ...

    def layout(
        self, config: Config, shape: tuple[int, ...], dtype: str
    ) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Name, shape and dtype of each array that the state holds for a leaf, whose averages are of this
        dtype; zeros in the beginning."""
        ...

    def root(
        self, config: Config, arrays: dict[str, Array], dtype: Any, weight: Array | None, floor: Array
    ) -> Root:
        """`R` of a leaf.

        Parameters
        ----------
        config : Config
        arrays : dict
            Those of `layout`.
        dtype : data-type
            Of the leaf's averages.
        weight : 0-d array or None
            Of this step's gradient in running means of squares; None where it has been entered already.
        floor : 0-d array
            What is added to mean squares, so that `R` is defined where gradients have always been zero.
        """
        ...
