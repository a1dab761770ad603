"""mL-BFGS as a Keras optimizer, for the JAX and PyTorch backends.

model.compile(MLBFGS(1e-3), loss="mse")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

import mlbfgs_core as core
from mlbfgs_core import adapter

__all__ = ["MLBFGS"]


@keras.saving.register_keras_serializable("mlbfgs")
class MLBFGS(keras.optimizers.Optimizer):
    """mL-BFGS: quasi-Newton training from momentum-averaged curvature pairs.

    Parameters
    ----------
    learning_rate : float or schedule, optional
        Root mean square of a step's changes, before momentum, with the default ``step_length="rms"``; by
        default that of the adapters.
    momentum : float, optional
        Momentum on the direction; by default that of the preset.
    nesterov : bool, optional
        Whether the momentum looks ahead; by default as in the preset.
    settings : dict, optional
        Settings of `mlbfgs_core.Config` by name.
    **options
        Those of every Keras optimizer: `weight_decay` (decoupled), `global_clipnorm`, `use_ema`, ...

    Notes
    -----
    A step with a non-finite gradient leaves parameters, momentum and curvature as they were. Every array
    of the core's state is a variable of the optimizer, which Keras saves and loads. All parameters are one
    block.
    """

    def __init__(
        self,
        learning_rate: Any = None,
        momentum: float | None = None,
        nesterov: bool | None = None,
        settings: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        config = core.Config(**(settings or {}))
        rate = adapter.default_rate(config.step_length) if learning_rate is None else learning_rate
        super().__init__(learning_rate=rate, **options)
        self.settings, self.config = dict(settings or {}), config
        preset = self.settings.get("preset")
        self.momentum = adapter.preset_momentum(preset) if momentum is None else momentum
        self.nesterov = adapter.preset_nesterov(preset) if nesterov is None else nesterov

    def build(self, variables: list[keras.Variable]) -> None:
        """Create a variable for each array of the state."""
        if self.built:
            return
        super().build(variables)
        # Leaves may be abstract: only their shape and dtype are needed.
        start = core.Method(self.config).init(variables, xp=np)
        arrays = {
            name: tuple(self._variable(name, array) for array in own)
            for name, own in adapter.leaf_arrays(start).items()
        }
        numbers = {name: self._variable(name, own) for name, own in adapter.coefficients(start).items()}
        self._state = adapter.with_leaf_arrays(start, arrays)._replace(**numbers)
        self._velocities = self.add_optimizer_variables(variables, "momentum") if self.momentum else []

    def _variable(self, name: str, array: np.ndarray) -> keras.Variable:
        return self.add_variable(
            array.shape, lambda shape, dtype: ops.convert_to_tensor(array, dtype), str(array.dtype), name=name
        )

    def _apply_weight_decay(self, variables: list[keras.Variable]) -> None:
        """Does nothing yet: gradients belong to the parameters as they were before the decay."""

    def _backend_update_step(
        self, grads: list[Any], trainable_variables: list[keras.Variable], learning_rate: Any
    ) -> None:
        """Update all parameters at once, where Keras would call `update_step` for each."""
        # Keras leaves out variables without a gradient; the core expects None in their place.
        given = {
            self._get_variable_index(variable): grad
            for variable, grad in zip(trainable_variables, grads, strict=True)
        }
        updates, state = core.Method(self.config).step(
            keras.tree.map_structure(lambda variable: variable.value, self._state),
            [ops.stop_gradient(variable.value) for variable in self._trainable_variables],
            [given.get(index) for index in range(len(self._trainable_variables))],
            when_check=_if,
            when_due=_if,
        )
        # Keras has put a dict of its own in the place of the state's.
        for own, value in zip(keras.tree.flatten(self._state), keras.tree.flatten(state), strict=True):
            _keep(own, value)
        for variable in trainable_variables:
            index = self._get_variable_index(variable)
            self._move(variable, updates[index], index, learning_rate, state.accepted)

    def _move(
        self, variable: keras.Variable, update: Any, index: int, learning_rate: Any, accepted: Any
    ) -> None:
        """Apply momentum, weight decay and learning rate if the step was accepted."""
        if self.momentum:
            velocity = self._velocities[index]
            carried = ops.where(accepted, self.momentum * velocity.value + update, velocity.value)
            velocity.assign(carried)
            update = update + self.momentum * carried if self.nesterov else carried
        if self.weight_decay is not None and self._use_weight_decay(variable):
            update = update + self.weight_decay * variable.value
        rate = ops.cast(learning_rate, variable.dtype)
        variable.assign(ops.where(accepted, variable.value - rate * update, variable.value))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "settings": self.settings,
        }


def _keep(variable: keras.Variable, value: Any) -> None:
    """Assign a new value, unless it was already written to the variable's own memory."""
    if value is not variable.value:
        variable.assign(value)


def _if(predicate: Any, part: Callable[[Any], Any], operand: Any) -> Any:
    return ops.cond(predicate, lambda: part(operand), lambda: operand)
