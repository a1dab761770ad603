"""Scales that keep squares in range: of gradients, of pairs, and of the parameters' norm.

A square over- or underflows at the root of what a number can hold, 1e19 and 1e-19 in float32. So whatever
is squared or multiplied is brought near 1 beforehand, by powers of two, which round nothing. Within the
ordinary range all of them are 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from .call import Call
from .state import State, accumulation_dtype, dtype_name

__all__ = ["first_scale", "is_scaled", "norm_of_squares", "pair_scale", "param_squares"]

Array = Any


class _Limits(NamedTuple):
    """Exponents of 2 for a dtype of averages."""

    usual: float
    """A gradient up to this size is ordinary."""
    change: float
    """How far a scale may be from that of a loss near 1, whose gradients are about the inverse of the
    parameters. It is limited since the first gradient may be unlike the others."""
    most: float
    """The largest scale."""
    lost: float
    """A gradient this far below the parameters is out of the ordinary, too, since a step of its length would
    be rounded away."""
    far: int
    """The scales with which very large and very small parameters are squared."""


_LIMITS = {
    "float64": _Limits(255.0, 400.0, 1000.0, 46.0, 600),
    "float32": _Limits(31.0, 50.0, 124.0, 17.0, 80),
}
_USUAL_WITH_HALF = {"float16": 4.0, "bfloat16": 31.0}
"""`usual` for a history of half precision, whose rows must themselves be near 1; a first gradient that is
unlike the others is then not allowed for."""
_USUAL_PAIR = {"float64": 255, "float16": 8}
"""A pair's curvature up to this size is ordinary, by the history's dtype; 31 for the others. Rows of float16
have little range of their own."""


def is_scaled(state: State, xp: Any = None) -> Array:
    """Whether a step has to multiply its gradients: 0-d array of bool.

    The first one whose gradient is not zero always does, since that determines the scale, and so do those
    before it; later ones do where the scale is not 1. A host that copies the answer without waiting can pass
    it to the next `project` or `step` as `when_scaled`, along with what `upcoming` says.
    """
    xp = array_namespace(state.gamma) if xp is None else xp
    return _is_first(state, xp) | (state.grad_scale != 1.0)


def first_scale(
    call: Call, state: State, params: Sequence[Array] | None, grads: Sequence[Array | None], scale: Array
) -> Array:
    """The scale of gradients, from the largest value of the very first one; the largest value of the
    parameters tells how large the others may be."""
    xp = call.xp
    tops = call.reduce(xp.stack([_top(call, state, grads), _top(call, state, params or ())]))
    usable = xp.isfinite(tops) & (tops > 0)
    exponents = xp.round(xp.log2(xp.where(usable, tops, 1.0)))
    limits = _limits(grads if params is None else params)
    half = _USUAL_WITH_HALF.get(dtype_name(state.history[0])) if state.history else None
    if half is not None:
        limits = limits._replace(usual=half, change=limits.most)

    def near(x: Array, middle: Array, reach: float) -> Array:
        return xp.minimum(xp.maximum(x, middle - reach), middle + reach)

    zero = xp.zeros_like(exponents[0])
    own, others = exponents[0], near(exponents[1], zero, limits.most)
    wanted = near(near(-own, others, limits.change), zero, limits.most)
    unusual = (xp.abs(own) > limits.usual) | (own < others - limits.lost)
    first = 2.0 ** xp.where(unusual, wanted, 0.0)
    return xp.where(_is_first(state, xp), first, scale)


def _is_first(state: State, xp: Any) -> Array:
    """Whether all gradients so far were zero."""
    return xp.all(state.mean_square == 0.0)


def _top(call: Call, state: State, leaves: Sequence[Array | None]) -> Array:
    """The largest magnitude of some leaves, 0-d."""
    kernels, like = call.kernels, state.gamma[:1]
    tops = [
        kernels.to_coefficients(kernels.peak(leaf, dtype), call.dtype)[None]
        for leaf, dtype in zip(leaves, call.dtypes(leaves), strict=True)
        if leaf is not None
    ]
    return call.xp.max(call.xp.concat([call.xp.zeros_like(like), *tops]))


def pair_scale(call: Call, length: Array, history_dtype: str) -> Array:
    """(B,): what both members of a pair are multiplied by after their division by ``|s|``, if `y` then has
    this length: the inverse of its square root if it is out of the ordinary, else 1. The lengths of `s` and
    `y` are then inverse to each other, and neither square leaves the range; `H` does not depend on it."""
    xp, usual = call.xp, _USUAL_PAIR.get(history_dtype, 31)
    usable = xp.isfinite(length) & (length > 0)
    exponent = xp.log2(xp.where(usable, length, 1.0))
    return xp.where(xp.abs(exponent) > usual, 2.0 ** -xp.round(exponent / 2.0), 1.0)


def param_squares(call: Call, params: Sequence[Array], leaf: int, dtype: Any) -> list[Array]:
    """Sums of squares of a parameter as it is, made small, and made large."""
    far = _limits(params).far
    return [call.kernels.square(params[leaf], dtype, factor) for factor in (1.0, 2.0**-far, 2.0**far)]


def norm_of_squares(params: Sequence[Array], squares: Array, xp: Any) -> Array:
    """0-d: the norm, from each block's sums (B, 3) of `param_squares`; from those whose squares are in range.

    References
    ----------
    Blue, ACM Transactions on Mathematical Software 4(1), 1978, on the norm of a vector in three accumulators.
    """
    far = _limits(params).far
    plain, small, large = (xp.sqrt(xp.sum(squares[:, i])) for i in range(3))
    others = xp.where(xp.isfinite(plain), large * 2.0**-far, small * 2.0**far)
    return xp.where(xp.isfinite(plain) & (plain > 2.0 ** (-far / 2)), plain, others)


def _limits(leaves: Sequence[Array | None]) -> _Limits:
    """The limits of the leaves' narrowest dtype of averages."""
    return _LIMITS[min(accumulation_dtype(leaf) for leaf in leaves if leaf is not None)]
