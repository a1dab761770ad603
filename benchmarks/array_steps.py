"""Time whole steps of `mlbfgs_arrays.MLBFGS` against the bytes that they must move.

One float32 array of a million and of ten million values, and two small models, in NumPy or, with
``--device cuda``, in CuPy. The floor is the time in which that library copies the 35 values per parameter
that a step with default settings must move (see `step_cost.py`), measured in the same run; all settings take
turns, window by window.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np

from mlbfgs_arrays import MLBFGS

HISTORY = 5
FLOOR = 4 * HISTORY + 15
SETTINGS: dict[str, dict[str, Any]] = {
    "mL-BFGS, no refresh": {"adaptive": False, "update_every": 10**6},
    "mL-BFGS, T = 50": {"adaptive": False, "update_every": 50},
    "mL-BFGS, adaptive": {},
    "mL-BFGS, formulas, T = 50": {"preset": "formulas", "update_every": 50},
}
LARGE = {1_000_000: 50, 10_000_000: 10}
"""Numbers of values, and of steps in a window."""
SMALL = {"4 arrays, 195 values": [(8, 16), (16,), (16, 3), (3,)], "60 arrays of 256": [(16, 16)] * 60}


class Problem:
    """A quadratic with a gradient that has some noise."""

    def __init__(self, xp: Any, shapes: list[tuple[int, ...]], settings: dict[str, Any]) -> None:
        rng = xp.random.default_rng(0)
        self.xp = xp
        self.params = [0.01 * rng.standard_normal(shape, dtype=xp.float32) for shape in shapes]
        self.noise = [1e-4 * rng.standard_normal(shape, dtype=xp.float32) for shape in shapes]
        self.grads = [xp.empty_like(param) for param in self.params]
        self.optimizer = MLBFGS(self.params, history_size=HISTORY, **settings)
        self.sign = 1

    def window(self, steps: int) -> float:
        """Mean milliseconds of a step without the gradient."""
        total = 0.0
        for _ in range(steps):
            self.sign = -self.sign
            for param, noise, grad in zip(self.params, self.noise, self.grads, strict=True):
                self.xp.multiply(noise, self.sign, out=grad)
                grad += param
            total += milliseconds(self.xp, lambda: self.optimizer.step(self.grads))
        return total / steps


def milliseconds(xp: Any, work: Callable[[], Any]) -> float:
    """Wall-clock time of one call, including the GPU's work."""
    synchronize = (lambda: None) if xp is np else xp.cuda.get_current_stream().synchronize
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def timed(
    xp: Any, shapes: list[tuple[int, ...]], steps: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, int], float]:
    """Milliseconds of each window, the number of pairs at the end, and the floor."""
    problems = {name: Problem(xp, shapes, settings) for name, settings in SETTINGS.items()}
    size = sum(param.size for param in next(iter(problems.values())).params)
    source = xp.ones(FLOOR * size // 2, xp.float32)
    target = xp.empty_like(source)
    windows: dict[str, list[float]] = {name: [] for name in problems}
    floors = []
    for problem in problems.values():
        problem.window(5)
    xp.copyto(target, source)
    for _ in range(repeats):
        floors.append(milliseconds(xp, lambda: xp.copyto(target, source)))
        for name, problem in problems.items():
            windows[name].append(problem.window(steps))
    pairs = {name: int(problem.optimizer.diagnostics()[0].pairs[0]) for name, problem in problems.items()}
    return windows, pairs, statistics.median(floors)


def report(xp: Any, repeats: int) -> Iterator[str]:
    """The tables, line by line."""
    yield f"{xp.__name__} {xp.__version__}, float32, m = {HISTORY}"
    yield f"{'':28}{'ms/step':>9}{'spread':>14}{'x floor':>9}{'pairs':>7}"
    for size, steps in LARGE.items():
        windows, pairs, floor = timed(xp, [(size,)], steps, repeats)
        speed = 4 * FLOOR * size / floor / 1e6
        yield f"n = {size:,}; floor {floor:.3g} ms at {speed:.0f} GB/s"
        for name, times in windows.items():
            middle, spread = statistics.median(times), f"{min(times):.2f}-{max(times):.2f}"
            yield f"{name:28}{middle:9.2f}{spread:>14}{middle / floor:9.2f}{pairs[name]:7d}"
    yield ""
    columns = [timed(xp, shapes, 200, repeats)[0] for shapes in SMALL.values()]
    yield f"{'milliseconds per step':28}" + "".join(f"{name:>24}" for name in SMALL)
    for name in SETTINGS:
        yield f"{name:28}" + "".join(f"{statistics.median(column[name]):24.2f}" for column in columns)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="windows for each row")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="NumPy's or CuPy's")
    options = parser.parse_args()
    for line in report(np if options.device == "cpu" else import_module("cupy"), options.repeats):
        print(line, flush=True)


if __name__ == "__main__":
    main()
