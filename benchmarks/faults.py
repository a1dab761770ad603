"""The same faults for every optimizer: a bad number at some moment of a run, and where the run ends.

Logistic regression with a small ridge: 64 samples of 20 features whose scales go from 1 to 1/100, full
batches, float32, 150 steps. A fault multiplies value and gradient of one or more evaluations. Each optimizer
runs in the way its users run it: `torch.optim.LBFGS` with a closure, one iteration a step, with and without
its line search; `optax.lbfgs` with its line search; the others without. A cell is the final loss above the
minimum, relative to that at the start: 0 is the minimum, 1 no progress at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import torch
from scipy.special import expit

from mlbfgs_arrays import MLBFGS as ArrayMLBFGS
from mlbfgs_jax import mlbfgs
from mlbfgs_torch import MLBFGS

__all__ = ["FAULTS", "RUNS", "remaining"]

STEPS, RIDGE = 150, 1e-3
Faults = Mapping[int, float]
"""Factors of value and gradient, by the number of the evaluation (or of the step, if each step has one)."""

FAULTS: dict[str, Faults] = {
    "no fault": {},
    "NaN loss at the first step": {0: np.nan},
    "NaN loss at step 20": {20: np.nan},
    "NaN loss at steps 20 to 24": dict.fromkeys(range(20, 25), np.nan),
    "NaN loss at every 10th step": dict.fromkeys(range(0, STEPS, 10), np.nan),
    "infinite loss at step 20": {20: np.inf},
    "loss times 1e6 at step 20": {20: 1e6},
}


@cache
def data() -> np.ndarray:
    """Inputs (64, 20), each multiplied by the sign of its class; the classes overlap."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(64, 20)) * np.geomspace(1, 1e-2, 20)
    return np.where(inputs @ rng.normal(size=20) + 0.5 * rng.normal(size=64) > 0, 1.0, -1.0)[:, None] * inputs


def loss(x: np.ndarray) -> float:
    """The loss in float64."""
    return float(np.mean(np.logaddexp(0, -data() @ x)) + RIDGE / 2 * x @ x)


def gradient(x: np.ndarray) -> np.ndarray:
    """The gradient in float64."""
    return -data().T @ expit(-data() @ x) / len(data()) + RIDGE * x


@cache
def least() -> float:
    """The minimum, by SciPy."""
    return float(scipy.optimize.minimize(loss, np.zeros(20), jac=gradient, tol=1e-12).fun)


def remaining(run: Callable[[Faults], Any], fault: str) -> float:
    """How far above the minimum a run with a fault ends, relative to the start; NaN if the run is lost."""
    x = np.asarray(run(FAULTS[fault]), dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return (loss(x) - least()) / (loss(np.zeros(20)) - least())


def run_torch(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer], faults: Faults) -> Any:
    """Run any PyTorch optimizer; each call of the closure is an evaluation."""
    inputs = torch.asarray(data(), dtype=torch.float32)
    x = torch.zeros(20, requires_grad=True)
    optimizer, evaluations = make([x]), iter(range(10**6))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.softplus(-inputs @ x).mean() + RIDGE / 2 * x @ x
        value = value * faults.get(next(evaluations), 1.0)
        value.backward()
        return value

    for _ in range(STEPS):
        optimizer.step(closure)
    return x.detach().numpy()


def run_optax(tx: optax.GradientTransformationExtraArgs, faults: Faults) -> Any:
    """Run any optax optimizer; a fault affects all evaluations of its step."""
    inputs = jnp.asarray(data(), dtype=jnp.float32)

    def value_of(x: jax.Array, factor: jax.Array) -> jax.Array:
        return factor * (jnp.mean(jax.nn.softplus(-inputs @ x)) + RIDGE / 2 * x @ x)

    @jax.jit
    def step(x: jax.Array, state: optax.OptState, factor: jax.Array) -> tuple[jax.Array, optax.OptState]:
        value, grad = jax.value_and_grad(value_of)(x, factor)
        extra = {"value": value, "grad": grad, "value_fn": lambda x: value_of(x, factor)}
        updates, state = tx.update(grad, state, x, **extra)
        return optax.apply_updates(x, updates), state

    x = jnp.zeros(20, jnp.float32)
    state = tx.init(x)
    for count in range(STEPS):
        x, state = step(x, state, jnp.asarray(faults.get(count, 1.0), jnp.float32))
    return x


def run_arrays(faults: Faults) -> Any:
    """Run `mlbfgs_arrays.MLBFGS` on a NumPy array."""
    x = np.zeros(20, np.float32)
    optimizer = ArrayMLBFGS(x, lr=RATE, preset="fit")
    for count in range(STEPS):
        grad = gradient(x.astype(np.float64)) * faults.get(count, 1.0)
        optimizer.step(grad.astype(np.float32))
    return x


RATE, ADAM_RATE = 0.5, 0.1
RUNS: dict[str, Callable[[Faults], Any]] = {
    "mlbfgs_torch": lambda f: run_torch(lambda p: MLBFGS(p, lr=RATE, preset="fit"), f),
    "mlbfgs_jax": lambda f: run_optax(mlbfgs(RATE, preset="fit"), f),
    "mlbfgs_arrays": run_arrays,
    "torch LBFGS": lambda f: run_torch(lambda p: torch.optim.LBFGS(p, lr=RATE, max_iter=1), f),
    "  with search": lambda f: run_torch(
        lambda p: torch.optim.LBFGS(p, max_iter=1, max_eval=20, line_search_fn="strong_wolfe"), f
    ),
    "optax.lbfgs": lambda f: run_optax(optax.lbfgs(), f),
    "torch AdamW": lambda f: run_torch(lambda p: torch.optim.AdamW(p, ADAM_RATE, weight_decay=0), f),
    "optax.adamw": lambda f: run_optax(optax.adamw(ADAM_RATE, weight_decay=0), f),
}


def report() -> Iterator[str]:
    """The table, one fault at a time."""
    yield f"{'':28}" + "".join(f"{name:>14}" for name in RUNS)
    for fault in FAULTS:
        cells = [remaining(run, fault) for run in RUNS.values()]
        yield f"{fault:28}" + "".join(f"{'lost' if np.isnan(c) else f'{c:.1e}':>14}" for c in cells)


def main() -> None:
    """Print the table."""
    for line in report():
        print(line, flush=True)


if __name__ == "__main__":
    main()
