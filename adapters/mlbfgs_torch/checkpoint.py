"""PyTorch's dictionaries per parameter as a neutral snapshot, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor

import mlbfgs_core as core
from mlbfgs_core.adapter import OF_MATRICES, Blocks, leaf_arrays, with_leaf_arrays
from mlbfgs_core.adapter import coefficients as coefficients_of

from .binding import coefficients
from .leaves import Member, Memory, as_real, real_shape
from .rows import Rows
from .sharding import is_sharded, local, placed

__all__ = ["contribution", "outline", "restore", "take", "whole"]


def take(
    config: core.Config,
    members: Sequence[Member],
    blocks: Blocks,
    memory: Memory,
    read: Callable[[Tensor], Any],
) -> core.Snapshot:
    """What these parameters and their dictionaries hold.

    `read` makes arrays of parameter-sized tensors: `whole`, or `outline` for their shapes only.
    Parameters that never had a gradient count as fresh ones, and take no memory.
    """
    if spread := [member.name for member in members if member.spread]:
        rule = "must be 'none' or 'diagonal' for a file of sharded parameters"
        why = "whose factors only torch.distributed.checkpoint holds"
        msg = f"`preconditioner` {rule}, {why}, got 'kronecker' for {spread[0]!r}"
        raise ValueError(msg)
    like = [torch.empty(m.whole, dtype=as_real(m.values.detach()).dtype, device="meta") for m in members]
    matrices = [m.matrix for m in members]
    template = core.Method(config, blocks, matrices=matrices).init(like, xp=xp)
    fresh = core.Method(config).init([torch.empty(0, dtype=tensor.dtype) for tensor in like], xp=xp)
    values: dict[str, Any] = dict(coefficients(fresh, [[m.param] for m in members], blocks, memory))
    values["size"] = torch.tensor(
        [float(sum(math.prod(members[i].whole) for i in block)) for block in blocks],
        dtype=values["gamma"].dtype,
    )
    values = {name: _to_numpy(value) for name, value in values.items()}
    arrays = {
        name: tuple(
            None if tensor is None else read(memory.get(member.param, {}).get(name, tensor))
            for member, tensor in zip(members, tensors, strict=True)
        )
        for name, tensors in leaf_arrays(template).items()
    }
    buffers = [memory.get(member.param, {}).get("momentum_buffer") for member in members]
    return core.Snapshot(
        names=tuple(member.name for member in members),
        blocks=blocks,
        state=with_leaf_arrays(template._replace(**values), arrays),
        params=tuple(read(member.param) for member in members),
        momentum=tuple(None if buffer is None else read(buffer) for buffer in buffers),
    )


def restore(
    snapshot: core.Snapshot, members: Sequence[Member], first_label: int
) -> Iterator[tuple[Member, Tensor, dict[str, Any]]]:
    """Each parameter, its new value as reals, and its new dictionary; nothing is written yet."""
    numbers = coefficients_of(snapshot.state).items()
    state = snapshot.state._replace(**{name: torch.from_numpy(np.array(value)) for name, value in numbers})
    used = snapshot.state.leaf_steps > 0
    if not used.any() and snapshot.state.skipped > 0:
        used = ~used  # the count of skipped steps must stand in some parameter's dictionary
    rows = Rows(state, snapshot.blocks, first_label)
    for i, (member, buffer) in enumerate(zip(members, snapshot.momentum, strict=True)):
        device, entry = member.param.device, {}
        if used[i]:
            arrays = {name: own[i] for name, own in leaf_arrays(state).items() if own[i] is not None}
            entry = {
                name: _to_torch(array).to(device)
                if name in OF_MATRICES
                else _placed(array, member.param, array.ndim - len(member.whole))
                for name, array in arrays.items()
            }
            entry.update({name: row.to(device, copy=True) for name, row in rows.of(i).items()})
        if buffer is not None:
            entry["momentum_buffer"] = _placed(buffer, member.param, 0)
        yield member, local(_placed(snapshot.params[i], member.param, 0)), entry


def whole(tensor: Tensor) -> Any:
    """All values of a tensor, which may share its memory; for a tensor on "meta", zeros without memory."""
    if tensor.is_meta:
        return outline(tensor)
    tensor = tensor.detach()
    return _to_numpy(tensor.full_tensor() if is_sharded(tensor) else tensor)


def outline(tensor: Tensor) -> Any:
    """Zeros without memory in place of a tensor's values."""
    zero = _to_numpy(as_real(torch.zeros((), dtype=tensor.dtype)).reshape(-1)[0])
    return np.broadcast_to(zero, real_shape(tensor))


def contribution(tensor: Tensor) -> Any:
    """Take part in another process's `whole`, and keep nothing of the result."""
    if is_sharded(tensor):
        tensor.detach().full_tensor()
    return outline(tensor)


def _placed(array: Any, param: Tensor, lead: int) -> Tensor:
    return placed(_to_torch(array).to(param.device), param, lead)


def _to_numpy(tensor: Tensor) -> Any:
    tensor = as_real(tensor.detach()).cpu()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _to_torch(array: Any) -> Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
