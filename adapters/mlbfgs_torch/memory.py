"""Where parameters lie: each needs memory of its own, since a step reads all of them and then writes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .sharding import local

__all__ = ["check_memory"]

_MAX_WORK = 10**4
"""Candidates that `np.shares_memory` looks at before two views count as overlapping."""
_MAX_VALUES = 2**16
"""Values of a view whose addresses are compared one by one."""


@dataclass(frozen=True, eq=False)
class _Span:
    """A parameter in memory."""

    name: str
    tensor: Tensor
    space: Any
    """What its addresses count in: a device, or the storage of a tensor without memory."""
    start: int
    end: int

    @cached_property
    def array(self) -> Any:
        """NumPy's view of the same addresses, which it compares without reading what lies there."""
        size = self.tensor.element_size()
        interface = {
            "version": 3,
            "typestr": f"|V{size}",
            "data": (self.start, True),
            "shape": tuple(self.tensor.shape),
            "strides": tuple(stride * size for stride in self.tensor.stride()),
        }
        return np.asarray(SimpleNamespace(__array_interface__=interface))


def check_memory(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError unless all values of these parameters lie in different places; none is read.

    Only ranges of addresses that intersect are looked at closer, so that thousands of parameters cost a
    sort. Two views so intricate that this would take long count as overlapping.
    """
    spaces: dict[Any, list[_Span]] = {}
    for name, param in named:
        span = _span(name, local(param.detach()))
        if span is not None:
            spaces.setdefault(span.space, []).append(span)
            if _overlaps_itself(span.tensor):
                rule = "must be tensors that can be updated in place"
                msg = f"`params` {rule}, got one whose values share memory for {name!r}: clone it"
                raise ValueError(msg)
    for spans in spaces.values():
        before: list[_Span] = []
        for span in sorted(spans, key=lambda span: span.start):
            before = [other for other in before if other.end > span.start]
            for other in before:
                if _share(other, span):
                    first, second = sorted((other.name, span.name), key=[name for name, _ in named].index)
                    msg = f"`params` must not share memory, got {first!r} and {second!r}, which do"
                    raise ValueError(msg)
            before.append(span)


def _span(name: str, tensor: Tensor) -> _Span | None:
    """None for a tensor without values, and for one that does not tell where they are."""
    if tensor.numel() == 0 or tensor.layout != torch.strided:
        return None
    try:
        start, storage = tensor.data_ptr(), tensor.untyped_storage()
        space: Any = tensor.device
        if storage.data_ptr() == 0:  # on "meta", or memory that is given back for a while
            space, start = storage._cdata, (1 + tensor.storage_offset()) * tensor.element_size()
    except (RuntimeError, NotImplementedError):  # of a subclass without memory of its own
        return None
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _Span(name, tensor, space, start, start + (reach + 1) * tensor.element_size())


def _share(one: _Span, other: _Span) -> bool:
    try:
        return np.shares_memory(one.array, other.array, max_work=_MAX_WORK)
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return False
    reach, nested = 0, True
    for stride, n in sorted(_axes(tensor)):
        nested &= stride > reach
        reach += (n - 1) * stride
    if nested:
        return False
    if any(stride == 0 for stride, _ in _axes(tensor)) or tensor.numel() > _MAX_VALUES:
        return True
    places = np.zeros((), np.int64)
    for stride, n in _axes(tensor):
        places = np.add.outer(places, stride * np.arange(n))
    return np.unique(places).size < math.prod(tensor.shape)


def _axes(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Stride and length of each axis along which there is more than one value."""
    return ((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)
