"""The core's state, bound to PyTorch's dictionary per parameter.

The dictionaries hold views of the core's flat leaves, in the parameters' shapes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

import mlbfgs_core as core
from mlbfgs_core.adapter import (
    LEAF_COUNTS,
    LEAF_NAMES,
    OF_MATRICES,
    Blocks,
    accumulation_dtype,
    dtype_name,
    layout,
    leaf_arrays,
    with_leaf_arrays,
)

from .leaves import Leaf, Member, Memory, as_real
from .rows import PER_BLOCK, PER_UNIT, Rows, counts_and_label, is_known, unpack
from .sharding import Spread, like_param, local

__all__ = ["Bound", "agreed", "bind", "coefficients", "forget_misfits"]


class Bound:
    """A core state whose arrays are those of the parameters' dictionaries.

    Attributes
    ----------
    momentum : list of tensors
        One flat buffer per leaf, or None.
    """

    def __init__(self, state: core.State, rows: Rows, momentum: list[Tensor | None]) -> None:
        self._state = state
        self._rows = rows
        self.momentum = momentum

    @property
    def state(self) -> core.State:
        """The state; its numbers are views of the rows, or read from them."""
        return self._state._replace(**self._rows.read())

    @property
    def host_state(self) -> core.State:
        """The state with its numbers as arrays of NumPy; on a CPU only."""
        return self._state._replace(**self._rows.host.read(), size=self._state.size.numpy())

    def store(self, new: core.State) -> None:
        """Take over the numbers of a new state; its arrays have been updated in place."""
        self._rows.write(new)


def forget_misfits(
    parts: Sequence[tuple[core.Config, Sequence[Sequence[Member]]]],
    memory: Memory,
    gather: Callable[[Any], list[Any]] | None = None,
) -> None:
    """Empty the memory of blocks that do not continue exactly one block with the same settings and shapes.

    A block's coefficients hold for its own parameters only. Momentum is kept, except for a parameter whose
    shape has changed. `parts` gives settings and blocks of all parameters; if other processes own some of
    them, `gather` gives what every process says.
    """
    for _, own in parts:
        for member in (member for block in own for member in block):
            entry = memory.get(member.param, {})
            if "momentum_buffer" in entry and local(entry["momentum_buffer"]).shape != member.shape:
                del entry["momentum_buffer"]
    blocks = [
        (config, [member for member in block if is_known(memory.get(member.param, {}))])
        for config, own in parts
        for block in own
    ]
    members = [member for _, block in blocks for member in block]
    numbers = counts_and_label([memory[member.param] for member in members])
    label = {member.param: number for member, (_, number) in zip(members, numbers, strict=True)}
    notes = [
        (
            {label[member.param] for member in block},
            [change for member in block if (change := _change(config, member, memory[member.param]))],
        )
        for config, block in blocks
    ]
    if gather is not None:
        told = zip(*gather(notes), strict=True)
        notes = [
            (set().union(*(origin for origin, _ in each)), [change for _, some in each for change in some])
            for each in told
        ]
    origins = [origin for found, _ in notes for origin in found]
    forgotten: list[Member] = []
    reason = ""
    for (_, block), (found, changed) in zip(blocks, notes, strict=True):
        if len(found) > 1 or any(origins.count(origin) > 1 for origin in found):
            reason = "its blocks have changed"
        elif changed:
            reason = changed[0]
        else:
            continue
        forgotten += block
    for member in forgotten:
        buffer = memory[member.param].get("momentum_buffer")
        memory[member.param].clear()
        if buffer is not None:
            memory[member.param]["momentum_buffer"] = buffer
    if forgotten:
        msg = f"MLBFGS forgets the curvature of {len(forgotten)} parameters, since {reason}"
        warnings.warn(msg, stacklevel=2)


def bind(
    config: core.Config,
    leaves: Sequence[Leaf],
    blocks: Blocks,
    memory: Memory,
    first_label: int,
    sizes: Sequence[float],
    *,
    absent: Sequence[Tensor] = (),
    known: Mapping[str, Tensor] | None = None,
) -> Bound:
    """Gather the core's state from the parameters' dictionaries, and make these views of it.

    A parameter without memory gets an empty one and joins its block. Every parameter carries the coefficients
    of its block and of the whole; they are taken from the first that has them. Blocks are labelled from
    `first_label` on, so that `forget_misfits` recognizes them; `sizes` are their numbers of values.

    If other processes own some of the parameters, `absent` are empty leaves that stand for theirs, after
    `leaves`, and `known` are the coefficients.
    """
    params = [[member.param for member in leaf.members] for leaf in leaves] + [[] for _ in absent]
    like = [*(leaf.like() for leaf in leaves), *absent]
    # A parameter alone in its leaf keeps the memory that it has.
    alone = [len(leaf.members) == 1 and is_known(memory[leaf.members[0].param]) for leaf in leaves]
    # Empty leaves stand in their places, since all leaves together decide the dtype of coefficients.
    new = [x[:0] if own else x for x, own in zip(like, [*alone, *(False for _ in absent)], strict=True)]
    # A parameter's shape tells nothing of its matrices, since leaves are flat.
    matrices = [*(leaf.matrix for leaf in leaves), *(None for _ in absent)]
    fresh = core.Method(config, matrices=matrices).init(new, xp=xp)
    arrays: dict[str, list[Any]] = {name: list(own) for name, own in leaf_arrays(fresh).items()}
    momentum: list[Tensor | None] = []
    rooms: dict[tuple[int, str], Tensor] = {}
    for i, (leaf, own) in enumerate(zip(leaves, alone, strict=True)):
        entries = [memory[member.param] for member in leaf.members]
        for name, of_leaves in arrays.items():
            if of_leaves[i] is None:
                continue
            spread = leaf.members[0].spread if name in OF_MATRICES else None
            if own:
                kept = local(entries[0][name])
                kept = kept if name in OF_MATRICES else leaf.gather([kept])
                # The parameter may have been moved.
                kept = kept.to(of_leaves[i].device, of_leaves[i].dtype).contiguous()
                if spread:
                    rooms[i, name], kept = kept, spread.own(kept, of_leaves[i].shape)
                of_leaves[i] = kept
            else:
                if spread:
                    rooms[i, name], of_leaves[i] = spread.room(name, of_leaves[i])
                _copy_known(name, leaf, entries, of_leaves[i])
        momentum.append(None)
        if leaf.group["momentum"] != 0 or any("momentum_buffer" in entry for entry in entries):
            dtype = getattr(torch, accumulation_dtype(like[i]))
            momentum[-1] = torch.zeros(like[i].shape, dtype=dtype, device=like[i].device)
            _copy_known("momentum_buffer", leaf, entries, momentum[-1])
    values = coefficients(fresh, params, blocks, memory)
    values.update({} if known is None else {name: value.clone() for name, value in known.items()})
    values["size"] = torch.tensor(sizes, dtype=values["gamma"].dtype, device=values["gamma"].device)
    state = with_leaf_arrays(
        fresh._replace(**values), {name: tuple(of_leaves) for name, of_leaves in arrays.items()}
    )
    rows = Rows(state, blocks, first_label)
    for i, leaf in enumerate(leaves):
        views = {
            name: _parts(name, leaf, of_leaves[i])
            for name, of_leaves in arrays.items()
            if of_leaves[i] is not None
        }
        if momentum[i] is not None:
            views["momentum_buffer"] = leaf.spread(momentum[i])
        for place, member in enumerate(leaf.members):
            entry = memory[member.param]
            for name, view in views.items():
                own = view[place]
                if member.spread and name in OF_MATRICES:
                    own = member.spread.placed(rooms[i, name], member.param)
                elif name not in OF_MATRICES:
                    own = like_param(own, member.param, own.ndim - len(member.shape))
                entry[name] = own
            entry.update(rows.of(i))
    return Bound(state, rows, momentum)


def coefficients(
    fresh: core.State, params: Sequence[Sequence[Tensor]], blocks: Blocks, memory: Memory
) -> dict[str, Tensor]:
    """The coefficients of a state, except the size. Those of a leaf, of a block and of the whole come from
    the first parameter that carries them, else from a fresh state. `params` gives each leaf's."""

    def carried(carriers: Sequence[Tensor]) -> Mapping[str, Tensor]:
        entries = (memory.get(param, {}) for param in carriers)
        return next((unpack(entry) for entry in entries if is_known(entry)), {})

    def joined(name: str, owners: Sequence[Mapping[str, Tensor]]) -> Tensor:
        default = getattr(fresh, name)[0]
        return torch.stack([numbers.get(name, default).to(default) for numbers in owners])

    of_leaves = [carried(own) for own in params]
    of_blocks = [next((of_leaves[i] for i in block if of_leaves[i]), {}) for block in blocks]
    whole = next((numbers for numbers in of_leaves if numbers), {})
    return {
        **{name: joined(name, of_leaves) for name in LEAF_COUNTS},
        **{name: joined(name, of_blocks) for name in PER_BLOCK},
        **{name: whole.get(name, getattr(fresh, name)).to(getattr(fresh, name)).clone() for name in PER_UNIT},
    }


