"""The figures of the last step, from any state of optax that holds them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import optax

import mlbfgs_core as core
from mlbfgs_core import adapter

from .state import MLBFGSState
from .tree import path_names

__all__ = ["block_names", "diagnostics"]


def diagnostics(opt_state: optax.OptState) -> list[core.Diagnostics]:
    """Figures of the last step, one record for each `MLBFGSState` in a state.

    Parameters
    ----------
    opt_state : tree
        Of `mlbfgs`, `scale_by_mlbfgs` or anything around them: `optax.chain`, `inject_hyperparams`,
        `MultiSteps`, `partition`, ... In a state with leading axes, as `jax.vmap` makes them for an
        ensemble, each member has a record of its own, in order.

    Returns
    -------
    list of Diagnostics

    Raises
    ------
    ValueError
        A state that holds none.

    Notes
    -----
    Works on traced arrays, too. Nothing waits for the device until a value is read; donating the state to
    the next step deletes what has not been read (`mlbfgs_diagnostics.Recorder` copies it).

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from mlbfgs_jax import mlbfgs
    >>> (figures,) = diagnostics(mlbfgs(1e-3).init({"w": jnp.ones(3)}))
    >>> int(figures.step)
    0
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_own)
    found = [node for node in nodes if _is_own(node)]
    if not found:
        kinds = sorted({type(node).__name__ for node in nodes})
        msg = f"`opt_state` must hold an MLBFGSState, got leaves of the types {kinds}"
        raise ValueError(msg)
    return [record for state in found for record in _members(state)]


def block_names(params: optax.Params, blocks: adapter.BlockSpec = "all") -> tuple[str, ...]:
    """A short name for each block of parameters, in the order of the figures in `diagnostics`.

    Parameters
    ----------
    params : tree
    blocks : {"all", "layer", "parameter"} or callable
        As given to `mlbfgs`.

    Raises
    ------
    ValueError, TypeError
        As `mlbfgs_core.partition`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> block_names({"a": {"w": jnp.ones(3), "b": jnp.ones(1)}, "c": {"w": jnp.ones(2)}}, "layer")
    ('a', 'c.w')
    """
    names = path_names([path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]])
    return adapter.block_names(names, core.partition(names, blocks))


def _is_own(node: Any) -> bool:
    return isinstance(node, MLBFGSState)


def _members(state: MLBFGSState) -> Iterator[core.Diagnostics]:
    """The record of a state, or those of an ensemble's members."""
    record, leading = core.diagnostics(state), state.step.shape
    if not leading:
        yield record
        return
    flat = [x.reshape(math.prod(leading), *x.shape[len(leading) :]) for x in record]
    for member in range(math.prod(leading)):
        yield core.Diagnostics(*(x[member] for x in flat))
