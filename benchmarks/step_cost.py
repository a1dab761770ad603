"""Time a step of the core against its floor, two reads of the history, on NumPy and PyTorch.

Each figure is the median of several runs; the floor and the step take turns in the same run, so that
their ratio holds on a noisy machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import array_api_compat.numpy
import array_api_compat.torch
import numpy as np

import mlbfgs_core as core

BACKENDS = {"numpy": array_api_compat.numpy, "torch": array_api_compat.torch}
TILES = {"numpy": 2**16, "torch": 2**18}
SETTINGS: dict[str, core.Settings] = {"default": {}, "paper": {"preset": "paper"}}


def milliseconds(work: Callable[[], Any]) -> float:
    """Wall-clock of one call."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def measure(backend: str, settings: core.Settings, n: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of the floor, a plain step, one with a check and one with a refresh."""
    xp, rng = BACKENDS[backend], np.random.default_rng(0)
    config, kernels = core.Config(**settings), core.Kernels(xp, TILES[backend])
    x, g = (xp.asarray(rng.standard_normal(n, dtype=np.float32)) for _ in range(2))
    state = core.init(config, [x], xp=xp)
    rows = xp.reshape(state.history[0], (2 * config.history_size, n))
    rows[...] = 1e-4  # touched memory, so that no page is missing at the first read
    weights = xp.ones(2 * config.history_size, dtype=xp.float32)

    def step(check: bool, due: bool) -> None:
        nonlocal state
        _, state = core.step(config, state, [x], [g], kernels=kernels, when_check=check, when_due=due)

    parts = {
        "floor": lambda: (rows @ g, weights @ rows),
        "step": lambda: step(False, False),
        "check": lambda: step(True, False),
        "refresh": lambda: step(False, True),
    }
    step(False, False)
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, work in parts.items():
            times[name].append(milliseconds(work))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print one row per backend and settings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=10_000_000, help="number of parameters")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(f"{options.size:,} float32 parameters, history of 10 pairs; milliseconds, medians")
    print(f"{'backend':8}{'settings':10}{'floor':>8}{'step':>8}{'ratio':>8}{'+ check':>9}{'+ refresh':>11}")
    for backend in BACKENDS:
        for name, settings in SETTINGS.items():
            t = measure(backend, settings, options.size, options.repeats)
            ratio, check, refresh = t["step"] / t["floor"], t["check"] - t["step"], t["refresh"] - t["step"]
            check = check if core.Config(**settings).adaptive else 0.0
            print(
                f"{backend:8}{name:10}{t['floor']:8.0f}{t['step']:8.0f}{ratio:8.2f}{check:9.0f}{refresh:11.0f}"
            )


if __name__ == "__main__":
    main()
