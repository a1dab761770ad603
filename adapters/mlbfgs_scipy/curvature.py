"""The core for one vector: directions during a run, and the inverse Hessian at its end."""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import numpy.typing as npt
from scipy.sparse.linalg import LinearOperator

import mlbfgs_core as core
from mlbfgs_core import adapter

from .objective import Evaluation, Vector

__all__ = ["Curvature", "InverseHessian"]


class Curvature:
    """The core's state for one vector, and its steps."""

    def __init__(self, config: core.Config, size: int) -> None:
        self.method = core.Method(config)
        self.size = size
        self.forget()

    def forget(self) -> None:
        """Start anew; the old memory stays as it was."""
        self.memory = self.method.init([np.zeros(self.size)], xp=xp)

    def direction(self, point: Evaluation) -> Vector:
        """The direction to subtract, once the point is in the averages; zero for a non-finite gradient."""
        asked = adapter.Upcoming(*map(bool, self.method.upcoming(self.memory)))
        update, self.memory = self.method.step(
            self.memory,
            [point.x],
            [point.grad],
            when_check=asked.check,
            when_due=asked.due,
            when_scaled=asked.scaled,
            when_rows=asked.rows,
        )
        return np.asarray(update[0])

    @property
    def state(self) -> core.State:
        """The core's state."""
        return self.memory

    @property
    def has_pairs(self) -> bool:
        """Whether any curvature is known."""
        return bool(self.memory.middle_matrix.any())


class InverseHessian(LinearOperator):
    """``H = R^T (gamma I + B^T C B) R`` of a state with one vector, symmetric and positive definite.

    `R` is that of the preconditioner, or the identity if there is none; `C` is the middle matrix. Before the
    first pair `gamma` is 1.

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
        size = int(state.size[0])
        super().__init__(np.dtype(np.float64), (size, size))
        self._config, self._state = config, state

    def _matmat(self, X: npt.NDArray[Any]) -> Vector:
        if np.iscomplexobj(X):
            return self._matmat(X.real) + 1j * self._matmat(X.imag)
        product = np.empty(X.shape)
        with np.errstate(under="ignore"):
            for column in range(X.shape[1]):
                vector = np.asarray(X[:, column], dtype=np.float64)
                (product[:, column],) = core.inverse_hessian(self._config, self._state, [vector])
        return product

    def _adjoint(self) -> InverseHessian:
        return self

    def todense(self) -> Vector:
        """The matrix, of shape (n, n)."""
        return self.matmat(np.eye(self.shape[0]))
