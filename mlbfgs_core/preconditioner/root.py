"""The contract of a preconditioner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..config import Config
    from ..kernels import Kernels
    from .kronecker import Matrix

__all__ = ["Preconditioner", "Root", "TileRoot"]

Array = Any


class TileRoot(Protocol):
    """`R` on a tile of a leaf, or on all of it. Arrays are of the leaf's shape and its averages' dtype."""

    @property
    def kept(self) -> Any:
        """This tile's part of what `Root.keeping` takes, of the tile's shape; None if there is nothing. Of a
        root that is not `elementwise` it is whatever the root wants."""
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
        """``R^T x``, for directions; consumes `x` and what is kept, whose memory the result may use."""
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
        """What the state remembers of it, by name."""
        ...

    @property
    def keeps(self) -> bool:
        """Whether its tiles have something to keep."""
        ...

    @property
    def kept(self) -> Any:
        """What `keeping` was given."""
        ...

    def at(
        self, kernels: Kernels, tile: Any, grad: Array | None = None, out: Array | None = None
    ) -> TileRoot:
        """`R` at a tile, which is None for a root that is not `elementwise`.

        If that tile's gradient is given, `R` is as it will be once `update` has added the gradient. What the
        tile keeps may be written to `out`, an array of its shape.
        """
        ...

    def keeping(self, kept: Any) -> Root:
        """The same root with what its tiles have `kept`, for the rest of the step: an array of the leaf's
        shape, which the last pass overwrites with the update, if the root is `elementwise`."""
        ...

    def update(self, kernels: Kernels, grad: Array, keep: Array) -> Root:
        """Add the gradient if `keep` (0-d) is true. If it is false, nothing changes, whatever the gradient
        holds.

        Consumes the arrays. If ``kernels.in_place``, it must write to them and return a root that holds the
        same ones, since an adapter may have handed out views of them.
        """
        ...


class Preconditioner(Protocol):
    """One kind of `R`, for leaves of any shape."""

    @property
    def isometric(self) -> bool:
        """Whether ``|R x| = |x|``: then norms need not be computed again after it."""
        ...

    @property
    def has_matrices(self) -> bool:
        """Whether a leaf's values form matrices: then whitening costs products, and bases are formed
        before the first step and turned after later ones (see `KroneckerRoot`)."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all arrays that `layout` may give."""
        ...

    def layout(
        self, config: Config, shape: tuple[int, ...], dtype: str, matrix: Matrix | None = None
    ) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Name, shape and dtype of each array that the state holds for a leaf, whose averages are of this
        dtype, and whose values form these matrices. The arrays start as zeros, bases as identities."""
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
            The weight of this step's gradient in running means of squares; None if it has been added already.
        floor : 0-d array
            What is added to mean squares, so that `R` is defined where gradients have always been zero.
        """
        ...
