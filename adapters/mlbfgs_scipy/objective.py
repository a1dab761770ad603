"""The objective as a run sees it: results are checked, calls are counted, each point is evaluated once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import approx_fprime

__all__ = ["Evaluation", "Objective", "Vector", "under"]

Vector = npt.NDArray[np.float64]

ROUNDING = 1e3 * float(np.finfo(np.float64).eps)
"""Largest relative difference of two values of the objective that may be only rounding."""


class Evaluation:
    """A point, the objective's value there, and its gradient, which is computed when it is first needed."""

    def __init__(self, objective: Objective, x: Vector) -> None:
        self._objective = objective
        self.x = x
        self.value, self._grad = objective.evaluate(x)

    @property
    def grad(self) -> Vector:
        """The gradient, of shape (n,)."""
        if self._grad is None:
            self._grad = self._objective.differentiate(self)
        return self._grad

    @property
    def is_finite(self) -> bool:
        """Whether the value and, as far as it is known, the gradient are finite."""
        return math.isfinite(self.value) and (self._grad is None or self.has_finite_grad)

    @cached_property
    def has_finite_grad(self) -> bool:
        """Whether the gradient and its square are finite; otherwise there is no direction."""
        return math.isfinite(self.grad @ self.grad)

    @property
    def is_finite_with_grad(self) -> bool:
        """Whether value and gradient are finite; the gradient is computed only if the value is finite."""
        return self.is_finite and self.has_finite_grad

    @cached_property
    def norm(self) -> float:
        """The largest component of the gradient."""
        return float(np.abs(self.grad).max())


class Objective:
    """A user's functions, with their arguments.

    Parameters
    ----------
    fun : callable
        ``fun(x, *args)`` returns a number.
    jac : callable, bool or None
        ``jac(x, *args)`` returns an array of shape (n,). With True, `fun` returns the value and the gradient.
        None or "2-point" means forward differences of `fun`.
    args : tuple
    eps : float or (n,) array
        Absolute step of the differences.
    errors : dict
        How NumPy should treat floating-point errors in the user's functions, in the form of `numpy.geterr`.

    Raises
    ------
    ValueError
        For another kind of derivative; from evaluations, for values of a wrong size.
    TypeError
        For a function that cannot be called; from evaluations, for anything that is not a real number.
    """

    def __init__(
        self, fun: Callable[..., Any], jac: Any, args: tuple[Any, ...], eps: Any, errors: dict[str, Any]
    ) -> None:
        both = _function_of_both(fun, jac)
        self._together = jac is True or both is not None
        fun = fun if both is None else both
        if not callable(fun):
            msg = f"`fun` must be callable, got {fun!r}"
            raise TypeError(msg)
        self._fun, self._args, self._eps = under(errors, fun), args, eps
        self._jac = under(errors, jac) if callable(jac) else jac
        if not (callable(jac) or jac is None or isinstance(jac, bool) or jac == "2-point"):
            rule = "must be callable, True, None or '2-point'"
            msg = f"`jac` {rule}, got {jac!r}: give a function that forms the gradient by that scheme"
            raise ValueError(msg)
        self.nfev = 0
        """Calls of `fun`, including those for differences."""
        self.njev = 0
        """Gradients: calls of `jac` or of a `fun` that returns both, or sets of differences."""
        self.best: Evaluation | None = None
        """The lowest finite value so far."""
        self.first = 0.0
        """The magnitude of the first value."""
        self.noise = 0.0
        """The largest difference of two values that may be noise, as found by searches so far."""
        self._last: Evaluation | None = None

    def at(self, x: Vector) -> Evaluation:
        """The evaluation at a point; a second request in a row for the same point costs nothing."""
        if self._last is None or not (self._last.x == x).all():
            return self.anew(x)
        return self._last

    def anew(self, x: Vector) -> Evaluation:
        """A new evaluation at a point, even if it has been evaluated before."""
        self._last = Evaluation(self, x)
        if self.best is None and math.isfinite(self._last.value):
            self.first = abs(self._last.value)
        if self._last.is_finite and (self.best is None or self._last.value < self.best.value):
            self.best = self._last
        return self._last

    def rounding(self, one: Evaluation, other: Evaluation) -> float:
        """The largest difference of two values that may be only rounding."""
        return max(ROUNDING * max(abs(one.value), abs(other.value)), self.noise)

    def evaluate(self, x: Vector) -> tuple[float, Vector | None]:
        """The value, and the gradient if `fun` returns both."""
        self.nfev += 1
        result = self._fun(x.copy(), *self._args)
        if not self._together:
            return _number(result), None
        self.njev += 1
        try:
            value, grad = result
        except (TypeError, ValueError):
            msg = f"`fun` must return a value and a gradient with jac=True, got {result!r}"
            raise TypeError(msg) from None
        return _number(value), _vector(grad, x.size)

    def differentiate(self, point: Evaluation) -> Vector:
        """The gradient at a point whose value is known."""
        self.njev += 1
        if callable(self._jac):
            return _vector(self._jac(point.x.copy(), *self._args), point.x.size)

        def value(x: Vector) -> float:
            return point.value if np.array_equal(x, point.x) else self.evaluate(x)[0]

        return np.asarray(approx_fprime(point.x, value, self._eps), dtype=np.float64)


def _function_of_both(fun: Any, jac: Any) -> Callable[..., Any] | None:
    """The user's function of value and gradient, taken out of the two wrappers that `minimize` puts around it
    for ``jac=True``.

    The wrappers return the old value for a repeated point, which is wrong if each call draws a new value, and
    hide what a call costs.
    """
    is_pair = type(fun).__module__.startswith("scipy.") and getattr(jac, "__self__", None) is fun
    wrapped = getattr(fun, "fun", None) if is_pair else None
    return wrapped if callable(wrapped) else None


def under(errors: dict[str, Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """A user's function under the user's own settings for floating-point errors, not those of the run."""

    @wraps(function)
    def call(*args: Any, **more: Any) -> Any:
        with np.errstate(**errors):
            return function(*args, **more)

    return call


def _number(value: Any) -> float:
    if isinstance(value, float):
        return float(value)
    array = np.asarray(value)
    if array.size != 1:
        msg = f"`fun` must return a single number, got an array of shape {array.shape}"
        raise ValueError(msg)
    if np.iscomplexobj(array):
        msg = f"`fun` must return a real number, got {value!r}"
        raise TypeError(msg)
    try:
        return float(array.item())
    except (TypeError, ValueError):
        msg = f"`fun` must return a real number, got {value!r}"
        raise TypeError(msg) from None


def _vector(value: Any, size: int) -> Vector:
    array = np.asarray(value)
    if value is None or array.dtype.kind in "USmMV":
        msg = f"`jac` must return real numbers, got {value!r}"
        raise TypeError(msg)
    if array.size != size:
        msg = f"`jac` must return as many numbers as `x0` has, {size}, got an array of shape {array.shape}"
        raise ValueError(msg)
    if array.dtype.kind == "c":
        msg = f"`jac` must return real numbers, got an array of dtype {array.dtype}"
        raise TypeError(msg)
    try:
        return np.array(array, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        msg = f"`jac` must return real numbers, got {value!r}"
        raise TypeError(msg) from None
