"""Parameters that are divided over processes, each with an owner: what the owners tell one another.

Every process works on the blocks of all parameters, with the leaves that it owns; so the sums over the
processes are those of one process that owns all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import mlbfgs_core as core
from mlbfgs_core.blocks import Blocks, BlockSpec
from mlbfgs_core.state import accumulation_dtype

from .binding import Member

__all__ = ["Division", "divide", "gather"]


class Division(NamedTuple):
    """One core state over all processes: its blocks, and what this process owns of them."""

    config: core.Config
    device: torch.device
    members: list[Member]
    """Own parameters."""
    blocks: Blocks
    """Of own parameters; an empty tuple for a block that others own."""
    sizes: tuple[float, ...]
    """Number of values of each block."""
    dtype: torch.dtype
    """The widest of all averages."""


def gather(group: Any, value: Any) -> list[Any]:
    """What each process of a group says."""
    result = [None] * dist.get_world_size(group)
    dist.all_gather_object(result, value, group)
    return result


def divide(
    found: Mapping[tuple[core.Config, torch.device], Sequence[Member]], spec: BlockSpec, group: Any
) -> list[Division]:
    """The blocks of all processes' parameters, which are known by their names.

    Every process calls it together with the others.
    """
    own = [
        ((config, device.type), [(m.name, float(m.size), accumulation_dtype(m.param)) for m in members])
        for (config, device), members in found.items()
    ]
    place = {(config, device.type): (device, list(members)) for (config, device), members in found.items()}
    told: dict[Any, list[tuple[int, tuple[str, float, str]]]] = {}
    for rank, entries in enumerate(gather(group, own)):
        for key, entry in entries:
            told.setdefault(key, []).extend((rank, item) for item in entry)
    this, result = dist.get_rank(group), []
    for key, entries in told.items():
        names = [name for _, (name, _, _) in entries]
        index = {i: n for n, i in enumerate(i for i, (rank, _) in enumerate(entries) if rank == this)}
        blocks = core.partition(names, spec)
        device, members = place.get(key, (_device(key[1]), []))
        result.append(
            Division(
                key[0],
                device,
                members,
                tuple(tuple(index[i] for i in block if i in index) for block in blocks),
                tuple(sum(entries[i][1][1] for i in block) for block in blocks),
                getattr(torch, max(dtype for _, (_, _, dtype) in entries)),
            )
        )
    return result


def _device(kind: str) -> torch.device:
    """This process's device of a kind."""
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, torch.accelerator.current_device_index())
