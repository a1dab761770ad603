"""The core's state on one side, PyTorch's dictionary per parameter on the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import array_api_compat.torch as xp
import torch

import mlbfgs_core as core
from mlbfgs_core.blocks import Blocks

__all__ = ["Flags", "bind", "store"]

_LEAF_COUNTS = ("leaf_steps", "leaf_window", "leaf_prev_window")
_COEFFICIENTS = tuple(name for name in core.State._fields if name not in core.LEAF_ARRAYS)
_PER_UNIT = (
    "step", "skipped", "accepted", "window", "prev_window", "scatter", "prev_scatter", "signal_to_noise",
    "pending", "due", "length",
)  # fmt: skip
_PER_BLOCK = tuple(name for name in _COEFFICIENTS if name not in (*_LEAF_COUNTS, *_PER_UNIT, "size"))


def bind(
    config: core.Config,
    params: Sequence[torch.Tensor],
    blocks: Blocks,
    memory: dict[torch.Tensor, dict[str, Any]],
) -> core.State:
    """Gather the core's state from the parameters' dictionaries, and make these views of it.

    A parameter without memory gets an empty one and joins its block. Coefficients, which all
    parameters of a block or of the whole carry, are taken from the first that has them.
    """
    new = [param for param in params if "history" not in memory[param]]
    leaves = [param.detach() for param in params]
    fresh = core.init(config, [param.detach() for param in new or params[:1]], xp=xp)
    for index, param in enumerate(new):
        memory[param].update(
            {name: getattr(fresh, name)[index] for name in core.LEAF_ARRAYS if getattr(fresh, name)}
        )
        memory[param].update({name: getattr(fresh, name)[index] for name in _LEAF_COUNTS})
    known = [param for param in params if "gram" in memory[param]]

    def of_block(name: str, block: tuple[int, ...]) -> torch.Tensor:
        carriers = [params[i] for i in block if name in memory[params[i]]]
        return memory[carriers[0]][name] if carriers else getattr(fresh, name)[0]

    values: dict[str, Any] = {
        name: tuple(memory[param][name] for param in params) if getattr(fresh, name) else ()
        for name in core.LEAF_ARRAYS
    }
    for name in _LEAF_COUNTS:
        values[name] = torch.stack([memory[param][name] for param in params])
    for name in _PER_BLOCK:
        values[name] = torch.stack([of_block(name, block) for block in blocks])
    for name in _PER_UNIT:
        values[name] = (memory[known[0]][name] if known else getattr(fresh, name)).clone()
    sizes = [float(sum(leaves[i].numel() for i in block)) for block in blocks]
    values["size"] = torch.tensor(sizes, dtype=values["gamma"].dtype, device=values["gamma"].device)
    state = core.State(**values)
    for number, block in enumerate(blocks):
        for i in block:
            entry = memory[params[i]]
            entry.update({name: getattr(state, name)[i] for name in _LEAF_COUNTS})
            entry.update({name: getattr(state, name)[number] for name in _PER_BLOCK})
            entry.update({name: getattr(state, name) for name in _PER_UNIT})
    return state


def store(bound: core.State, new: core.State) -> None:
    """Write the coefficients of a new state to the bound one, of which the dictionaries hold views.

    Parameter-sized arrays have been updated in place.
    """
    torch._foreach_copy_(
        [getattr(bound, name) for name in _COEFFICIENTS], [getattr(new, name) for name in _COEFFICIENTS]
    )


class Flags:
    """What the next step is to do, copied from the device without waiting for it."""

    def __init__(self, config: core.Config, state: core.State) -> None:
        self._config = config
        device = state.gamma.device
        self._host = torch.empty(2, dtype=torch.bool, pin_memory=device.type == "cuda")
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self.send(state)

    def send(self, state: core.State) -> None:
        """Start copying what the state asks the next step to do."""
        self._host.copy_(core.upcoming(self._config, state), non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> tuple[bool, bool]:
        """Whether the step asks for a check and for a refresh; they were sent one step ago."""
        if self._event is not None:
            self._event.synchronize()
        check, due = self._host.numpy()
        return bool(check), bool(due)
