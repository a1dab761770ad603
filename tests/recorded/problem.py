"""One small problem, and the runs on it whose parameters are recorded.

Each gradient is computed by NumPy from the run's own parameters, in operations that IEEE 754 rounds alike
everywhere. What differs between two backends or machines is thus the optimizer's own rounding.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "CASES",
    "DATA",
    "NONE_AT",
    "SIZE",
    "STRIDE",
    "Case",
    "arguments",
    "deviation",
    "flat",
    "follow",
    "split",
    "start",
    "tolerance",
]

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-14
"""In float64, relative to the largest parameter; up to 0.6 of it was measured between backends."""
GROWTH = {"clip": 4, "fit": 4}
"""The tolerance's factor for runs that begin with steps of a thousandth of the parameters: three digits are
lost in the differences that make their first pair."""
STEPS, STRIDE = 48, 6
"""Steps of a run, and from one recorded step to the next."""
SHAPES = {
    "first.weight": (4, 3),
    "first.bias": (4,),
    "second.weight": (2, 4),
    "second.bias": (2,),
    "scale": (),
}
OFTEN: dict[str, Any] = {"history_size": 3, "check_every": 1, "update_every": 8}
"""With these a short run stores enough pairs to overwrite the first of them."""
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"lr": 2e-3},
    "checks of the default": {"lr": 2e-3, "check_every": 2},
    "power 0": {"lr": 1e-3, "preconditioner": "none"},
    "power 0.3": {"lr": 1e-3, "preconditioner_power": 0.3, "preconditioner_beta": 0.9},
    "fixed": {"lr": 2e-3, "adaptive": False, "update_every": 5},
    "average": {"lr": 2e-3, "beta": 0.8, "nesterov": False},
    "float16 history": {"lr": 2e-3, "history_dtype": "float16"},
    "bfloat16 history": {"lr": 2e-3, "history_dtype": "bfloat16"},
    "clip": {"lr": 0.2, "step_length": "clip", "momentum": 0.0},
    "unit": {"lr": 0.02, "step_length": "unit"},
    "none": {"lr": 0.03, "step_length": "none", "preconditioner": "none"},
    "paper": {"lr": 0.02, "preset": "paper", "update_every": 6},
    "formulas": {"lr": 0.03, "preset": "formulas", "update_every": 5},
    "lbfgs": {"lr": 0.05, "preset": "lbfgs", "update_every": 1, "momentum": 0.0},
    "fit": {"lr": 0.2, "preset": "fit", "momentum": 0.0},
}
"""Settings by name; those not given are from `OFTEN` and `arguments`."""
NOISELESS = ("none", "formulas", "lbfgs")
"""Settings without a remedy for noise, which magnify rounding, too."""
NONE_AT = 30
"""The step at which all gradients are missing, where some are."""
BLOCKS = ("all", "layer", "parameter")


class Case(NamedTuple):
    """One run: the settings' name, the blocks, and what is wrong with its gradients ("" for nothing)."""

    settings: str
    blocks: str
    gradients: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, self))


CASES = [
    *(Case(name, blocks) for name in SETTINGS for blocks in BLOCKS),
    *(Case(name, "layer", fault) for name in SETTINGS for fault in ("missing", "not finite")),
    *(Case(name, "all", "tiny") for name in ("default", "power 0", "fit")),
    *(
        Case(name, "all", fault)
        for name in ("default", "power 0.3", "clip", "fit")
        for fault in ("jump", "uneven")
    ),
    *(Case(name, "all", fault) for name in ("default", "clip") for fault in ("missing", "not finite")),
]


def uniform(seed: int) -> np.ndarray:
    """One value in [-1, 1) for each parameter, from bits that NumPy promises not to change."""
    return np.random.PCG64(seed).random_raw(SIZE) / 2.0**63 - 1.0


SIZE = sum(math.prod(shape) for shape in SHAPES.values())
TARGET, COUPLING = 1.5 * uniform(1_000_001), uniform(1_000_002)
CURVATURE = 2.0 ** (np.arange(SIZE) * 3 % 5)
"""Curvatures from 1 to 16."""


def start() -> dict[str, np.ndarray]:
    return split(TARGET + 0.25 * uniform(1_000_003))


def split(values: np.ndarray) -> dict[str, np.ndarray]:
    edges = np.cumsum([0, *map(math.prod, SHAPES.values())])
    parts = zip(SHAPES.items(), edges, edges[1:], strict=False)
    return {name: values[a:b].reshape(shape) for (name, shape), a, b in parts}


def flat(values: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(value) for value in values])


def gradients(values: list[np.ndarray], step: int, case: Case) -> list[np.ndarray | None]:
    """Noisy gradients of ``sum_i c_i sqrt(1 + 16 z_i^2) / 16 + (b.z)^2 / 2`` at `z` from the target."""
    z = flat(values).astype(float) - TARGET
    noise = 0.0 if case.settings in NOISELESS else 0.0625
    grad = (
        CURVATURE * (z / np.sqrt(1 + 16 * z * z)) + COUPLING * math.fsum(COUPLING * z) + noise * uniform(step)
    )
    if case.gradients == "tiny":
        grad = grad * 2.0**-600
    grads = list(split(grad).values())
    if case.gradients == "jump" and 24 <= step < 27:  # as of a run that diverges
        grads = [64.0 * g for g in grads]
    if case.gradients == "uneven":  # far below the floor of the diagonal
        grads[3] = grads[3] * 2.0**-40
    if case.gradients == "missing" and (step < 20 or step % 3 == 1):
        grads[2] = None
    if case.gradients == "missing" and step == NONE_AT:
        grads = [None] * len(grads)
    if case.gradients == "not finite" and step % 9 == 5:
        index = step // 9 % len(grads)
        grads[index] = np.where(
            grads[index] == np.max(grads[index]), (np.nan, np.inf)[step % 2], grads[index]
        )
    return [None if g is None else np.asarray(g, v.dtype) for g, v in zip(grads, values, strict=True)]


def arguments(case: Case) -> dict[str, Any]:
    """The arguments of an optimizer."""
    common = {"momentum": 0.5, "weight_decay": 0.01, "nesterov": True}
    return {**OFTEN, **common, **SETTINGS[case.settings], "blocks": case.blocks}


def follow(run: Any, case: Case, first: int = 0, last: int = STEPS, stride: int = STRIDE) -> np.ndarray:
    """Continue training, and return the parameters after every `stride` steps, (steps, parameters)."""
    rows = []
    for step in range(first, last):
        run.step(gradients(run.values(), step, case))
        if (step + 1 - first) % stride == 0:
            rows.append(flat(run.values()))
    return np.stack(rows)


def tolerance(case: Case, dtype: Any = np.float64) -> float:
    """How much rounding may change a run."""
    return TOLERANCE * GROWTH.get(case.settings, 1) * float(np.finfo(dtype).eps / np.finfo(float).eps)


def deviation(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference relative to the largest parameter."""
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))
