"""Parameters as the core sees them: flat leaves.

A leaf holds the values of one large parameter, or of several small ones side by side, in the order in which
they lie in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mlbfgs_core.adapter import Blocks, FlatLeaf, Matrix, pack

from .rows import counts_and_label, is_known
from .sharding import Spread, is_sharded, local, matching

__all__ = ["Leaf", "Member", "Memory", "as_real", "place", "plan_leaves", "real_shape"]

Memory = dict[Tensor, dict[str, Any]]

# Parameters of fewer values are laid side by side.
_SMALL = {"cpu": 2**16}
_DEVICE_SMALL = 2**23


@dataclass(frozen=True, eq=False)  # a property of a named tuple cannot be traced by older compilers
class Member:
    """A parameter, its group, and how it lies in memory."""

    name: str
    param: Tensor
    group: dict[str, Any]
    share: float
    """The part of its inner products that this process adds to the sums over all processes."""
    sharded: bool
    """Whether it is a `DTensor`: asked once, since asking takes time in each step."""
    shape: tuple[int, ...]
    """Shape of this process's real values: a complex parameter has a last axis of 2."""
    order: tuple[int, ...]
    """Axes from the largest stride to the smallest."""
    lazy: bool
    """Whether PyTorch conjugates or negates its values when they are read: then a view cannot write them."""
    dense: bool
    """Whether `flat` is a view."""
    place: tuple[Any, ...]
    """What `place` returned for it."""
    carries: bool
    """Whether it has momentum."""
    matrix: Matrix | None
    """How its values form matrices."""
    spread: Spread | None
    """How those lie over processes, if it is a `DTensor` that has some."""

    @classmethod
    def of(
        cls,
        name: str,
        param: Tensor,
        group: dict[str, Any],
        share: float,
        axes: tuple[int, int] | None = None,
        largest: int = 0,
    ) -> Member:
        """A member with the layout of its parameter; matrices, of `Matrix.of`, have the order of its axes."""
        values = local(param).detach()
        real, lazy = as_real(values), values.is_conj() or values.is_neg()
        sharded = is_sharded(param)
        spread = Spread.of(param, tuple(real.shape), axes, largest) if sharded and axes else None
        matrix = spread and spread.matrix
        if axes and not sharded:
            matrix = Matrix.of(tuple(real.shape), largest, axes)
        every = range(real.ndim)
        order = tuple(every if matrix else sorted(every, key=lambda axis: -real.stride(axis)))
        dense = not lazy and real.permute(order).is_contiguous()
        return cls(
            name,
            param,
            group,
            share,
            sharded,
            tuple(real.shape),
            order,
            lazy,
            dense,
            place(param),
            group["momentum"] != 0,
            matrix,
            spread,
        )

    @property
    def size(self) -> int:
        """Number of real values that this process holds."""
        return math.prod(self.shape)

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the real values over all processes."""
        return real_shape(self.param)

    @property
    def values(self) -> Tensor:
        """The values that this process holds."""
        return local(self.param) if self.sharded else self.param

    def grad(self) -> Tensor | None:
        """Their gradient."""
        grad = self.param.grad
        return matching(grad, self.param) if self.sharded and grad is not None else grad

    def write(self, real: Tensor) -> None:
        """Give the parameter these values; a complex one takes them in pairs."""
        values = self.values.detach()
        if values.is_complex() and self.size:
            real = torch.view_as_complex(real.contiguous())
        values.copy_(real.reshape(values.shape))

    def flat(self, tensor: Tensor) -> Tensor:
        """A tensor like the parameter (or several, along leading axes), as one axis in memory order."""
        tensor = as_real(tensor)
        lead = tensor.ndim - len(self.order)
        order = (*range(lead), *(lead + axis for axis in self.order))
        return tensor.permute(order).reshape((*tensor.shape[:lead], self.size))

    def shaped(self, flat: Tensor) -> Tensor:
        """The inverse of `flat`, a view."""
        lead = flat.ndim - 1
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        spread = flat.view((*flat.shape[:-1], *(self.shape[axis] for axis in self.order)))
        return spread.permute((*range(lead), *(lead + axis for axis in inverse)))


class Leaf(FlatLeaf[Member]):
    """One leaf of the core: parameters of one group, block and dtype, side by side.

    Parameters
    ----------
    members : sequence of Member
    """

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__(members)
        self.plain = all(
            m.order == tuple(range(len(m.shape))) and not m.param.is_complex() and not m.lazy and m.size > 0
            for m in members
        )
        """Whether all members are real, not lazy and not empty, and lie in the order of their axes."""
        self.lazy = any(m.lazy for m in members)
        """Whether some member is lazy."""

    @property
    def group(self) -> dict[str, Any]:
        """The group to which all members belong."""
        return self.members[0].group

    def like(self) -> Tensor:
        """Shape, dtype and device of the leaf, without memory."""
        size = sum(member.size for member in self.members)
        values = self.members[0].values.detach()
        return as_real(values.new_zeros(1)).reshape(-1)[0].expand(size)

    @property
    def share(self) -> float:
        """The part of its inner products that this process adds."""
        return self.members[0].share

    def params(self) -> list[Tensor]:
        """The parameters' values."""
        return self._whole if self._whole is not None else [member.values for member in self.members]

    @cached_property
    def _whole(self) -> list[Tensor] | None:
        """The parameters, if they are their own values, not sharded; else None."""
        if any(member.sharded for member in self.members):
            return None
        return [member.param for member in self.members]

    @cached_property
    def _room(self) -> tuple[Tensor, Sequence[Tensor]]:
        """Memory for the flat values of small parameters, and views of it in their shapes."""
        flat = torch.empty_like(self.gather(self.params()))
        return flat, self.spread(flat)

    def flat_params(self) -> Tensor:
        """The parameters' values as a flat tensor, in their own memory if it `is_view`.

        On a CPU the memory is the same at every step, since making views of it takes longer than copying
        small parameters.
        """
        if self.is_view or not self.plain or not self._keeps_room:
            return self.gather(self.params()).detach()
        flat, views = self._room
        torch._foreach_copy_(views, self.params())
        return flat

    @property
    def _keeps_room(self) -> bool:
        return self.members[0].param.device.type == "cpu" and not torch.compiler.is_compiling()

    def write(self, flat: Tensor) -> None:
        """Give the parameters the values of a flat tensor; nothing to do where it is their memory."""
        if self.is_view:
            return
        if self.plain and self._keeps_room and flat is self._room[0]:
            torch._foreach_copy_(self.params(), self._room[1])
            return
        parts = self.spread(flat)
        if self.lazy:
            for member, part in zip(self.members, parts, strict=True):
                member.write(part)
            return
        params = self.params() if self.plain else [as_real(param.detach()) for param in self.params()]
        torch._foreach_copy_(params, parts)

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor per member (or several, along leading axes) as a flat one."""
        if self.plain and len(tensors) > 1 and tensors[0].ndim == len(self.members[0].shape):
            return _flatten_dense_tensors(tensors)
        return super().gather(tensors)

    def stacked(self, arrays: Sequence[Tensor]) -> Tensor:
        """One stack of matrices per member as one."""
        return torch.cat(list(arrays))

    def joined(self, flats: Sequence[Tensor]) -> Tensor:
        """Flat tensors, one after the other."""
        return torch.cat(flats, dim=-1)

    def spread(self, flat: Tensor) -> Sequence[Tensor]:
        """Views of a flat tensor (or several, along leading axes) in the members' shapes."""
        if self.plain and flat.ndim == 1:
            return _unflatten_dense_tensors(flat, self.params())
        return super().spread(flat)


