"""Parameters that are divided over processes, each with an owner: what the owners tell one another.

Every process works on the blocks of all parameters, with the leaves that it owns; so the sums over the
processes are those of one process that owns all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

import mlbfgs_core as core
from mlbfgs_core.adapter import BlockSpec, accumulation_dtype

from .leaves import Member, as_real
from .units import Partition

__all__ = ["divide", "gather"]


def gather(group: Any, value: Any) -> list[Any]:
    """What each process of a group says."""
    result = [None] * dist.get_world_size(group)
    dist.all_gather_object(result, value, group)
    return result


def divide(
    found: Mapping[tuple[core.Config, torch.device], Sequence[Member]], spec: BlockSpec, group: Any
) -> list[Partition]:
    """Partitions of all processes' parameters, which are known by their names. They hold this process's
    members, in blocks; a block whose parameters all belong to others is empty.

    All processes must call this together.
    """
    this = dist.get_rank(group)
    own = [
        (config, device.type, this, m.name, float(m.size), accumulation_dtype(as_real(m.param.detach())))
        for (config, device), members in found.items()
        for m in members
    ]
    entries = [entry for told in gather(group, own) for entry in told]
    place = {(config, device.type): (device, list(members)) for (config, device), members in found.items()}
    result = []
    for config, kind in dict.fromkeys((config, kind) for config, kind, *_ in entries):
        _, _, ranks, names, sizes, dtypes = zip(*(e for e in entries if e[:2] == (config, kind)), strict=True)
        blocks = core.partition(names, spec)
        number = {i: n for n, i in enumerate(i for i, rank in enumerate(ranks) if rank == this)}
        device, members = place.get((config, kind), (_device(kind), []))
        result.append(
            Partition(
                config,
                device,
                members,
                tuple(tuple(number[i] for i in block if i in number) for block in blocks),
                tuple(sum(sizes[i] for i in block) for block in blocks),
                getattr(torch, max(dtypes)),  # "float64" after "float32"
                group,
            )
        )
    return result


def _device(kind: str) -> torch.device:
    """This process's device of a kind."""
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, torch.accelerator.current_device_index())
