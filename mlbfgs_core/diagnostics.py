"""What can be read off an optimizer's state: arrays in, arrays out, without waiting for a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from .blocks import Blocks
from .state import State

__all__ = ["Diagnostics", "FactorFigures", "block_names", "diagnostics", "factor_figures"]

Array = Any


class Diagnostics(NamedTuple):
    """Figures of the last step; (B,) arrays if each block has its own, else 0-d.

    The arrays are on the state's device, and nothing has been waited for. Most are the state's own.
    """

    step: Array
    """Accepted steps."""
    skipped: Array
    """Steps left out because of a non-finite gradient."""
    pairs: Array
    """(B,): pairs stored so far."""
    rejected: Array
    """(B,): pairs left out because they had no usable curvature."""
    window: Array
    """Steps since the last refresh."""
    interval: Array
    """Steps of the previous window, from one refresh to the next; 0 before there was one."""
    mu: Array
    """(B,): curvature ``s.y / s.s`` of the last pair, before damping."""
    tau: Array
    """(B,): weight of `y` in the paper's damping of the last stored pair; 1 without it."""
    delta: Array
    """(B,): what the cosine floor and the noise floor added to `mu`."""
    gamma: Array
    """(B,): scale of the initial inverse Hessian."""
    cosine: Array
    """(B,): of the angle between the last direction and gradient."""
    signal_to_noise: Array
    """At the last check: ``|y|^2`` over the noise expected in it."""
    gradient_rms: Array
    """(B,): root of the running mean squared gradient."""
    grad_scale: Array
    """Power of two by which gradients are multiplied before anything else; see `mlbfgs_core.State`."""
    gram: Array
    """(B, 2m, 2m): inner products of the stored rows; for `curvatures`."""
    middle_matrix: Array
    """(B, 2m, 2m): `C`, for `curvatures`; in units of `grad_scale`, as are the rows."""

    def __repr__(self) -> str:
        """The numbers, and the shapes of the matrices."""
        words = [
            f"{name}=<{tuple(value.shape)}>" if name in ("gram", "middle_matrix") else f"{name}={value!r}"
            for name, value in zip(self._fields, self, strict=True)
        ]
        return f"{type(self).__name__}({', '.join(words)})"


def diagnostics(state: State) -> Diagnostics:
    """Figures of the last step.

    Examples
    --------
    >>> import numpy as np
    >>> from mlbfgs_core import Config, Method
    >>> int(diagnostics(Method(Config()).init([np.zeros(3)])).skipped)
    0
    """
    xp, unit = array_namespace(state.gamma), state.grad_scale[..., None]  # states may be stacked
    return Diagnostics(
        step=state.step,
        skipped=state.skipped,
        pairs=state.pairs,
        rejected=state.rejected,
        window=state.window,
        interval=state.prev_window,
        mu=state.mu,
        tau=state.tau,
        delta=state.delta,
        gamma=state.gamma * unit,
        cosine=state.cosine,
        signal_to_noise=state.signal_to_noise,
        gradient_rms=xp.sqrt(state.mean_square) / unit,
        grad_scale=state.grad_scale,
        gram=state.gram,
        middle_matrix=state.middle_matrix,
    )


class FactorFigures(NamedTuple):
    """What can be said of one side's factors of a Kronecker preconditioner; (N,) arrays, for N matrices."""

    condition: Array
    """Largest over smallest eigenvalue, of those that rounding lets be known; 1 without a gradient."""
    share: Array
    """The part of the sum of all eigenvalues that the largest has; 0 without a gradient."""
    turn: Array
    """How far the basis is from the factor's eigenvectors: the part of the factor's norm that lies off the
    diagonal in the basis, from 0 to 1. A new basis turns by about this much."""


def factor_figures(factor: Array, basis: Array) -> FactorFigures:
    """Figures of the factors of one weight's rows, or columns, with ``preconditioner="kronecker"``.

    Parameters
    ----------
    factor, basis : (N, n, n) arrays
        "left_factor" and "left_basis" (rows) or "right_factor" and "right_basis" (columns) of a weight, as
        `State.preconditioner`, PyTorch's dictionary per parameter, or a state dict of arrays has them.

    Returns
    -------
    FactorFigures

    Notes
    -----
    Eigenvalues are those along the basis, ``diag(U^T L U)``. Costs two products of n x n matrices for each
    factor, and waits for no device.

    Examples
    --------
    >>> import numpy as np
    >>> factor = np.diag([4.0, 1.0])[None]
    >>> factor_figures(factor, np.eye(2)[None]).condition
    array([4.])
    """
    xp = array_namespace(factor, basis)
    inside = xp.matmul(xp.matrix_transpose(basis), xp.matmul(factor, basis))
    values = xp.linalg.diagonal(inside)
    top, total = xp.max(values, axis=-1), xp.sum(values, axis=-1)
    rounding = values.shape[-1] * xp.finfo(values.dtype).eps * top
    known = values > rounding[:, None]
    least = xp.min(xp.where(known, values, top[:, None]), axis=-1)
    there, scale = top > 0, xp.where(top > 0, top, 1.0)[:, None]
    along, whole = (
        xp.sum((values / scale) ** 2, axis=-1),
        xp.sum((inside / scale[:, :, None]) ** 2, axis=(1, 2)),
    )
    off = xp.maximum(whole - along, xp.zeros_like(whole)) / xp.where(there, whole, 1.0)
    return FactorFigures(
        xp.where(there, top / xp.where(there, least, 1.0), 1.0),
        xp.where(there, top / xp.where(there, total, 1.0), 0.0),
        xp.where(there, xp.sqrt(off), 0.0),
    )


def block_names(names: Sequence[str], blocks: Blocks) -> tuple[str, ...]:
    """A short name for each block, from those of its leaves.

    Parameters
    ----------
    names : sequence of str
        Of all leaves.
    blocks : tuple of tuples of int
        From `partition`.

    Returns
    -------
    tuple of str
        "all" for the only block; the name of a single leaf; else what the names have in common up to a dot,
        if no other block has the same; else the first name and the number of the others.

    Examples
    --------
    >>> block_names(["a.weight", "a.bias", "b.weight"], ((0, 1), (2,)))
    ('a', 'b.weight')
    >>> block_names(["x", "y", "z"], ((0, 2), (1,)))
    ('x (+1)', 'y')
    """
    if len(blocks) == 1:
        return ("all",)
    members = [[names[i] for i in block] for block in blocks]
    stems = [_common_stem(own) for own in members]
    short = []
    for number, (own, stem) in enumerate(zip(members, stems, strict=True)):
        if stem and stems.count(stem) == 1:
            short.append(stem)
        elif own:
            short.append(f"{own[0]} (+{len(own) - 1})")
        else:  # all leaves belong to another owner
            short.append(f"block {number}")
    return tuple(short)


def _common_stem(names: Sequence[str]) -> str:
    """The leading components that dotted names have in common; all components of a single name."""
    stem: list[str] = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        stem.append(parts[0])
    return ".".join(stem)
