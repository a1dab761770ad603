"""Where parameters lie: each needs memory of its own, since a step reads all of them before it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlbfgs_core.adapter import Place, find_overlap

from .sharding import local

__all__ = ["check_memory"]


def check_memory(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError unless all values of these parameters lie in different places; none is read."""
    spaces: dict[Any, list[tuple[str, Place]]] = {}
    for name, param in named:
        space, place = _place(local(param.detach()))
        if place is not None:
            spaces.setdefault(space, []).append((name, place))
    for own in spaces.values():
        found = find_overlap([place for _, place in own])
        if found is None:
            continue
        first, second = own[found.first][0], own[found.second][0]
        told = "" if found.certain else " (or may do so: whether they do is too hard to decide)"
        if found.first == found.second:
            rule = "must be tensors that can be updated in place"
            msg = f"`params` {rule}, got one whose values share memory for {first!r}{told}: clone it"
        else:
            msg = f"`params` must not share memory, got {first!r} and {second!r}, which do{told}"
        raise ValueError(msg)


def _place(tensor: Tensor) -> tuple[Any, Place | None]:
    """The space of a tensor's addresses (a device, or the storage of a tensor without memory), and its place;
    None for a tensor that does not tell where its values are."""
    if tensor.numel() == 0 or tensor.layout != torch.strided:
        return None, None
    width = tensor.element_size()
    try:
        start, storage = tensor.data_ptr(), tensor.untyped_storage()
        space: Any = tensor.device
        if storage.data_ptr() == 0:  # on "meta", or memory that has been released for a while
            space, start = storage._cdata, (1 + tensor.storage_offset()) * width
    except (RuntimeError, NotImplementedError):  # a subclass without memory of its own
        return None, None
    return space, Place(start, width, tensor.shape, [stride * width for stride in tensor.stride()])
