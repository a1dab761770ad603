"""mL-BFGS as an optimizer of pytorch_optimizer, which works with its `Lookahead`, `SAM` and other wrappers.

Lookahead(MLBFGS(model.parameters(), lr=1e-3))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import array_api_compat.torch
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
    half precision resumes with rounded averages. Each step waits for the device, to know whether a new pair
    is due.
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
        config, self.maximize = core.Config(**settings), maximize
        self.kernels = core.Kernels(array_api_compat.torch)
        self.method = core.Method(config, kernels=self.kernels)
        self.nesterov = adapter.preset_nesterov(settings.get("preset"))
        lr = adapter.default_rate(config.step_length) if lr is None else lr
        self.validate_learning_rate(lr)
        self.validate_range(momentum, "momentum", 0.0, 1.0)
        self.validate_non_negative(weight_decay, "weight_decay")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def __str__(self) -> str:
        return "MLBFGS"

    def init_group(self, group: ParamGroup, **kwargs: Any) -> None:
        """Start the group's state at its first step."""
        if "coefficients" not in group:
            self._write(group, self.method.init([param.detach() for param in group["params"]]))
            for param in group["params"]:
                dtype = getattr(torch, adapter.accumulation_dtype(param))
                self.state[param]["momentum_buffer"] = torch.zeros_like(param, dtype=dtype)

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
        grads = [self._gradient(param) for param in group["params"]]
        updates, factor, state = self.method.unscaled_step(
            self._read(group), params, grads, when_check=_if, when_due=_if
        )
        self._write(group, state)
        numbers = (group["lr"], group["momentum"], group["weight_decay"])
        end = adapter.StepEnd(factor, *numbers, self.nesterov)
        for own, param, update in zip(group["params"], params, updates, strict=True):
            if update is not None:
                buffer = self.state[own]["momentum_buffer"]
                self.kernels.apply(param, update, buffer, end, state.accepted)

    def _gradient(self, param: torch.Tensor) -> torch.Tensor | None:
        if param.grad is not None and param.grad.is_sparse:
            raise NoSparseGradientError(str(self))
        return -param.grad if self.maximize and param.grad is not None else param.grad

    def _read(self, group: ParamGroup) -> core.State:
        state = core.State(**{**dict.fromkeys(core.State._fields, ()), **group["coefficients"]})
        arrays = {
            name: tuple(self.state[param].get(name) for param in group["params"]) for name in group["names"]
        }
        return adapter.with_leaf_arrays(state, arrays)

    def _write(self, group: ParamGroup, state: core.State) -> None:
        arrays = adapter.leaf_arrays(state)
        for name, values in arrays.items():
            for param, value in zip(group["params"], values, strict=True):
                self.state[param][name] = value
        group["names"], group["coefficients"] = tuple(arrays), adapter.coefficients(state)


def _if(predicate: torch.Tensor, part: Callable[[Any], Any], operand: Any) -> Any:
    return part(operand) if predicate else operand
