"""Time whole steps of `mlbfgs_cupy.MLBFGS` against the bytes that they must move.

One float32 array of a million and of ten million values, and two small models. The floor is the time in
which NumPy copies the 55 values per parameter that a step with default settings must move (see
`step_cost.py`), measured in the same run; all settings take turns, window by window.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mlbfgs_cupy import MLBFGS

HISTORY = 5
FLOOR = 4 * HISTORY + 15
SETTINGS: dict[str, dict[str, Any]] = {
    "mL-BFGS, no refresh": {"adaptive": False, "update_every": 10**6},
    "mL-BFGS, T = 50": {"adaptive": False, "update_every": 50},
    "mL-BFGS, adaptive": {},
    "mL-BFGS, paper, T = 50": {"preset": "paper", "update_every": 50},
}
LARGE = {1_000_000: 50, 10_000_000: 10}
"""Sizes, and steps in a window."""
SMALL = {"4 arrays, 195 values": [(8, 16), (16,), (16, 3), (3,)], "60 arrays of 256": [(16, 16)] * 60}


class Problem:
    """A quadratic with a gradient that has some noise."""

    def __init__(self, shapes: list[tuple[int, ...]], settings: dict[str, Any]) -> None:
        rng = np.random.default_rng(0)
        self.params = [0.01 * rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
        self.noise = [1e-4 * rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
        self.grads = [np.empty_like(param) for param in self.params]
        self.optimizer = MLBFGS(self.params, history_size=HISTORY, **settings)
        self.sign = 1

    def window(self, steps: int) -> float:
        """Mean milliseconds of a step without the gradient."""
        total = 0.0
        for _ in range(steps):
            self.sign = -self.sign
            for param, noise, grad in zip(self.params, self.noise, self.grads, strict=True):
                np.multiply(noise, self.sign, out=grad)
                grad += param
            total += milliseconds(lambda: self.optimizer.step(self.grads))
        return total / steps


def milliseconds(work: Callable[[], Any]) -> float:
    """Wall-clock of one call."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def timed(
    shapes: list[tuple[int, ...]], steps: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, int], float]:
    """Milliseconds of each window, pairs in the end, and the floor."""
    problems = {name: Problem(shapes, settings) for name, settings in SETTINGS.items()}
    size = sum(param.size for param in next(iter(problems.values())).params)
    source = np.ones(FLOOR * size // 2, np.float32)
    target = np.empty_like(source)
    windows: dict[str, list[float]] = {name: [] for name in problems}
    floors = []
    for problem in problems.values():
        problem.window(5)
    np.copyto(target, source)
    for _ in range(repeats):
        floors.append(milliseconds(lambda: np.copyto(target, source)))
        for name, problem in problems.items():
            windows[name].append(problem.window(steps))
    pairs = {name: int(problem.optimizer.diagnostics()[0].pairs[0]) for name, problem in problems.items()}
    return windows, pairs, statistics.median(floors)


def report(repeats: int) -> Iterator[str]:
    """The tables, line by line."""
    yield f"NumPy {np.__version__}, float32, m = {HISTORY}"
    yield f"{'':28}{'ms/step':>9}{'spread':>14}{'x floor':>9}{'pairs':>7}"
    for size, steps in LARGE.items():
        windows, pairs, floor = timed([(size,)], steps, repeats)
        speed = 4 * FLOOR * size / floor / 1e6
        yield f"n = {size:,}; floor {floor:.1f} ms at {speed:.0f} GB/s"
        for name, times in windows.items():
            middle, spread = statistics.median(times), f"{min(times):.1f}-{max(times):.1f}"
            yield f"{name:28}{middle:9.2f}{spread:>14}{middle / floor:9.2f}{pairs[name]:7d}"
    yield ""
    columns = [timed(shapes, 200, repeats)[0] for shapes in SMALL.values()]
    yield f"{'milliseconds per step':28}" + "".join(f"{name:>24}" for name in SMALL)
    for name in SETTINGS:
        yield f"{name:28}" + "".join(f"{statistics.median(column[name]):24.2f}" for column in columns)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="windows for each row")
    for line in report(parser.parse_args().repeats):
        print(line, flush=True)


if __name__ == "__main__":
    main()
