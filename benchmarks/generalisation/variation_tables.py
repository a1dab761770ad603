"""The tables of the variations of a step: final losses next to the default's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from benchmarks.tasks.goals import geometric_mean
from benchmarks.tasks.problems import TASKS
from benchmarks.tasks.report import markdown

from .store import Store
from .variations import PRECONDITIONERS, SEEDS, STEPS, VARIATIONS, key

__all__ = ["noise", "texts", "variation_ratios"]

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
NETWORKS = 5
"""So many tasks, the first, are networks that learn from examples; the last is a differential equation."""


def variation_ratios(store: Store, preconditioner: str, name: str, which: int) -> list[list[float]]:
    """Final losses as multiples of the default's, by task and seed; training with 0, test with 1."""
    found = []
    for task in STEPS:
        pairs = [
            [store.get(*key(task, preconditioner, own, seed)) for own in (name, "default")]
            for seed in range(SEEDS[task])
        ]
        found.append([own[which] / default[which] for own, default in pairs if own and default])
    return found


def noise(ratios: Sequence[Sequence[float]]) -> float:
    """Standard error of the mean logarithm over tasks, from what seeds of a task differ by.

    The variance of one run is pooled over the tasks with several seeds.
    """
    squares, freedom = 0.0, 0
    for own in ratios:
        logs = [math.log(value) for value in own]
        squares += sum((log - fmean(logs)) ** 2 for log in logs)
        freedom += len(logs) - 1
    return math.sqrt(squares / freedom * sum(1 / len(own) for own in ratios)) / len(ratios)


def variations_text(store: Store) -> str:
    """Each variation's final training loss next to the default's, and its test loss."""
    texts = []
    heads = ("mean", "mean of the networks", "test loss, mean", "test loss of the networks")
    for preconditioner in PRECONDITIONERS:
        rows = [["variation", *(TASKS[task].title for task in STEPS), *heads]]
        for name, variation in VARIATIONS.items():
            if name == "default":
                continue
            both = [variation_ratios(store, preconditioner, name, which) for which in (0, 1)]
            means = [_mean(part) for ratios in both for part in (ratios, ratios[:NETWORKS])]
            rows.append([variation.title, *(f"{geometric_mean(own):.2f}" for own in both[0]), *means])
        texts += [f'`preconditioner="{preconditioner}"`:', markdown(rows)]
    return "\n\n".join(texts)


def _mean(ratios: Sequence[Sequence[float]]) -> str:
    """Geometric mean over the tasks, with its standard error."""
    centre = geometric_mean([geometric_mean(own) for own in ratios])
    if math.isinf(centre):
        return "diverged"
    return f"{centre:.3f} {PLUS_MINUS} {centre * noise(ratios):.3f}"


def texts(store: Store) -> dict[str, str]:
    """The tables by the names of their files."""
    return {"variations": variations_text(store)}
