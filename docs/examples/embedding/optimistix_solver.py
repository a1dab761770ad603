"""mL-BFGS as an Optimistix descent, which a search turns into a minimiser.

optimistix.minimise(fn, MLBFGS(rtol=1e-6, atol=1e-6), y0)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, Unpack

import equinox as eqx
import jax
import optimistix as optx
from jax import lax
from optimistix import RESULTS, FunctionInfo

import mlbfgs_core as core

__all__ = ["MLBFGS", "MLBFGSDescent"]

Y = TypeVar("Y")


class _DescentState(eqx.Module, Generic[Y]):
    curvature: core.State
    direction: Y


class MLBFGSDescent(optx.AbstractDescent[Y, FunctionInfo.EvalGrad, _DescentState]):
    """The direction of mL-BFGS at each accepted point.

    Parameters
    ----------
    **settings
        Settings of `mlbfgs_core.Config` by name.

    Notes
    -----
    At a point with a non-finite gradient the solve ends with ``RESULTS.nonfinite``.
    """

    config: core.Config = eqx.field(static=True)

    def __init__(self, **settings: Unpack[dict[str, Any]]) -> None:
        self.config = core.Config(**settings)

    def init(self, y: Y, f_info_struct: FunctionInfo.EvalGrad) -> _DescentState:
        return _DescentState(core.Method(self.config).init(jax.tree.leaves(y)), y)

    def query(self, y: Y, f_info: FunctionInfo.EvalGrad, state: _DescentState) -> _DescentState:
        params, tree = jax.tree.flatten(y)
        # The default precision of products on a GPU or a TPU is below that of float32.
        with jax.default_matmul_precision("highest"):
            direction, curvature = core.Method(self.config).step(
                state.curvature, params, jax.tree.leaves(f_info.grad), when_check=_if, when_due=_if
            )
        return _DescentState(curvature, tree.unflatten(direction))

    def step(self, step_size: jax.Array, state: _DescentState) -> tuple[Y, RESULTS]:
        # A direction of zero would look like convergence.
        result = RESULTS.where(state.curvature.accepted, RESULTS.successful, RESULTS.nonfinite)
        return jax.tree.map(lambda d: -step_size * d, state.direction), result


class MLBFGS(optx.AbstractGradientDescent[Y, Any]):
    """Minimise along the directions of mL-BFGS.

    Parameters
    ----------
    rtol, atol : float
        Tolerances for termination, as of every Optimistix minimiser.
    norm : callable
        See `rtol`.
    search : optimistix.AbstractSearch, optional
        By default `optimistix.BacktrackingArmijo`.
    **settings
        As in `MLBFGSDescent`; ``preset="lbfgs"`` by default.
    """

    rtol: float
    atol: float
    norm: Callable[[Any], jax.Array]
    descent: MLBFGSDescent[Y]
    search: optx.AbstractSearch

    def __init__(
        self,
        rtol: float,
        atol: float,
        norm: Callable[[Any], jax.Array] = optx.max_norm,
        search: optx.AbstractSearch | None = None,
        **settings: Unpack[dict[str, Any]],
    ) -> None:
        self.rtol, self.atol, self.norm = rtol, atol, norm
        self.descent = MLBFGSDescent(**{"preset": "lbfgs", **settings})
        self.search = optx.BacktrackingArmijo() if search is None else search


def _if(predicate: Any, part: Callable[[Any], Any], operand: Any) -> Any:
    return lax.cond(predicate, part, lambda same: same, operand)
