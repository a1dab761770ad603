"""Which arrays share memory: told by their addresses, without reading a value, on any device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Overlap", "Place", "find_overlap"]

Array = Any
_MOST_WORK = 10_000
"""The most work that `numpy.shares_memory` may do for one question; slices and transposes need little."""


class Place(NamedTuple):
    """Where the values of an array lie, in bytes."""

    start: int
    """Address of the first value."""
    width: int
    """Size of one value."""
    shape: Sequence[int]
    strides: Sequence[int]


class Overlap(NamedTuple):
    """Two arrays that share memory; or twice the same array, if some of its values lie at the same place."""

    first: int
    second: int
    certain: bool
    """False where the question was too hard to be decided."""


def find_overlap(places: Sequence[Place]) -> Overlap | None:
    """The first overlap among arrays of any strides.

    Notes
    -----
    Arrays are sorted by their addresses, and only those that may meet are compared closely, so that thousands
    of arrays take milliseconds, even if all are views of one.
    """
    blocks = {i: _Blocks.of(place) for i, place in enumerate(places) if math.prod(place.shape)}
    for i, own in blocks.items():
        for part, others in own.parts():
            if (shared := _share(part, others)) is not False:
                return Overlap(i, i, bool(shared))
    for i, j in _candidates(blocks):
        if (shared := _share(blocks[i], blocks[j])) is not False:
            return Overlap(min(i, j), max(i, j), bool(shared))
    return None


class _Blocks:
    """Where an array lies: blocks of contiguous bytes at equal distances along some axes."""

    def __init__(self, start: int, width: int, axes: Sequence[tuple[int, int]]):
        self.start, self.width = start, width
        self.axes = axes
        """Distance and number along each axis, in rising order."""
        self.stop = start + width + sum((number - 1) * distance for distance, number in axes)

    @classmethod
    def of(cls, place: Place) -> _Blocks:
        """The blocks of an array that is not empty."""
        pairs = list(zip(place.strides, place.shape, strict=True))
        start = place.start + sum((number - 1) * stride for stride, number in pairs if stride < 0)
        axes = sorted((abs(stride), number) for stride, number in pairs if number > 1)
        width = place.width
        while axes and axes[0][0] == width:
            width *= axes.pop(0)[1]
        return cls(start, width, axes)

    def parts(self) -> Iterator[tuple[_Blocks, _Blocks]]:
        """Pairs of parts: if any two blocks share memory, so do the parts of at least one pair.

        Take two such blocks, and the first axis along which their places differ. Only differences count, so
        one of the two may be assumed to be the first along this axis and along those before it.
        """
        reach = self.width
        for distance, number in self.axes:
            if distance < reach:
                break
            reach += (number - 1) * distance
        else:
            return  # each axis steps over all that those before it reach
        for i, (distance, number) in enumerate(self.axes):
            rest = self.axes[i + 1 :]
            others = [(distance, number - 1), *rest]
            yield (
                _Blocks(self.start, self.width, rest),
                _Blocks(self.start + distance, self.width, others),
            )

    @cached_property
    def view(self) -> Array:
        """An array at this place for NumPy, which uses only its address, even if that is on a GPU."""
        return np.asarray(_At(self))


class _At:
    def __init__(self, blocks: _Blocks):
        distances, numbers = zip(*blocks.axes, strict=True) if blocks.axes else ((), ())
        self.__array_interface__ = {
            "version": 3,
            "data": (blocks.start, True),
            "shape": (*numbers, blocks.width),
            "strides": (*distances, 1),
            "typestr": "|u1",
        }


def _candidates(blocks: dict[int, _Blocks]) -> Iterator[tuple[int, int]]:
    """Pairs that may share memory."""
    for group in _touching({i: (own.start, own.stop) for i, own in blocks.items()}):
        # Interleaved views: all their distances are multiples of one step, within which each view has its
        # own place.
        step = math.gcd(*(distance for i in group for distance, _ in blocks[i].axes))
        if step == 0 or any(blocks[i].width > step for i in group):
            yield from _pairs(group)
            continue
        places = {i: (blocks[i].start % step, blocks[i].start % step + blocks[i].width) for i in group}
        behind = {~i: (start - step, stop - step) for i, (start, stop) in places.items() if stop > step}
        for part in _touching({**places, **behind}):
            yield from _pairs(sorted({max(i, ~i) for i in part}))


def _touching(ranges: dict[int, tuple[int, int]]) -> Iterator[list[int]]:
    """Groups of two or more whose half-open ranges are connected."""
    group: list[int] = []
    reach = 0
    for i in sorted(ranges, key=ranges.__getitem__):
        if group and ranges[i][0] >= reach:
            if len(group) > 1:
                yield group
            group = []
        reach = max(reach, ranges[i][1]) if group else ranges[i][1]
        group.append(i)
    if len(group) > 1:
        yield group


def _pairs(group: Sequence[int]) -> Iterator[tuple[int, int]]:
    return ((i, j) for place, i in enumerate(group) for j in group[:place])


def _share(one: _Blocks, other: _Blocks) -> bool | None:
    """Whether two share memory; None where that is too hard to decide."""
    try:
        # NumPy's stub knows 0 and -1 only.
        return np.shares_memory(one.view, other.view, max_work=_MOST_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return None
