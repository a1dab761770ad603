"""Parameters with common settings and device, and their core state."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mlbfgs_core as core
from mlbfgs_core.adapter import Blocks, StepEnd, Upcoming

from . import sharding
from .arguments import check_gradient
from .binding import agreed, bind
from .kernels import HostKernels, TorchKernels, reduced
from .leaves import Leaf, Member, Memory, plan_leaves
from .rows import PER_BLOCK, PER_UNIT, is_known

__all__ = ["HOSTS", "Partition", "Unit"]

_NOTHING: dict[str, Any] = {}
HOSTS = {"cpu"}
"""Types of devices on whose tensors NumPy can work."""


class Partition(NamedTuple):
    """Parameters with common settings and device, in blocks."""

    config: core.Config
    device: torch.device
    members: list[Member]
    blocks: Blocks
    sizes: tuple[float, ...]
    """Number of values of each block, over all processes."""
    dtype: torch.dtype | None
    """The widest dtype of all averages if other processes own some of the parameters, else None."""
    group: Any
    """The processes that sum their inner products, or None."""

    @classmethod
    def of(
        cls, config: core.Config, device: torch.device, members: list[Member], blocks: Blocks, group: Any
    ) -> Partition:
        """A partition whose parameters are all known to this process."""
        sizes = tuple(float(sum(math.prod(members[i].whole) for i in block)) for block in blocks)
        return cls(config, device, members, blocks, sizes, None, group)

    @property
    def key(self) -> tuple[Any, ...]:
        identities = tuple(
            (m.name, m.place, m.shape, m.order, id(m.group), m.carries, m.matrix, m.spread and m.spread.most)
            for m in self.members
        )
        return self.config, identities, self.blocks

    @property
    def reduce_device(self) -> torch.device:
        """The device of the group's collectives: that of the mesh, even if parameters are offloaded."""
        meshes = [m.param.device_mesh for m in self.members if sharding.is_sharded(m.param)]
        return torch.device(meshes[0].device_type) if meshes else self.device

    @property
    def absent(self) -> list[Tensor]:
        """Empty leaves that stand for those of other owners: one whose gradient is always missing, one
        whose gradient never is missing, and one for each block in which this process owns nothing."""
        if self.dtype is None:
            return []
        count = 2 + sum(not block for block in self.blocks)
        return [torch.empty(0, dtype=self.dtype, device=self.device) for _ in range(count)]

    def fresh(self) -> core.State:
        """A state before the first step, which has the coefficients of all blocks and no arrays."""
        dtypes = [torch.empty(0, dtype=m.param.dtype).real.dtype for m in self.members]
        widest = torch.float64 if torch.float64 in dtypes else torch.float32
        empty = [torch.empty(0, dtype=widest, device=self.device) for _ in self.blocks]
        return core.Method(self.config, tuple((i,) for i in range(len(empty)))).init(empty)

    def active(self, memory: Memory) -> Partition:
        """Only the parameters that have a gradient now or have had one."""
        kept = [
            i
            for i, m in enumerate(self.members)
            if m.param.grad is not None or is_known(memory.get(m.param, {}))
        ]
        if len(kept) == len(self.members):
            return self
        place = {index: new for new, index in enumerate(kept)}
        blocks = [tuple(place[i] for i in block if i in place) for block in self.blocks]
        members = [self.members[i] for i in kept]
        return Partition.of(self.config, self.device, members, tuple(b for b in blocks if b), self.group)

    def agreed(self, memory: Memory, ask: Callable[[Any], list[Any]]) -> dict[str, Tensor]:
        """The coefficients that the owners have, the same on all of them."""
        blocks = [[self.members[i] for i in block] for block in self.blocks]
        return agreed(self.config, blocks, self.dtype, self.device, memory, ask)


