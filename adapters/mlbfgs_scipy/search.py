"""A step by a line search for the strong Wolfe conditions, which goes by slopes where values are rounded."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .objective import Evaluation, Objective, Vector
from .options import Options

__all__ = ["ROUNDING", "search"]

ROUNDING = 1e3 * float(np.finfo(np.float64).eps)
"""Relative difference of two values of the objective that may be rounding alone."""

REACH = 4.0
"""How many times longer the first trial beyond one that is too short may be; then its square, and so on."""

FARTHEST = REACH**32

EDGE = 0.1
"""Next to the ends of what is known to hold a minimum nothing is tried: this part of it at each side."""


class _Trial(NamedTuple):
    """A trial: its step, how far the objective has risen there, and its slope, NaN where not asked for."""

    step: float
    rise: float
    slope: float


def search(objective: Objective, start: Evaluation, direction: Vector, options: Options) -> Evaluation | None:
    slope = -float(start.grad @ direction)
    before = low = _Trial(0.0, 0.0, slope)
    high, best, least = None, None, 0.0
    step, reach, ahead, between, cuts = 1.0, REACH, 0, 0, 0
    while slope < 0 and math.isfinite(step) and ahead < options.maxls and between < options.maxls:
        x = start.x - step * direction
        if (x == start.x).all():
            if high is not None:
                break
            ahead += 1
            step, reach = step * reach, min(reach * reach, FARTHEST)
            continue
        point = objective.at(x)
        trial = _Trial(step, _rise(start, point), math.nan)
        if trial.rise <= options.c1 * step * slope and not point.has_finite_grad:
            trial = trial._replace(rise=math.inf)
        if trial.rise <= options.c1 * step * slope:
            trial = trial._replace(slope=-float(point.grad @ direction))
            if abs(trial.slope) <= -options.c2 * slope:
                return point
            if trial.rise < least:
                best, least = point, trial.rise
        if trial.slope < 0:
            before, low, cuts = low, trial, 0
        else:
            high, cuts = trial, cuts + 1
        if high is None:
            ahead += 1
            step, reach = _beyond(before, low, reach), min(reach * reach, FARTHEST)
        else:
            between += 1
            step = _inside(low, high, cuts)
    return best


def _rise(start: Evaluation, point: Evaluation) -> float:
    if not point.is_finite:
        return math.inf
    rise = point.value - start.value
    if abs(rise) > ROUNDING * max(abs(start.value), abs(point.value)):
        return rise
    if not point.has_finite_grad:
        return math.inf
    return float((start.grad + point.grad) @ (point.x - start.x)) / 2.0


def _beyond(before, low, reach):
    bend = low.slope - before.slope
    ahead = math.inf
    if bend > 0:
        ahead = low.step - (low.step - before.step) * low.slope / bend
    return min(max(ahead, 1.1 * low.step), reach * low.step)


def _inside(low, high, cuts):
    width = high.step - low.step
    edge = EDGE if low.step > 0 else EDGE**cuts
    middle = math.sqrt(low.step) * math.sqrt(high.step) if low.step > 0 else edge * high.step
    if not math.isfinite(high.rise):
        return middle
    if math.isnan(high.slope):
        part = -low.slope * width / (2.0 * (high.rise - low.rise - low.slope * width))
    else:
        mean = 3.0 * (high.rise - low.rise) / width
        a = low.slope + high.slope - mean
        root = math.sqrt(max(a * a - low.slope * high.slope, 0.0))
        part = 1.0 - (high.slope + root - a) / (high.slope - low.slope + 2.0 * root)
    least = min(low.step + edge * width, middle)
    most = low.step + (1.0 - EDGE) * width if cuts < 3 else middle
    return min(max(low.step + part * width, least), most)