def plan_leaves(members: Sequence[Member], blocks: Blocks, memory: Memory) -> tuple[tuple[Leaf, ...], Blocks]:
    """Leaves for blocks of members, and the blocks of leaves.

    Members share a leaf if they are small and have been observed equally often; those with a gradient
    on this step do not share with those without one.
    """
    known = [m.param for m in members if is_known(memory.get(m.param, {}))]
    found = counts_and_label([memory[param] for param in known])
    counts = {param: numbers for param, (numbers, _) in zip(known, found, strict=True)}
    kinds = [
        None
        if member.spread or member.size > _small(member.param)
        else (
            id(member.group),
            member.param.dtype,
            counts.get(member.param),
            member.param.grad is None,
            member.share,
            member.matrix and member.matrix[1:],
        )
        for member in members
    ]
    groups, leaf_blocks = pack([member.size for member in members], kinds, blocks)
    return tuple(Leaf([members[i] for i in group]) for group in groups), leaf_blocks


def as_real(tensor: Tensor) -> Tensor:
    """The tensor with a last axis of length 2 if it is complex: a view, except of a tensor that PyTorch
    conjugates or negates when it is read."""
    tensor = tensor.resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def place(param: Tensor) -> tuple[Any, ...]:
    """How a parameter lies in memory: what changes when a run is moved to another dtype or device."""
    lazy = param.is_conj() or param.is_neg()
    return id(param), param.device, param.dtype, param.shape, param.stride(), lazy


def real_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of `as_real`, over all processes."""
    return (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape)


def _small(param: Tensor) -> int:
    # A state dict copies sharded parameters that lie side by side, so only small ones may.
    device = "cpu" if is_sharded(param) else param.device.type
    return _SMALL.get(device, _DEVICE_SMALL)