class Unit:
    """One core state: a partition bound to the parameters' memory."""

    def __init__(
        self, part: Partition, memory: Memory, first_label: int, numbers: dict[str, Tensor] | None
    ) -> None:
        self.part = part
        self.config = part.config
        self.leaves, blocks = plan_leaves(part.members, part.blocks, memory)
        self._absent = part.absent
        if self._absent:  # the first two join any block
            places = iter(range(len(self.leaves), len(self.leaves) + len(self._absent)))
            two = next(places), next(places)
            blocks = tuple(block or (next(places),) for block in blocks)
            blocks = ((*blocks[0], *two), *blocks[1:])
        self.blocks = blocks
        self._bound = bind(
            self.config,
            self.leaves,
            blocks,
            memory,
            first_label,
            part.sizes,
            absent=self._absent,
            known=numbers,
        )
        self._device = part.device
        self._plain_kernels = TorchKernels(self._device)
        self._host_kernels = HostKernels(self._device) if self._device.type in HOSTS else None
        self._rows = [(member.param, memory[member.param]["counters"]) for member in part.members]
        self.flags: _Flags | None = None
        self.accepted: bool | None = None
        """Whether the last gradient whose verdict the host knows was finite; None if none is known."""
        shares = [*(leaf.share for leaf in self.leaves), *(1.0 for _ in self._absent)]
        self._shares = None if all(share == 1.0 for share in shares) else shares
        spread = [leaf.members[0].spread for leaf in self.leaves]
        sums = [own and own.sums(part.reduce_device) for own in spread]
        self._factor_sums = [*sums, *(None for _ in self._absent)] if any(sums) else None
        self._reduce = sharding.reduction(part.group, part.reduce_device)
        self._on_host = self._method(self._host_kernels, reduced(self._reduce))

    @property
    def state(self) -> core.State:
        """The core's state, as tensors."""
        return self._bound.state

    @property
    def kernels(self) -> TorchKernels:
        """The fastest kernels on this device; a compiled step is fused by the compiler."""
        if self._device.type != "cuda" or torch.compiler.is_compiling():
            return self._plain_kernels
        return fused_kernels(self._device) or self._plain_kernels

    def call(self) -> tuple[core.State, core.Method]:
        """The state for one step, and the method; coefficients are NumPy's if it can work on them and nothing
        is captured or compiled."""
        if self._host_kernels is None or self._captured():
            return self.state, self._method(self.kernels, self._reduce)
        return self._bound.host_state, self._on_host

    def _method(self, kernels: TorchKernels, reduce: Any) -> core.Method:
        return core.Method(
            self.config, self.blocks, kernels, reduce, self._shares, factor_sums=self._factor_sums
        )

    def _captured(self) -> bool:
        """Whether a step is recorded, to be repeated without this code."""
        return torch.compiler.is_compiling() or any(leaf.group["capturable"] for leaf in self.leaves)

    def coefficients(self) -> dict[str, Tensor]:
        """The coefficients of blocks and of the whole."""
        state = self.state
        return {name: getattr(state, name) for name in (*PER_BLOCK, *PER_UNIT)}

    def is_bound(self, memory: Memory) -> bool:
        """Whether the dictionaries still hold this unit's arrays, not others put in their place."""
        return all(memory.get(param, _NOTHING).get("counters") is row for param, row in self._rows)

    def splits(self) -> bool:
        """Whether some, but not all, parameters of a leaf have a gradient."""
        return any(len({m.param.grad is None for m in leaf.members}) > 1 for leaf in self.leaves)

    def params(self) -> list[Tensor]:
        """The parameters' values; for a leaf that is a view, in the parameter's own memory."""
        return [*(leaf.flat_params() for leaf in self.leaves), *self._absent]

    def grads(self, scale: Tensor | None) -> list[Tensor | None]:
        """The gradients, or None, divided by a scale; those that are the user's own are never written to."""
        own = [_gradient(leaf, scale) for leaf in self.leaves]
        # Whether a gradient is missing decides how often processes sum, so one is missing on all of them; and
        # a process without any gradient would not take part, so each has one.
        return [*own, None, *self._absent[1:]] if self._absent else own

    def asked(self, state: core.State) -> Upcoming:
        """What this step is to do."""
        if self._captured():
            self.flags = None
            # Eigenvectors cannot be captured in a CUDA graph: bases start from the parameters' coordinates.
            return Upcoming(None, None, False, None, None, None)
        if not isinstance(state.gamma, Tensor):
            self.flags = None
            return Upcoming(*map(bool, self._on_host.upcoming(state)))
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            msg = "MLBFGS needs `capturable`=True for a step captured in a CUDA graph, got False"
            raise RuntimeError(msg)
        if self.flags is None:
            self.flags = _Flags(core.Method(self.config), self.state)
        upcoming, self.accepted = self.flags.read()
        return upcoming

    def remember(self, state: core.State) -> None:
        """Take over the new coefficients."""
        self._bound.store(state)
        if self.flags is not None:
            self.flags.send(state)
        else:
            self.accepted = None if isinstance(state.gamma, Tensor) else bool(state.accepted)

    def apply(
        self,
        params: Sequence[Tensor],
        update: Sequence[Tensor | None],
        factor: Any,
        finite: Any,
    ) -> None:
        """Momentum, weight decay and learning rate, all of them only where the step is accepted.

        `params` is what the method of this name gave, and is written to.
        """
        kernels = self.kernels
        for leaf, flat, direction, buffer in zip(
            self.leaves, params, update, self._bound.momentum, strict=False
        ):
            if direction is None:
                continue
            group = leaf.group
            end = StepEnd(
                length=factor,
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"] if group["decoupled_weight_decay"] else 0.0,
                nesterov=group["nesterov"],
            )
            kernels.apply(flat, direction, buffer, end, finite)
            leaf.write(flat)


