"""The noisy quadratics on which the paper's toy claims are measured, and every method's runs on them.

Curvatures are log-spaced in ``[10 / condition, 10]``, the start is standard normal, the learning rate 0.1 and
the noise in the gradient independent and normal. Start and noise depend only on the seed, so they are the
same for all methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np

import mlbfgs_core as core

__all__ = [
    "DIVERGED",
    "METHODS",
    "PROBLEMS",
    "RATE",
    "SEEDS",
    "STEPS",
    "Problem",
    "Runs",
    "descend",
    "direction_of",
    "runs",
    "runs_of",
]

RATE, STEPS, SEEDS = 0.1, 300, 20
DIVERGED = 10.0
"""A run has diverged once its loss exceeds this many times its first."""
LOST = 1e8
"""A run is stopped once its loss exceeds this many times its first."""
METHODS: dict[str, dict[str, Any] | None] = {
    "Newton": None,
    "gradient descent": None,
    "L-BFGS": {"preset": "lbfgs"},
    "L-BFGS, T = 10": {"preset": "lbfgs", "update_every": 10},
    "published": {"preset": "formulas", "update_every": 10},
    "recipe": {"preset": "paper"},
    "mL-BFGS": {"preset": "fit"},
}

Array = np.ndarray[Any, Any]
Direction = Callable[[Array, Array], Array]


class Problem(NamedTuple):
    """A quadratic with noise in its gradient."""

    dim: int
    condition: float
    noise: float

    @property
    def curvature(self) -> Array:
        """The diagonal of the Hessian."""
        return 10 * self.condition ** -np.linspace(1, 0, self.dim)

    def loss(self, x: Array) -> float:
        """``x.A x / 2``."""
        return 0.5 * float(x @ (self.curvature * x))


PROBLEMS = (
    Problem(2, 10, 0.2),
    Problem(2, 100, 0.2),
    Problem(20, 100, 0.0),
    Problem(20, 100, 0.05),
    Problem(20, 100, 0.2),
    Problem(20, 10_000, 0.05),
    Problem(200, 1_000, 0.2),
    Problem(1000, 100, 0.1),
)


class Runs(NamedTuple):
    """Losses of a method on a problem, (seeds, steps + 1); infinite after a run was stopped."""

    losses: Array

    @property
    def diverged(self) -> int:
        """How many runs exceed `DIVERGED` times their first loss."""
        return int(np.sum(np.any(~(self.losses <= DIVERGED * self.losses[:, :1]), axis=1)))

    def steps_to(self, fraction: float) -> Array:
        """For each seed, the steps to a fraction of the first loss; infinite if it is never reached."""
        there = self.losses <= fraction * self.losses[:, :1]
        return np.where(there.any(axis=1), there.argmax(axis=1), np.inf)

    @property
    def floor(self) -> Array:
        """For each seed, the mean loss of the last quarter."""
        return self.losses[:, -(self.losses.shape[1] // 4) :].mean(axis=1)


def direction_of(method: str, problem: Problem, start: Array, settings: dict[str, Any] | None) -> Direction:
    """A function from parameters and gradient to the direction that is subtracted."""
    if method == "Newton":
        return lambda x, gradient: gradient / problem.curvature
    if settings is None:
        return lambda x, gradient: gradient
    config = core.Config(**settings)
    state = core.Method(config).init([start])

    def direction(x: Array, gradient: Array) -> Array:
        nonlocal state
        check, due, *_ = core.Method(config).upcoming(state)
        update, state = core.Method(config).step(
            state, [x], [gradient], when_check=bool(check), when_due=bool(due)
        )
        return update[0]

    return direction


def descend(
    problem: Problem, method: str, seed: int, settings: dict[str, Any] | None = None, steps: int = STEPS
) -> Iterator[Array]:
    """The positions of one run, from its start until it ends or is stopped."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(problem.dim)
    noise = problem.noise * random.standard_normal((steps, problem.dim))
    direction, lost, curvature = (
        direction_of(method, problem, x, settings),
        LOST * problem.loss(x),
        problem.curvature,
    )
    for step in range(steps):
        yield x
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            x = x - RATE * direction(x, curvature * x + noise[step])
            if not problem.loss(x) <= lost:
                return
    yield x


def runs_of(problem: Problem, method: str, settings: dict[str, Any] | None, steps: int = STEPS) -> Runs:
    """Run all seeds of a method on a problem."""
    losses = np.full((SEEDS, steps + 1), np.inf)
    for seed in range(SEEDS):
        own = [problem.loss(x) for x in descend(problem, method, seed, settings, steps)]
        losses[seed, : len(own)] = own
    return Runs(losses)


def runs(
    methods: Mapping[str, dict[str, Any] | None], problems: Sequence[Problem] = PROBLEMS
) -> dict[str, dict[Problem, Runs]]:
    """Run all seeds of every method on every problem, distributed over the cores."""
    jobs = [(problem, method, settings) for method, settings in methods.items() for problem in problems]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        results = iter(pool.map(runs_of, *zip(*jobs, strict=True)))
        return {method: {problem: next(results) for problem in problems} for method in methods}
