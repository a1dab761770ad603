"""Parameters that are sharded over processes: `DTensor` (FSDP2, HSDP, tensor parallel)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mlbfgs_core.adapter import FactorSums, Matrix

__all__ = [
    "Spread",
    "apart",
    "check_placements",
    "is_first",
    "is_sharded",
    "like_param",
    "local",
    "matching",
    "once",
    "placed",
    "reduction",
    "shard_group",
    "share",
]

Group = Any
_GROUPS: dict[tuple[Any, tuple[int, ...]], Group] = {}


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`, whose module takes half a second to import."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Any:
    """This process's part of a tensor; a plain tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def matching(grad: Tensor, param: Tensor) -> Tensor:
    """This process's part of a gradient, laid out like the parameter; this takes a collective if tensor
    parallelism left it otherwise, for instance as summands."""
    if is_sharded(grad) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return local(grad)


def like_param(part: Tensor, param: Tensor, lead: int) -> Tensor:
    """A part of the parameter's shape, with `lead` more axes in front, as a tensor sharded like it.

    The values are shared, not copied. A part of a complex parameter has a last axis of length 2.
    """
    if not is_sharded(param):
        return part
    from torch.distributed.tensor import DTensor

    whole = torch.empty((*part.shape[:lead], *param.shape, *part.shape[lead + param.ndim :]), device="meta")
    return DTensor.from_local(
        part,
        param.device_mesh,
        _placements(param, lead),
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def apart(value: Any) -> Any:
    """A state's value as it can be sent and staged: a tensor that shares its memory with others is copied.

    Broadcasts need contiguous tensors, and the asynchronous `torch.distributed.checkpoint` needs the part of
    a `DTensor` to lie at the beginning of its memory.
    """
    if not isinstance(value, Tensor):
        return value
    if not is_sharded(value):
        return value.contiguous()
    part = value.to_local()
    if part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes:
        return value
    return like_param(part.clone(memory_format=torch.contiguous_format), value, 0)


def placed(whole: Tensor, param: Tensor, lead: int) -> Tensor:
    """A whole tensor, which every process has, as one sharded like the parameter."""
    if not is_sharded(param):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = param.device_mesh
    # `distribute_tensor` takes no strided shards, which tensor parallelism under FSDP2 has.
    full = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return full.redistribute(placements=_placements(param, lead))


def _placements(param: Tensor, lead: int) -> list[Any]:
    """The parameter's placements, for a tensor with `lead` more axes in front."""
    return [
        placement if placement.is_replicate() else _shifted(placement, lead) for placement in param.placements
    ]


def _shifted(placement: Any, lead: int) -> Any:
    if hasattr(placement, "split_factor"):  # of tensor parallelism and FSDP2 along the same axis
        return type(placement)(placement.dim + lead, split_factor=placement.split_factor)
    return type(placement)(placement.dim + lead)


class Spread(NamedTuple):
    """How the matrices of a sharded parameter lie over processes: each holds a block of every matrix, or some
    of the matrices, and the factors of its rows and columns."""

    matrix: Matrix
    """Those of this process."""
    most: Matrix
    """Those of the process that holds most."""
    groups: tuple[tuple[Group, ...], tuple[Group, ...]]
    """The processes with other parts of the same rows, and of the same columns."""

    @classmethod
    def of(cls, param: Tensor, shape: tuple[int, ...], axes: tuple[int, int], largest: int) -> Spread | None:
        """Those of a parameter whose real values have this shape on this process; None without a factor.

        `axes` are those of `Matrix.of`.
        """
        mesh, stacked, rows = param.device_mesh, axes[0], sum(axes)
        tops = [*param.shape, *shape[param.ndim :]]
        sides: tuple[list[Group], list[Group]] = ([], [])
        for dim, placement in enumerate(param.placements):
            if placement.is_replicate():
                continue
            tops[placement.dim] = -(-tops[placement.dim] // mesh.size(dim))
            if placement.dim >= stacked:  # what shards columns spreads the sums for rows, and the reverse
                sides[0 if placement.dim >= rows else 1].append(mesh.get_group(dim))
        most = Matrix.of(tuple(tops), largest, axes)
        if most is None:
            return None
        parts = (shape[:stacked], shape[stacked:rows], shape[rows:])
        own = Matrix(*(math.prod(part) for part in parts), most.left, most.right)
        return cls(own, most, (tuple(sides[0]), tuple(sides[1])))

    def sums(self, device: torch.device) -> FactorSums:
        """What adds factors up over the processes, whose collectives work on a device."""
        left, right = (_sum_over(groups, device) if groups else None for groups in self.groups)
        return left, right

    def room(self, name: str, stack: Tensor) -> tuple[Tensor, Tensor]:
        """Memory of one size on all processes for a stack of factors or bases of this name, and the view of
        it that has the stack's own size and holds its values."""
        side = self.most.rows if name.startswith("left") else self.most.columns
        whole = stack.new_zeros((self.most.count, side, side))
        own = self.own(whole, stack.shape)
        own.copy_(stack)
        return whole, own

    @staticmethod
    def own(whole: Tensor, shape: Sequence[int]) -> Tensor:
        """The view of that memory that has this shape."""
        return whole[: shape[0], : shape[1], : shape[2]]

    def placed(self, whole: Tensor, param: Tensor) -> Tensor:
        """That memory as a tensor with a place for each process that holds another part."""
        from torch.distributed.tensor import DTensor, Shard

        placements = [own if own.is_replicate() else Shard(0) for own in param.placements]
        return DTensor.from_local(whole, param.device_mesh, placements, run_check=False)


def _sum_over(groups: Sequence[Group], device: torch.device) -> Callable[[Tensor], Tensor]:
    def total(values: Tensor) -> Tensor:
        sums = values.to(device, copy=True, memory_format=torch.contiguous_format)
        for group in groups:
            dist.all_reduce(sums, group=group)
        return sums.to(values.device)

    return total


def shard_group(params: Sequence[Tensor]) -> Group | None:
    """The processes over which inner products are summed; None without sharded parameters.

    Those of the largest mesh if it holds those of all others, else all. Replicas take part, too, so that
    their numbers, and hence their decisions, are the same bit by bit.
    """
    meshes = {param.device_mesh for param in params if is_sharded(param)}
    if not meshes:
        return None
    largest = max(meshes, key=lambda mesh: mesh.size())
    ranks = tuple(sorted(largest.mesh.flatten().tolist()))
    everyone = len(ranks) == dist.get_world_size()
    if everyone or not all(set(mesh.mesh.flatten().tolist()) <= set(ranks) for mesh in meshes):
        return dist.group.WORLD
    if largest.ndim == 1:
        return largest.get_group()
    key = (dist.group.WORLD, ranks)
    if key not in _GROUPS:
        _GROUPS[key] = dist.new_group(list(ranks), use_local_synchronization=True)
    return _GROUPS[key]


def share(param: Tensor, group: Group | None) -> float:
    """The part of a parameter's inner products that this process adds to the group's: the first of all
    processes that hold a copy of the same values adds them."""
    if group is None:
        return 1.0
    first = dist.get_global_rank(group, 0)
    if not is_sharded(param):
        return float(dist.get_rank() == first)
    mesh = param.device_mesh
    if first not in mesh.mesh.flatten().tolist():  # another mesh than the first's, with the same values
        return 0.0
    place = mesh.get_coordinate()
    copies = [i for i, placement in zip(place, param.placements, strict=True) if placement.is_replicate()]
    return float(not any(copies))


def check_placements(name: str, param: Tensor, *, owned: bool) -> None:
    """Raise ValueError for a parameter that is held as summands, or is sharded while others are owned."""
    if not is_sharded(param):
        return
    if owned:
        msg = f"`shard_group` must be None with sharded parameters, got a DTensor for {name!r}"
        raise ValueError(msg)
    if any(placement.is_partial() for placement in param.placements):
        msg = f"`params` must be sharded or replicated, got the placements {param.placements} for {name!r}"
        raise ValueError(msg)


def reduction(group: Group | None, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """The function that sums coefficients over a group whose collectives work on a device."""
    if group is None:
        return None

    def reduce(values: Tensor) -> Tensor:
        sums = values.to(device).contiguous()
        dist.all_reduce(sums, group=group)
        return sums.to(values.device)

    return reduce


def once(group: Group | None, act: Callable[[], None]) -> None:
    """Let the first process of a group act, while the others wait until it has succeeded or failed."""
    if group is None:
        act()
        return
    failure: list[BaseException | None] = [None]
    if is_first(group):
        try:
            act()
        except Exception as error:  # which all raise
            failure = [error]
    dist.broadcast_object_list(failure, dist.get_global_rank(group, 0), group)
    if failure[0] is not None:
        raise failure[0]


def is_first(group: Group | None) -> bool:
    """Whether this process is the first of a group; without a group it is."""
    return group is None or dist.get_rank(group) == 0
