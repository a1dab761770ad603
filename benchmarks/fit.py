"""`preset="fit"` at constant rates: least squares without noise, and a quadratic with persistent noise.

``python3 -m nox -s bench -- fit`` prints the tables of docs/settings.md in about two minutes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlbfgs_arrays import MLBFGS

RATES = (0.05, 0.1, 0.3, 0.5, 0.7, 1.0)
PROBLEMS = ((5, 1e4), (20, 1e2), (20, 3.5e3), (20, 1e5), (50, 3e3), (100, 1e3))
"""Number of unknowns and condition number of the Hessian."""
SEEDS, STEPS, NOISY_STEPS = 3, 1500, 4000
CONDITION, DIM, NOISE = 100.0, 20, 0.2


def least_squares(dim: int, condition: float, seed: int, rate: float) -> float:
    """The loss after `STEPS` steps from zero relative to that at the start, without noise."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(3 * dim, dim)) * np.geomspace(1.0, condition**-0.5, dim)
    target, x = matrix @ rng.normal(size=dim), np.zeros(dim)
    train(x, rate, STEPS, lambda: 2 * matrix.T @ (matrix @ x - target) / len(target))
    return float(np.sum((matrix @ x - target) ** 2) / np.sum(target**2))


def endless_noise(seed: int, rate: float) -> float:
    """The mean loss of the last 500 steps relative to that of exact Newton with the same rate and noise."""
    rng = np.random.default_rng(seed)
    curvature = np.geomspace(10 / CONDITION, 10, DIM)
    x = rng.normal(size=DIM)
    newton, losses = x.copy(), []

    def gradient() -> np.ndarray:
        nonlocal newton
        noise = NOISE * rng.normal(size=DIM)
        losses.append([curvature @ x**2, curvature @ newton**2])
        newton = newton - rate * (newton + noise / curvature)
        return curvature * x + noise

    train(x, rate, NOISY_STEPS, gradient)
    ours, theirs = np.mean(losses[-500:], axis=0)
    return float(ours / theirs)


def train(x: np.ndarray, rate: float, steps: int, gradient: Callable[[], np.ndarray]) -> None:
    """Take steps with the preset, in place."""
    optimizer = MLBFGS(x, lr=rate, preset="fit")
    for _ in range(steps):
        optimizer.step(gradient())


def main() -> None:
    """Print the largest value of three seeds without noise, and the median under noise."""
    header = "".join(f"{f'lr {rate:g}':>10}" for rate in RATES)
    print(f"loss after {STEPS:,} steps over the first, without noise, the worst of {SEEDS} seeds")
    print(f"{'unknowns':>8}{'condition':>11}{header}")
    for dim, condition in PROBLEMS:
        ends = [max(least_squares(dim, condition, s, rate) for s in range(SEEDS)) for rate in RATES]
        print(f"{dim:8d}{condition:11g}" + "".join(f"{end:10.1e}" for end in ends), flush=True)
    print(
        f"\nloss over exact Newton's, {DIM} unknowns, condition {CONDITION:g}, noise, {NOISY_STEPS:,} steps"
    )
    print(f"{'median':>8}{'':11}{header}")
    ends = [np.median([endless_noise(seed, rate) for seed in range(SEEDS)]) for rate in RATES]
    print(f"{'':19}" + "".join(f"{end:10.2g}" for end in ends))


if __name__ == "__main__":
    main()
