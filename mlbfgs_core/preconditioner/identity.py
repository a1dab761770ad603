"""No preconditioner: the method runs in the parameters' own coordinates, as published."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config import Config
    from ..kernels import Kernels
    from .kronecker import Matrix

__all__ = ["Identity"]

Array = Any


class Identity:
    """``R = I``, of every leaf and of every tile."""

    isometric = elementwise = True
    keeps = has_matrices = False
    names = ()

    def layout(
        self, config: Config, shape: tuple[int, ...], dtype: str, matrix: Matrix | None = None
    ) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Nothing is remembered."""
        return iter(())

    def root(
        self, config: Config, arrays: dict[str, Array], dtype: Any, weight: Array | None, floor: Array
    ) -> Identity:
        """The identity itself."""
        return self

    @property
    def arrays(self) -> dict[str, Array]:
        """There are none."""
        return {}

    @property
    def kept(self) -> None:
        """Nothing."""
        return None

    def keeping(self, kept: Array) -> Identity:
        """The identity itself."""
        return self

    def at(
        self, kernels: Kernels, tile: Any, grad: Array | None = None, out: Array | None = None
    ) -> Identity:
        """The identity itself."""
        return self

    def update(self, kernels: Kernels, grad: Array, keep: Array) -> Identity:
        """The identity itself."""
        return self

    def whiten(self, x: Array) -> Array:
        """`x`."""
        return x

    white = dual = back = whiten
