"""Curvature pairs of a recorded path: every kind of average sees the same parameters and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

import mlbfgs_core as core

__all__ = ["CONTROL", "KINDS", "Array", "Watched", "secant_errors", "watch"]

Array = np.ndarray[Any, Any]
CONTROL = "only $M_g$ restarted"
KINDS: dict[str, dict[str, Any]] = {
    "L-BFGS pairs": {"preset": "lbfgs", "beta": 0.0},
    "momentum pairs": {"preset": "lbfgs", "beta": 0.9},
    "window means": {"preset": "lbfgs", "beta": None},
    CONTROL: {"preset": "lbfgs", "beta": 0.9},
}
"""Plain differences T steps apart, differences of exponential averages (the paper), differences of plain
means over the interval (the library), and the paper's pairs when only the average of the gradient starts anew
after each pair."""


class Watched(NamedTuple):
    """What an observer has seen after a path."""

    state: core.State
    pairs: list[tuple[Array, Array]]
    """All pairs (s, y), undamped, including those without usable curvature."""


def watch(
    settings: dict[str, Any], path: Sequence[Array], gradients: Sequence[Array], *, control: bool = False
) -> Watched:
    """Form pairs along a path that was determined by another optimizer.

    With `control` the average of the gradient starts anew after each pair, but that of the parameters does
    not.
    """
    config, pairs = core.Config(**settings), []
    state = core.Method(config).init([path[0]])
    for x, gradient in zip(path, gradients, strict=True):
        if control and int(state.window) == 0 and int(state.prev_window) > 0:
            state = state._replace(mean_grads=(gradient.copy(),))
        state = core.Method(config).observe(state, [x], [gradient])
        if state.due and int(state.prev_window) > 0:
            s = state.mean_params[0] - state.prev_params[0]
            pairs.append((s, state.mean_grads[0] - state.prev_grads[0]))
        state = core.Method(config).refresh(state, state.due)
    return Watched(state, pairs)


def secant_errors(pairs: Iterable[tuple[Array, Array]], images: Iterable[Array]) -> Array:
    """``|y - A s| / |A s|`` of each pair; `images` are the ``A s``."""
    return np.array(
        [
            np.linalg.norm(y - image) / np.linalg.norm(image)
            for (_, y), image in zip(pairs, images, strict=True)
        ]
    )
