"""Parameters as the core sees them: flat leaves of real values, in the order in which they lie in memory, or
in that of their axes if they form matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from mlbfgs_core.adapter import FlatLeaf, Matrix

__all__ = ["Array", "Leaf", "Like", "Member", "real"]

Array = Any


def real(array: Array) -> Array:
    """A complex array of any strides as pairs of reals along a new last axis, a view; a real one itself."""
    return array[..., None].view(array.real.dtype) if array.dtype.kind == "c" else array


class Like(NamedTuple):
    """What the core must know about a leaf to lay out its state."""

    shape: tuple[int, ...]
    dtype: Any


class Member(NamedTuple):
    """A parameter, and how it lies in memory."""

    name: str
    array: Array
    shape: tuple[int, ...]
    """Shape of the real values: a complex parameter has a last axis of 2."""
    order: tuple[int, ...]
    """Axes from the largest stride to the smallest; in their own order if there are matrices, whose rows and
    columns are those of the parameter wherever it lies."""
    inverse: tuple[int, ...]
    """The permutation that undoes `order`."""
    plain: bool
    """Whether the parameter is real and its axes lie in their order."""
    dense: bool
    """Whether `flat` of the parameter is a view."""
    size: int
    """Number of real values."""
    given: tuple[tuple[int, ...], tuple[int, ...], Any]
    """Shape, strides and dtype of the parameter when it was given."""
    matrix: Matrix | None = None
    """How the values form matrices, if the preconditioner has a use for them."""

    @property
    def like(self) -> Like:
        """Shape and dtype of the real values."""
        return Like(self.shape, real(self.array).dtype)

    @classmethod
    def of(cls, name: str, array: Array, matrix: Matrix | None = None) -> Member:
        """A member with the layout of its parameter."""
        view = real(array)
        axes = tuple(range(view.ndim))
        order = axes if matrix else tuple(sorted(axes, key=lambda axis: -view.strides[axis]))
        inverse = tuple(sorted(axes, key=order.__getitem__))
        plain, dense = view is array and order == axes, view.transpose(order).flags.c_contiguous
        given = array.shape, array.strides, array.dtype
        return cls(
            name, array, view.shape, order, inverse, plain, dense, math.prod(view.shape), given, matrix
        )

    @property
    def kind(self) -> tuple[Any, ...]:
        """Members of one block may share a leaf if this is the same: their dtype, and the shape of their
        matrices."""
        return self.array.dtype, self.matrix and self.matrix[1:]

    def check(self) -> None:
        """Raise ValueError if the parameter has been given another form since then: NumPy allows assigning an
        array's shape, strides and dtype, and resizing it."""
        array = self.array
        now = array.shape, array.strides, array.dtype
        if now != self.given:
            had, has = (f"shape {x[0]}, strides {x[1]} and dtype {x[2]}" for x in (self.given, now))
            msg = f"`params` must keep the form in which they were given, {had} for {self.name!r}, got {has}"
            raise ValueError(msg)

    def flat(self, array: Array) -> Array:
        """An array like the parameter (or several, along leading axes), as one axis, its axes in `order`."""
        array = array if self.plain else real(array)
        lead = array.ndim - len(self.order)
        if not self.plain:
            array = array.transpose((*range(lead), *(lead + axis for axis in self.order)))
        return array.reshape((*array.shape[:lead], self.size))

    def shaped(self, flat: Array) -> Array:
        """The inverse of `flat`, a view."""
        lead = flat.shape[:-1]
        if self.plain:
            return flat.reshape((*lead, *self.shape))
        spread = flat.reshape((*lead, *(self.shape[axis] for axis in self.order)))
        return spread.transpose((*range(len(lead)), *(len(lead) + axis for axis in self.inverse)))


class Leaf(FlatLeaf[Member]):
    """One leaf of the core: parameters of one block and `Member.kind`, side by side.

    Parameters
    ----------
    members : sequence of Member
        The members of all parameters.
    indices : sequence of int
        Which of them lie in this leaf.
    """

    def __init__(self, members: Sequence[Member], indices: Sequence[int]) -> None:
        super().__init__([members[i] for i in indices])
        self.indices = tuple(indices)
        self._plain = len(self.members) > 1 and all(member.plain for member in self.members)

    def like(self) -> Like:
        """Shape and dtype of the leaf."""
        return Like((sum(member.size for member in self.members),), self.members[0].like.dtype)

    def params(self) -> Array:
        """The parameters' values."""
        return self.gather([member.array for member in self.members])

    def gather(self, arrays: Sequence[Array]) -> Array:
        """One array per member (or several, along leading axes) as a flat one."""
        if self._plain and arrays[0].ndim == len(self.members[0].shape):
            return array_namespace(arrays[0]).concat(arrays, axis=None)
        return super().gather(arrays)

    def write(self, flat: Array) -> None:
        """Put a flat array's values into the parameters."""
        for member, part in zip(self.members, self.spread(flat), strict=True):
            target = member.array if member.plain else real(member.array)
            target[...] = part
