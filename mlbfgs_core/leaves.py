"""Parameters as the core sees them: flat leaves, in which small ones lie side by side; and back.

How a single parameter lies in memory, with its strides and complex numbers, is the adapter's business: a
`Member` makes a flat array of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from array_api_compat import array_namespace

from .blocks import Blocks
from .preconditioner import Matrix

__all__ = ["FlatLeaf", "Member", "pack"]

Array = Any
LARGEST = 2**26
"""The most values in a leaf of several parameters."""


class Member(Protocol):
    """One parameter in a leaf."""

    @property
    def size(self) -> int:
        """Number of real values."""
        ...

    @property
    def dense(self) -> bool:
        """Whether `flat` of the parameter is a view of its memory."""
        ...

    @property
    def matrix(self) -> Matrix | None:
        """How `flat` forms matrices, if it does; only such members lie side by side whose matrices are of one
        kind."""
        ...

    def flat(self, array: Array) -> Array:
        """An array like the parameter (or several, along leading axes), as one axis of real values."""
        ...

    def shaped(self, flat: Array) -> Array:
        """The inverse of `flat`, a view."""
        ...


_Member = TypeVar("_Member", bound=Member)


class FlatLeaf(Generic[_Member]):
    """One leaf of the core: parameters of one block and kind, side by side.

    Parameters
    ----------
    members : sequence of Member
    """

    def __init__(self, members: Sequence[_Member]) -> None:
        self.members = tuple(members)
        self.is_view = len(members) == 1 and members[0].dense
        """Whether `gather` of the parameters returns their own memory."""

    def gather(self, arrays: Sequence[Array]) -> Array:
        """One array per member (or several, along leading axes) as a flat one."""
        flats = [member.flat(array) for member, array in zip(self.members, arrays, strict=True)]
        return flats[0] if len(flats) == 1 else self.joined(flats)

    def joined(self, flats: Sequence[Array]) -> Array:
        """Flat arrays, one after the other."""
        return array_namespace(*flats).concat(flats, axis=-1)

    def cut(self, flat: Array) -> list[Array]:
        """Each member's part of a flat array, itself flat; views."""
        parts, start = [], 0
        for member in self.members:
            parts.append(flat[..., start : start + member.size])
            start += member.size
        return parts

    @property
    def matrix(self) -> Matrix | None:
        """The matrices of all members; None if they form none."""
        first = self.members[0].matrix
        return first and first._replace(count=sum(m.matrix.count for m in self.members if m.matrix))

    def stacked(self, arrays: Sequence[Array]) -> Array:
        """Stacks with an array for each matrix, one stack per member, as one."""
        return arrays[0] if len(arrays) == 1 else array_namespace(*arrays).concat(arrays, axis=0)

    def stacks(self, stack: Array) -> list[Array]:
        """The inverse of `stacked`; views."""
        parts, start = [], 0
        for member in self.members:
            count = 0 if member.matrix is None else member.matrix.count
            parts.append(stack[start : start + count, ...])
            start += count
        return parts

    def spread(self, flat: Array) -> Sequence[Array]:
        """Each member's part of a flat array, in the member's shape; views."""
        return [m.shaped(part) for m, part in zip(self.members, self.cut(flat), strict=True)]


def pack(
    sizes: Sequence[int], kinds: Sequence[Hashable | None], blocks: Blocks, largest: int = LARGEST
) -> tuple[list[tuple[int, ...]], Blocks]:
    """Which parameters share a leaf.

    Parameters
    ----------
    sizes : sequence of int
        Number of values of each parameter.
    kinds : sequence of hashable or None
        Parameters of one block and of equal kinds may lie side by side; None: this one lies alone.
    blocks : tuple of tuples of int
        Blocks of parameters.
    largest : int
        The most values in a leaf of several parameters.

    Returns
    -------
    groups : list of tuples of int
        The parameters of each leaf, block after block.
    blocks : tuple of tuples of int
        Blocks of leaves.

    Examples
    --------
    >>> pack([3, 500, 4, 2], ["small", None, "small", "small"], ((0, 1, 2), (3,)))
    ([(0, 2), (1,), (3,)], ((0, 1), (2,)))
    """
    groups: list[tuple[int, ...]] = []
    of_leaves = []
    for block in blocks:
        packs: list[list[int]] = []
        latest: dict[Hashable, int] = {}
        filled: dict[int, int] = {}
        for index in block:
            kind = kinds[index]
            place = None if kind is None else latest.get(kind)
            if place is None or filled[place] + sizes[index] > largest:
                place = len(packs)
                packs.append([])
                filled[place] = 0
                if kind is not None:
                    latest[kind] = place
            packs[place].append(index)
            filled[place] += sizes[index]
        of_leaves.append(tuple(range(len(groups), len(groups) + len(packs))))
        groups += map(tuple, packs)
    return groups, tuple(of_leaves)
