"""Textbook L-BFGS for one vector: the core's result for these settings at a fraction of its fixed cost."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import array_api_compat.numpy as xp
import numpy as np

import mlbfgs_core as core
from mlbfgs_core.adapter import mean_square_weight, two_loop

from .objective import Evaluation, Vector

__all__ = ["Textbook", "is_textbook"]


class _Pair(NamedTuple):
    """A pair divided by the norm of its `s`, as the history stores it, and the inverse of its curvature."""

    s: Vector
    y: Vector
    rho: float


class _Memory:
    """What a run has learned since it last forgot."""

    def __init__(self, most: int, size: int) -> None:
        self.history = np.zeros((2, most, size))  # the core's ring
        self.pairs: deque[_Pair] = deque(maxlen=most)
        self.last: Evaluation | None = None
        self.gamma, self.mu, self.cosine, self.mean_square = 1.0, 0.0, 0.0, 0.0
        self.steps = self.stored = self.rejected = 0


def is_textbook(config: core.Config) -> bool:
    """Whether the settings are those of textbook L-BFGS, with any number of pairs but none."""
    textbook = core.Config(preset="lbfgs", history_size=config.history_size)
    return config.takes_pairs and config == textbook


class Textbook:
    """Directions of the two-loop recursion, computed on the vectors themselves.

    The core runs the recursion on coefficients, which suits sharded leaves, devices and noise, but costs
    about 300 NumPy calls per step; here there are four for each pair. `state` is the state that the core
    would end in, except for rounding.

    References
    ----------
    Nocedal & Wright, Numerical Optimization, 2nd ed., algorithm 7.4 and eq. 7.20.
    """

    def __init__(self, config: core.Config, size: int) -> None:
        self.config = config
        self.size = size
        self.forget()

    def forget(self) -> None:
        """Start anew; the old memory stays as it was."""
        self.memory = _Memory(self.config.history_size, self.size)

    @property
    def has_pairs(self) -> bool:
        """Whether any curvature is known."""
        return bool(self.memory.pairs)

    def direction(self, point: Evaluation) -> Vector:
        """The direction to subtract; the pair from the last point to this one is stored first."""
        memory, grad = self.memory, point.grad
        self._learn(point)
        d, weights = grad.copy(), []
        for pair in reversed(memory.pairs):
            weights.append(pair.rho * float(pair.s @ d))
            d -= weights[-1] * pair.y
        norm = _norm(grad)
        d *= memory.gamma if memory.pairs else 1.0 / max(norm, 1.0)
        for pair in memory.pairs:
            d += (weights.pop() - pair.rho * float(pair.y @ d)) * pair.s
        both = norm * _norm(d)
        memory.cosine = float(grad @ d) / both if both > 0 else 0.0
        return d

    def _learn(self, point: Evaluation) -> None:
        memory, last = self.memory, self.memory.last
        memory.last, memory.steps = point, memory.steps + 1
        weight = float(mean_square_weight(self.config, memory.steps))
        memory.mean_square += weight * (float(point.grad @ point.grad) / self.size - memory.mean_square)
        if last is None:
            return
        s, y = point.x - last.x, point.grad - last.grad
        norm = _norm(s)
        if norm > 0:
            s, y = s / norm, y / norm
        memory.mu, length = float(s @ y), _norm(y)
        if norm > 0 and math.isfinite(length) and memory.mu > np.finfo(np.float64).eps * length:
            rows = memory.history[:, memory.stored % self.config.history_size]
            rows[0], rows[1] = s, y
            memory.pairs.append(_Pair(rows[0], rows[1], 1.0 / memory.mu))
            memory.gamma, memory.stored = memory.mu / length / length, memory.stored + 1
        else:
            memory.rejected += 1

    @property
    def state(self) -> core.State:
        """The core's state after the same points."""
        memory = self.memory
        state = core.Method(self.config).init([np.zeros(self.size)], xp=xp)
        rows = memory.history.reshape(-1, self.size)
        gram, pairs = (rows @ rows.T)[None], np.asarray([memory.stored], dtype=np.int32)
        middle, gamma = two_loop(gram, pairs, xp)
        averages = {}
        if memory.last is not None:
            x, grad, once = (memory.last.x.copy(),), (memory.last.grad.copy(),), np.ones(1, dtype=np.int32)
            averages = {
                "mean_params": x,
                "mean_grads": grad,
                "prev_params": (x[0].copy(),),
                "prev_grads": (grad[0].copy(),),
                "leaf_steps": memory.steps * once,
                "leaf_prev_window": once,
                "prev_window": once[0],
                "due": np.asarray(True),
            }
        reals = {name: np.asarray([getattr(memory, name)]) for name in ("mu", "cosine", "mean_square")}
        return state._replace(
            history=(memory.history,),
            gram=gram,
            middle_matrix=middle,
            gamma=gamma,
            pairs=pairs,
            rejected=np.asarray([memory.rejected], dtype=np.int32),
            tau=np.ones(1) if memory.stored else state.tau,
            step=np.asarray(memory.steps, dtype=np.int32),
            **reals,
            **averages,
        )


def _norm(vector: Vector) -> float:
    """The Euclidean norm, even if its square overflows or underflows."""
    norm = math.sqrt(float(vector @ vector))
    if 1e-140 < norm < 1e140:
        return norm
    largest = float(np.max(np.abs(vector)))
    if not 0 < largest < math.inf:
        return largest
    vector = vector / largest
    return largest * math.sqrt(float(vector @ vector))
