"""mL-BFGS as a module of torchzero, which chains with its learning rates, momenta, clips and line searches.

tz.Optimizer(model.parameters(), MLBFGS(), tz.m.NAG(0.9), tz.m.LR(1e-3))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import torch
from torchzero.core import Chainable, Objective, Transform

import mlbfgs_core as core
from mlbfgs_core.blocks import Blocks

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
        blocks: Blocks | None = None,
        inner: Chainable | None = None,
        **settings: Unpack[dict[str, Any]],
    ) -> None:
        super().__init__(inner=inner)
        self.config, self.blocks = core.Config(**settings), blocks

    @torch.no_grad()
    def update_states(
        self, objective: Objective, states: States, settings: Sequence[Mapping[str, Any]]
    ) -> None:
        """Learn from the gradient."""
        params, grads = [param.detach() for param in objective.params], objective.get_grads()
        if "history" not in states[0]:
            self._write(states, core.Method(self.config, self.blocks).init(params))
        state = self._read(states)
        state = core.Method(self.config, blocks=self.blocks).observe(state, params, grads, when=_if)
        if state.due:
            state = core.Method(self.config, blocks=self.blocks).refresh(state, True)
        self._write(states, state)

    @torch.no_grad()
    def apply_states(
        self, objective: Objective, states: States, settings: Sequence[Mapping[str, Any]]
    ) -> Objective:
        """Precondition the update."""
        params = [param.detach() for param in objective.params]
        state = self._read(states)
        objective.updates, state = core.Method(self.config, blocks=self.blocks).direction(
            state, objective.get_updates(), params=params
        )
        self._write(states, state)
        if not state.accepted:
            objective.stop = objective.skip_update = True
        return objective

    def _read(self, states: States) -> core.State:
        """The core's state, from torchzero's, which keeps parameter-sized arrays with their parameters."""
        leaves = {
            name: tuple(state[name] for state in states) for name in core.LEAF_ARRAYS if name in states[0]
        }
        return core.State(**{"moment": (), **leaves, **self.global_state["coefficients"]})

    def _write(self, states: States, state: core.State) -> None:
        for name in core.LEAF_ARRAYS:
            for own, array in zip(states, getattr(state, name), strict=False):  # may be empty
                own[name] = array
        self.global_state["coefficients"] = {
            name: value for name, value in state._asdict().items() if name not in core.LEAF_ARRAYS
        }


def _if(predicate: torch.Tensor, part: Callable[[Any], Any], operand: Any) -> Any:
    return part(operand) if predicate else operand