@cache
def fused_kernels(device: torch.device) -> TorchKernels | None:
    """Kernels in Triton; None if it is missing, or, with a warning, if it does not work."""
    try:
        from .fused import FusedKernels
    except ImportError:  # PyTorch's builds for Windows and for CPUs lack Triton
        return None
    try:
        FusedKernels.check(device)
    except Exception as error:  # a missing C compiler, an old GPU: whatever a compiler may raise
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"MLBFGS takes slower operations on {device}, since Triton fails there: {reason}", stacklevel=2
        )
        return None
    return FusedKernels(device)


class _Flags:
    """What the next step is to do, copied from the device without waiting for it."""

    def __init__(self, method: core.Method, state: core.State) -> None:
        self._method = method
        device = state.gamma.device
        on_device = device.type == "cuda"
        self._host = torch.empty(len(Upcoming._fields) + 1, dtype=torch.bool, pin_memory=on_device)
        self._event = torch.cuda.Event() if on_device else None
        self.send(state)
        self._first = True

    def send(self, state: core.State) -> None:
        """Start copying what the state asks the next step to do, and whether it has accepted the last
        gradient."""
        self._first = False
        flags = torch.cat([self._method.upcoming(state), state.accepted[None]])
        self._host.copy_(flags, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> tuple[Upcoming, bool | None]:
        """What was sent one step ago; None for the verdict if no step has been taken since."""
        if self._event is not None:
            self._event.synchronize()
        *upcoming, accepted = map(bool, self._host.numpy())
        return Upcoming(*upcoming), None if self._first else accepted


def _gradient(leaf: Leaf, scale: Tensor | None) -> Tensor | None:
    if leaf.members[0].param.grad is None:
        return None
    for member in leaf.members:
        check_gradient(member)
    grads = [member.grad() if member.sharded else member.param.grad for member in leaf.members]
    group = leaf.group
    flat = leaf.gather(grads).detach()
    if scale is not None:
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32)) / scale.to(flat.device)
    if group["maximize"]:
        flat = flat.neg()
    if group["weight_decay"] != 0 and not group["decoupled_weight_decay"]:
        flat = flat.add(leaf.gather(leaf.params()), alpha=group["weight_decay"])
    return flat
