"""mL-BFGS as an optimizer of pytorch_optimizer, which works with its `Lookahead`, `SAM` and other wrappers.

Lookahead(MLBFGS(model.parameters(), lr=1e-3))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from pytorch_optimizer.base.exception import NoSparseGradientError
from pytorch_optimizer.base.optimizer import BaseOptimizer
from pytorch_optimizer.base.type import Closure, Loss, ParamGroup, ParamsT

import mlbfgs_core as core
from mlbfgs_core import adapter

__all__ = ["MLBFGS"]


class MLBFGS(BaseOptimizer):
    """mL-BFGS, with momentum and decoupled weight decay.

    Parameters
    ----------
    params : iterable of tensors or groups
        A group has its own curvature and its own step of size `lr`.
    lr : float, optional
        Root mean square of a step's changes, before momentum, with the default ``step_length="rms"``; by
        default that of the adapters.
    momentum : float
        Momentum on the direction: Nesterov with the default preset, heavy-ball with the others.
    weight_decay : float
        Parameters shrink by ``lr * weight_decay`` per step.
    maximize : bool
        Maximize instead of minimizing.
    **settings
        Settings of `mlbfgs_core.Config` by name.

    Notes
    -----
    Parameter-sized arrays are state of their parameters, and numbers are kept in the group, where PyTorch
    does not cast them when they are loaded. It does cast the arrays to the parameters' dtype, so a run in
    half precision resumes with rounded averages. Each step waits for the device, to know whether it is
    skipped.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        maximize: bool = False,
        **settings: Unpack[dict[str, Any]],
    ) -> None:
        self.config, self.maximize = core.Config(**settings), maximize
        lr = adapter.default_rate(self.config.step_length) if lr is None else lr
        self.validate_learning_rate(lr)
        self.validate_range(momentum, "momentum", 0.0, 1.0)
        self.validate_non_negative(weight_decay, "weight_decay")
        self.nesterov = adapter.preset_nesterov(self.config.preset)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def __str__(self) -> str:
        return "MLBFGS"

    def init_group(self, group: ParamGroup, **kwargs: Any) -> None:
        """Start the group's state at its first step."""
        if "coefficients" not in group:
            self._write(group, core.Method(self.config).init([param.detach() for param in group["params"]]))
            for param in group["params"]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(self.state[param]["mean_grads"])

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Loss:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if any(param.grad is not None for param in group["params"]):
                self.init_group(group)
                self._step(group)
        return loss

    def _step(self, group: ParamGroup) -> None:
        params = [param.detach() for param in group["params"]]
        updates, state = core.Method(self.config).step(
            self._read(group),
            params,
            [self._gradient(param) for param in group["params"]],
            when_check=_if,
            when_due=_if,
        )
        self._write(group, state)
        if not state.accepted:
            return
        for param, update in zip(group["params"], updates, strict=True):
            if update is not None:
                velocity = self.state[param]["momentum_buffer"].mul_(group["momentum"]).add_(update)
                change = update.add(velocity, alpha=group["momentum"]) if self.nesterov else velocity
                self.apply_weight_decay(
                    param,
                    param.grad,
                    group["lr"],
                    group["weight_decay"],
                    weight_decouple=True,
                    fixed_decay=False,
                )
                param.add_(change.to(param.dtype), alpha=-group["lr"])

    def _gradient(self, param: torch.Tensor) -> torch.Tensor | None:
        if param.grad is not None and param.grad.is_sparse:
            raise NoSparseGradientError(str(self))
        return -param.grad if self.maximize and param.grad is not None else param.grad

    def _read(self, group: ParamGroup) -> core.State:
        states = [self.state[param] for param in group["params"]]
        leaves = {
            name: tuple(state[name] for state in states) for name in core.LEAF_ARRAYS if name in states[0]
        }
        return core.State(**{"moment": (), **leaves, **group["coefficients"]})

    def _write(self, group: ParamGroup, state: core.State) -> None:
        for name in core.LEAF_ARRAYS:
            for param, array in zip(group["params"], getattr(state, name), strict=False):  # may be empty
                self.state[param][name] = array
        group["coefficients"] = {
            name: value for name, value in state._asdict().items() if name not in core.LEAF_ARRAYS
        }


def _if(predicate: torch.Tensor, part: Callable[[Any], Any], operand: Any) -> Any:
    return part(operand) if predicate else operand
