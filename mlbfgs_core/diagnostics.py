"""What can be read off an optimizer's state: arrays in, arrays out, nothing waits for a device."""

from __future__ import annotations

from typing import Any, NamedTuple

from array_api_compat import array_namespace
from array_api_compat import device as array_device

from .state import State
from .two_loop import ring_order

__all__ = ["Diagnostics", "Spectrum", "diagnostics", "spectrum"]

Array = Any


class Diagnostics(NamedTuple):
    """Figures of the last step; (B,) arrays where a block has its own, else 0-d."""

    step: Array
    """Accepted steps."""
    skipped: Array
    """Steps left out because of a non-finite gradient."""
    pairs: Array
    """(B,): pairs stored ever."""
    rejected: Array
    """(B,): pairs left out for want of usable curvature."""
    window: Array
    """Steps since the last refresh."""
    mu: Array
    """(B,): curvature ``s.y / s.s`` of the last pair, before damping."""
    tau: Array
    """(B,): weight of `y` in the last stored pair; 1 without the paper's damping."""
    delta: Array
    """(B,): what the cosine floor and the noise floor added to `mu`."""
    gamma: Array
    """(B,): scale of the initial inverse Hessian."""
    cosine: Array
    """(B,): of the angle between the last direction and gradient."""
    signal_to_noise: Array
    """Of the last check."""
    gradient_rms: Array
    """(B,): root of the running mean squared gradient."""


class Spectrum(NamedTuple):
    """Extreme eigenvalues, (B,) each, of the inverse Hessian `H` and of its inverse; in the
    coordinates of the metric where there is one."""

    smallest: Array
    largest: Array
    inverse_smallest: Array
    inverse_largest: Array


def diagnostics(state: State) -> Diagnostics:
    """Figures of the last step.

    Examples
    --------
    >>> import numpy as np
    >>> from mlbfgs_core import Config, init
    >>> int(diagnostics(init(Config(), [np.zeros(3)])).skipped)
    0
    """
    xp = array_namespace(state.gamma)
    return Diagnostics(
        step=state.step,
        skipped=state.skipped,
        pairs=state.pairs,
        rejected=state.rejected,
        window=state.window,
        mu=state.mu,
        tau=state.tau,
        delta=state.delta,
        gamma=state.gamma,
        cosine=state.cosine,
        signal_to_noise=state.signal_to_noise,
        gradient_rms=xp.sqrt(state.mean_square),
    )


def spectrum(state: State) -> Spectrum:
    """Extreme eigenvalues of each block's inverse Hessian and of its inverse.

    Parameters
    ----------
    state : State
        Not consumed.

    Returns
    -------
    Spectrum
        Each end is computed where it is large, so that both keep their relative accuracy: the
        largest of `H` from `H`, its smallest as the reciprocal of the largest of the inverse.

    Notes
    -----
    From coefficients alone: on the span of the rows `B`, ``gamma I + B^T C B`` has the eigenvalues of
    ``gamma I + R C R`` with `R` the symmetric root of the Gram matrix ``B B^T``; outside it is
    `gamma`. The inverse is the BFGS Hessian, built by the rank-two updates of Nocedal & Wright
    eq. 6.19 in coefficient space. Cost: ``O(m^3)`` per block.

    Examples
    --------
    >>> import numpy as np
    >>> from mlbfgs_core import Config, init
    >>> float(spectrum(init(Config(), [np.zeros(3)])).largest[0])
    1.0
    """
    xp = array_namespace(state.gamma)
    largest = _largest(state.gram, state.operator, state.gamma, state.size, xp)
    hessian, scale = _hessian(state.gram, state.pairs, state.gamma, xp)
    inverse_largest = _largest(state.gram, hessian, scale, state.size, xp)
    return Spectrum(1.0 / inverse_largest, largest, 1.0 / largest, inverse_largest)


def _largest(gram: Array, inner: Array, scale: Array, size: Array, xp: Any) -> Array:
    """Largest eigenvalue of ``scale I + B^T inner B``, from the Gram matrix of the rows."""
    device = array_device(gram)
    unit = xp.eye(gram.shape[-1], dtype=gram.dtype, device=device)
    values, vectors = xp.linalg.eigh(gram)
    spanned = values > 10 * gram.shape[-1] * xp.finfo(gram.dtype).eps * values[:, -1:]
    root = xp.sqrt(xp.where(spanned, values, 0.0))
    inner = xp.matmul(xp.matrix_transpose(vectors), xp.matmul(inner, vectors))
    inner = inner * root[:, :, None] * root[:, None, :]
    inner = (inner + xp.matrix_transpose(inner)) / 2 + scale[:, None, None] * unit
    # A direction outside the span keeps `scale`, which counts only if the block has such a one;
    # else it is given the value of a spanned direction, which lies between the extremes.
    full = xp.sum(xp.astype(spanned, gram.dtype), axis=1) >= size
    inside = inner[:, -1, -1]
    filler = xp.where(full, inside, scale)[:, None]
    inner = xp.where(unit > 0, xp.where(spanned, xp.sum(inner * unit, axis=1), filler)[:, None, :], inner)
    return xp.linalg.eigvalsh(inner)[:, -1]


def _hessian(gram: Array, pairs: Array, gamma: Array, xp: Any) -> tuple[Array, Array]:
    """The BFGS Hessian ``scale I + B^T D B``, the inverse of `H`: `D` (B, 2m, 2m) and scale (B,)."""
    m, device = gram.shape[-1] // 2, array_device(gram)
    order = ring_order(pairs, m, xp, device)
    scale = 1.0 / gamma
    columns = xp.arange(2 * m, device=device)
    inner = xp.zeros_like(gram)
    for i in reversed(range(m)):
        s = xp.astype(columns[None, :] == order[:, i, None], gram.dtype)
        y = xp.astype(columns[None, :] == order[:, i, None] + m, gram.dtype)
        gram_s = xp.sum(gram * s[:, None, :], axis=2)
        image = scale[:, None] * s + xp.sum(inner * gram_s[:, None, :], axis=2)
        before = xp.sum(image * gram_s, axis=1)
        curvature = xp.sum(y * gram_s, axis=1)
        there = curvature > 0
        change = y[:, :, None] * y[:, None, :] / xp.where(there, curvature, 1.0)[:, None, None]
        change = change - image[:, :, None] * image[:, None, :] / xp.where(there, before, 1.0)[:, None, None]
        inner = inner + xp.where(there[:, None, None], change, 0.0)
    return inner, scale