def agreed(
    config: core.Config,
    blocks: Sequence[Sequence[Member]],
    dtype: torch.dtype,
    device: torch.device,
    memory: Memory,
    gather: Callable[[Any], list[Any]],
) -> dict[str, Tensor]:
    """The coefficients of blocks and of the whole, from the first process that carries them."""
    fresh = core.Method(config).init([torch.empty(0, dtype=dtype)], xp=xp)

    def carried(members: Sequence[Member], names: Sequence[str]) -> dict[str, Tensor] | None:
        entries = (memory.get(member.param, {}) for member in members)
        found = next((unpack(entry) for entry in entries if is_known(entry)), None)
        return None if found is None else {name: found[name].cpu() for name in names}

    everyone = [member for block in blocks for member in block]
    told = gather((carried(everyone, PER_UNIT), [carried(block, PER_BLOCK) for block in blocks]))
    whole = next((numbers for numbers, _ in told if numbers is not None), {})
    values = {name: whole.get(name, getattr(fresh, name)) for name in PER_UNIT}
    rows = [
        next((numbers for numbers in each if numbers is not None), {})
        for each in zip(*(numbers for _, numbers in told), strict=True)
    ]
    for name in PER_BLOCK:
        values[name] = torch.stack([row.get(name, getattr(fresh, name)[0]) for row in rows])
    return {name: value.to(getattr(fresh, name)).to(device) for name, value in values.items()}


