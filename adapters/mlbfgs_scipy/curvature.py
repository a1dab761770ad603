"""The core for one vector: directions during a run, and the inverse Hessian at its end."""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import numpy.typing as npt
from scipy.sparse.linalg import LinearOperator

import mlbfgs_core as core
from mlbfgs_core.call import prepare

from .objective import Evaluation, Vector

__all__ = ["Curvature", "InverseHessian"]


class Curvature:
    """The core's state for one vector, and its steps."""

    def __init__(self, config: core.Config, size: int) -> None:
        self.config = config
        self.size = size
        self.forget()

    def forget(self) -> None:
        """Start anew; the old memory stays as it was."""
        self.memory = core.init(self.config, [np.zeros(self.size)], xp=xp)

    def direction(self, point: Evaluation) -> Vector:
        """The direction to subtract, once the point is in the averages; zero for a non-finite gradient."""
        check, due = core.upcoming(self.config, self.memory)
        update, self.memory = core.step(
            self.config,
            self.memory,
            [point.x],
            [point.grad],
            when_check=bool(check),
            when_due=bool(due),
            when_scaled=bool(core.is_scaled(self.memory)),
        )
        return np.asarray(update[0])

    @property
    def state(self) -> core.State:
        """The core's state."""
        return self.memory

    @property
    def has_pairs(self) -> bool:
        """Whether any curvature is known."""
        return bool(self.memory.pairs[0] > 0)


class InverseHessian(LinearOperator):
    """``H = Q (gamma I + B^T C B) Q`` of a state with one vector, symmetric and positive definite.

    `Q` is the diagonal ``q^(-1/2)`` of the preconditioner, or the identity if there is none. `C` is the
    middle matrix. Before the first pair `gamma` is 1.

    Parameters
    ----------
    config : mlbfgs_core.Config
    state : mlbfgs_core.State
        A state with one leaf of shape (n,). It is not consumed; a later step may overwrite what the operator
        reads.

    Notes
    -----
    The operator is float64 of shape (n, n). A product with a vector reads the history twice: ``4 m`` values
    per variable.
    """

    def __init__(self, config: core.Config, state: core.State) -> None:
        history = state.history[0]
        size = history.shape[-1]
        super().__init__(np.dtype(np.float64), (size, size))
        self._rows = np.asarray(history, dtype=np.float64).reshape(-1, size)
        self._inner = state.grad_scale * state.operator[0]
        self._gamma = state.grad_scale * state.gamma[0]
        call = prepare(config, state, None, None, None)
        (metric,) = call.metrics(state)
        self._scale = np.ones(size) if metric is None else metric.inverse_root(call.kernels, ...)

    def _matmat(self, X: npt.NDArray[Any]) -> Vector:
        with np.errstate(under="ignore"):
            scaled = self._scale[:, None] * X
            return self._scale[:, None] * (
                self._gamma * scaled + self._rows.T @ (self._inner @ (self._rows @ scaled))
            )

    def _adjoint(self) -> InverseHessian:
        return self

    def todense(self) -> Vector:
        """The matrix, of shape (n, n)."""
        return self.matmat(np.eye(self.shape[0]))
