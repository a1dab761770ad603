"""A step by a line search: SciPy's, for the strong Wolfe conditions, begun at the right order of length."""

from __future__ import annotations

import warnings

import numpy as np
from scipy.optimize import line_search

from .objective import Evaluation, Objective, Vector
from .options import Options

__all__ = ["ROUNDING", "search"]

SHORTER = 0.1
"""What is tried next of a direction that is too long by more than that."""

ROUNDING = 10.0 * float(np.finfo(np.float64).eps)
"""Relative difference of two values of the objective that may be rounding alone."""


class _NotFiniteError(Exception):
    """The gradient at a trial is not finite, so that the search cannot go on from there."""

    def __init__(self, x: Vector) -> None:
        self.x = x


def search(objective: Objective, start: Evaluation, direction: Vector, options: Options) -> Evaluation | None:
    """The point that a line search from `start` against `direction` finds; None where it finds no lower one.

    Parameters
    ----------
    objective : Objective
    start : Evaluation
        Finite.
    direction : (n,) array
        In which the objective rises. The first trial is the whole of it.
    options : Options
        Its `c1`, `c2` and `maxls` count.

    Returns
    -------
    Evaluation or None
        One that obeys the conditions; where the search fails, the lowest point of those whose gradient it
        has seen.

    Notes
    -----
    SciPy's search brings a trial that is too long down by halves, ten times at most. So a direction is first
    cut to a tenth for as long as the objective at its end is not finite, or so high that the parabola
    through what is known has its minimum in that tenth. Each cut costs a value. A value that differs from
    that at the start by rounding alone is replaced by what the two gradients say of it, so that a minimum
    far from zero can be approached as closely as gradients allow.

    References
    ----------
    Nocedal & Wright, Numerical Optimization, 2nd ed., algorithms 3.5 and 3.6, and eq. 3.57 for the parabola.
    Hager & Zhang, SIAM Journal on Optimization 16(1), 2005, section 4.1, for conditions without values.
    """
    lowest = start

    def value(x: Vector) -> float:
        point = objective.at(x)
        if not point.is_finite:
            return np.inf
        if abs(point.value - start.value) > ROUNDING * abs(start.value):
            return point.value
        return start.value + float((start.grad + gradient(x)) @ (x - start.x)) / 2.0

    def gradient(x: Vector) -> Vector:
        nonlocal lowest
        point = objective.at(x)
        if not point.has_finite_grad:
            raise _NotFiniteError(x)
        if point.value < lowest.value:
            lowest = point
        return point.grad

    for _ in range(options.maxls):
        if not start.grad @ direction > 0:
            break
        try:
            if _is_too_long(start, direction, value(start.x - direction)):
                direction = SHORTER * direction
                continue
            with warnings.catch_warnings():  # of a search that fails, which is told by its result
                warnings.filterwarnings("ignore", "The line search|Rounding errors", RuntimeWarning)
                step, *_, grad = line_search(
                    value,
                    gradient,
                    start.x,
                    -direction,
                    start.grad,
                    start.value,
                    c1=options.c1,
                    c2=options.c2,
                    maxiter=options.maxls,
                )
            if grad is not None:
                return objective.at(start.x - step * direction)
            break
        except _NotFiniteError as failure:
            if lowest is not start:
                break
            direction = SHORTER * (start.x - failure.x)
    return None if lowest is start else lowest


def _is_too_long(start: Evaluation, direction: Vector, value: float) -> bool:
    """Whether the parabola with the slope at the start and the value at the end has its minimum in the first
    tenth."""
    slope = float(start.grad @ direction)
    return bool(slope < 2.0 * SHORTER * (value - start.value + slope))