def _parts(name: str, leaf: Leaf, array: Tensor) -> Sequence[Tensor]:
    """Each member's part of a leaf's array; views."""
    return leaf.stacks(array) if name in OF_MATRICES else leaf.spread(array)


def _copy_known(name: str, leaf: Leaf, entries: Sequence[dict[str, Any]], flat: Tensor) -> None:
    for view, entry in zip(_parts(name, leaf, flat), entries, strict=True):
        if name in entry:
            known = local(entry[name])
            view.copy_(Spread.own(known, view.shape) if name in OF_MATRICES else known)


def _change(config: core.Config, member: Member, entry: dict[str, Any]) -> str | None:
    """The reason why a parameter's memory cannot be continued, or None."""
    like = torch.empty(member.shape, dtype=as_real(member.values.detach()).dtype, device="meta")
    matrix = member.spread.most if member.spread else member.matrix  # of one shape on all processes
    entries = layout(config, [like], ((0,),), [matrix])
    wanted = {own.name: own for own in entries if own.leaf is not None}
    held = {name: local(entry[name]) for name in LEAF_NAMES if name in entry}
    for name, value in held.items():
        if name in OF_MATRICES:
            continue
        lead = len(wanted[name].shape) - len(member.shape) if name in wanted else 0
        shape = tuple(value.shape[lead:])
        if shape != member.shape:
            return f"the shape of {member.name!r} has changed from {shape} to {member.shape}"
    # Averages follow their parameter to another dtype, and so does a history for which none is set.
    fits = set(held) == set(wanted) and all(
        tuple(value.shape) == wanted[name].shape for name, value in held.items()
    )
    if fits and "history" in held:
        fits = dtype_name(held["history"]) == (config.history_dtype or dtype_name(held["mean_params"]))
    return None if fits else f"the settings of {member.name!r} have changed"
