"""The matrices of parameters for a Kronecker preconditioner."""

from __future__ import annotations

import mlbfgs_core as core
from mlbfgs_core import adapter

from .packing import sharded_explicitly
from .tree import Tree
from .values import kind

__all__ = ["check_matrices", "matrices_of"]


def check_matrices(config: core.Config, axes: tuple[str, ...]) -> None:
    """Raise ValueError or TypeError unless matrices can be had with these settings and sharded axes."""
    if config.preconditioner != "kronecker":
        return
    if axes:
        given = axes[0] if len(axes) == 1 else axes
        msg = f"`axis_name` must be None with preconditioner='kronecker', got {given!r}"
        raise ValueError(msg)
    if not isinstance(config.max_preconditioner_dim, int):
        rule = "must be an int, since it decides the state's shapes (name it in `static_args`)"
        msg = f"`max_preconditioner_dim` {rule}, got {config.max_preconditioner_dim!r}"
        raise TypeError(msg)


def matrices_of(config: core.Config, tree: Tree, axes: adapter.MatrixAxes) -> list[adapter.Matrix | None]:
    """The matrices of a tree's real leaves.

    Raises
    ------
    ValueError, TypeError
        As `adapter.matrices_in`; and a matrix that is sharded over explicit axes, whose products JAX does not
        place by itself.
    """
    if not tree.names:  # a tree of placeholders, as `optax.tree.map_params` makes it
        return []
    shapes, likes = ([tuple(leaf.shape) for leaf in leaves] for leaves in (tree.given, tree.leaves))
    matrices = adapter.matrices_in(config, tree.names, shapes, axes, likes)
    for name, leaf, matrix in zip(tree.names, tree.leaves, matrices, strict=True):
        if matrix is not None and (axes_of := sharded_explicitly(leaf)):
            rule = "must not be 'kronecker' where a matrix is sharded over explicit axes"
            told = f"{kind(leaf)} over {axes_of} at {name!r} (automatic axes will do)"
            msg = f"`preconditioner` {rule}, got {told}"
            raise ValueError(msg)
    return matrices
