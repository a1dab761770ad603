"""mL-BFGS as a module of torchzero, which chains with its learning rates, momenta, clips and line searches.

tz.Optimizer(model.parameters(), MLBFGS(), tz.m.NAG(0.9), tz.m.LR(1e-3))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import torch
from torchzero.core import Chainable, Objective, Transform

import mlbfgs_core as core
from mlbfgs_core import adapter

__all__ = ["MLBFGS"]

States = list[dict[str, Any]]


class MLBFGS(Transform):
    """Precondition the update by the inverse Hessian of mL-BFGS.

    Curvature is learned from the gradients of the loss, whatever modules come before this one.

    Parameters
    ----------
    blocks : tuple of tuples of int, optional
        Indices of the parameters that share curvature, from `mlbfgs_core.partition`; by default one block.
    inner : module or sequence of modules, optional
        Applied to the update between learning from the gradient and preconditioning.
    **settings
        Settings of `mlbfgs_core.Config` by name.

    Notes
    -----
    A non-finite gradient ends the step: no later module sees it, and no parameter moves. To know that, and
    whether a new pair is due, each step waits for the device.
    """

    def __init__(
        self,
        blocks: adapter.Blocks | None = None,
        inner: Chainable | None = None,
        **settings: Unpack[dict[str, Any]],
    ) -> None:
        super().__init__(inner=inner)
        self.method = core.Method(core.Config(**settings), blocks)

    @torch.no_grad()
    def update_states(
        self, objective: Objective, states: States, settings: Sequence[Mapping[str, Any]]
    ) -> None:
        """Learn from the gradient."""
        params, grads = [param.detach() for param in objective.params], objective.get_grads()
        started = "coefficients" in self.global_state
        state = self._read(states) if started else self.method.init(params)
        state = self.method.observe(state, params, grads, when=_if)
        if state.due:
            state = self.method.refresh(state, True)
        self._write(states, state)

    @torch.no_grad()
    def apply_states(
        self, objective: Objective, states: States, settings: Sequence[Mapping[str, Any]]
    ) -> Objective:
        """Precondition the update."""
        params = [param.detach() for param in objective.params]
        updates = objective.get_updates()
        objective.updates, state = self.method.direction(self._read(states), updates, params)
        self._write(states, state)
        if not state.accepted:
            objective.stop = objective.skip_update = True
        return objective

    def _read(self, states: States) -> core.State:
        """The core's state, from torchzero's, which keeps parameter-sized arrays with their parameters."""
        own, names = self.global_state["coefficients"], self.global_state["names"]
        state = core.State(**{**dict.fromkeys(core.State._fields, ()), **own})
        return adapter.with_leaf_arrays(
            state, {name: tuple(each.get(name) for each in states) for name in names}
        )

    def _write(self, states: States, state: core.State) -> None:
        arrays = adapter.leaf_arrays(state)
        for name, values in arrays.items():
            for each, value in zip(states, values, strict=True):
                each[name] = value
        self.global_state["names"] = tuple(arrays)
        self.global_state["coefficients"] = adapter.coefficients(state)


def _if(predicate: torch.Tensor, part: Callable[[Any], Any], operand: Any) -> Any:
    return part(operand) if predicate else operand
