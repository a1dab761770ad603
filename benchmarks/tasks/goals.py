"""Our default settings compared with AdamW, and the goals that this comparison meets."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from . import timing
from .problems import TASKS
from .search import ADAMW, OURS, Results
from .training import Record

__all__ = [
    "Goal",
    "Reach",
    "better_adamw",
    "budgets",
    "goals",
    "mean_curve",
    "mean_final",
    "mean_test",
    "reaches",
    "title",
]


@dataclass(frozen=True)
class Reach:
    """How our default settings compare with the better of the two AdamWs on a task.

    Attributes
    ----------
    task : str
    ratio : float
        Our final training loss relative to AdamW's, each the mean over the seeds.
    spread : tuple of float
        The smallest and the largest of these ratios for a single seed.
    steps : float
        Steps until AdamW's final training loss, as a fraction of AdamW's whole run; infinite if it is not
        reached.
    planned : float
        Steps of the shortest run, with the learning rate at zero at its end, that reaches this loss; infinite
        if none does, NaN if the shorter runs were not made.
    cost : float
        Seconds of our step relative to AdamW's; NaN if they were not timed.
    """

    task: str
    ratio: float
    spread: tuple[float, float]
    steps: float
    planned: float
    cost: float


@dataclass(frozen=True)
class Goal:
    """A goal, the count for it, and whether that count is enough."""

    words: str
    count: str
    met: bool


def title(task: str) -> str:
    """The task's title, marked if it was held out."""
    return TASKS[task].title + (" †" if TASKS[task].held_out else "")


def mean_final(records: Sequence[Record]) -> float:
    """Mean of the final training losses; infinite if one run diverged, NaN without runs."""
    return fmean(record.final for record in records) if records else math.nan


def mean_test(records: Sequence[Record]) -> float:
    """Mean of the final test losses; infinite if one run diverged, NaN without runs."""
    return fmean(record.final_test for record in records) if records else math.nan


def mean_curve(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean training loss of the runs there, as far as all of them got."""
    length = min(len(record.steps) for record in records)
    steps = np.mean([record.steps[:length] for record in records], axis=0)
    return steps, np.mean([record.train[:length] for record in records], axis=0)


def first_at(steps: np.ndarray, losses: np.ndarray, level: float) -> float:
    """The first step at which the loss is at or below a level, linear in log loss between evaluations."""
    below = np.flatnonzero(losses <= level)
    if not len(below):
        return math.inf
    after = int(below[0])
    if after == 0:
        return float(steps[0])
    high, low = math.log(losses[after - 1]), math.log(losses[after])
    part = (high - math.log(level)) / (high - low)
    return float(steps[after - 1] + part * (steps[after] - steps[after - 1]))


def budgets(results: Results, task: str, contestant: str) -> tuple[np.ndarray, np.ndarray]:
    """Fractions of the task's steps, and the mean final training loss of the runs planned for them."""
    best, percents = results.best(task, contestant), [*results.plan.percents, 100]
    runs = [[] if best is None else results.seeds(task, contestant, best, percent) for percent in percents]
    return np.array(percents) / 100, np.array([mean_final(records) for records in runs])


def planned(results: Results, task: str, contestant: str, level: float) -> float:
    """The fraction of the steps from which on all planned runs end at or below a level."""
    parts, losses = budgets(results, task, contestant)
    if len(parts) == 1 or np.isnan(losses).any():
        return math.nan
    above = np.flatnonzero(losses > level)
    start = above[-1] if len(above) else 0
    return first_at(parts[start:], np.minimum(losses[start:], sys.float_info.max), level)


def better_adamw(results: Results, task: str) -> str | None:
    """Which of the two AdamWs has the lower final training loss, or None before both are tuned."""
    known = [name for name in ADAMW if name in results.plan.contestants]
    finals = {name: mean_final(results.tuned(task, name)) for name in known}
    if not finals or any(map(math.isnan, finals.values())):
        return None
    return min(finals, key=finals.__getitem__)


def reach(results: Results, task: str) -> Reach | None:
    """Our default settings against AdamW on a task, or None while runs are missing."""
    ours, adamw = results.tuned(task, OURS), better_adamw(results, task)
    if adamw is None or not ours:
        return None
    theirs = results.tuned(task, adamw)
    level = mean_final(theirs)
    steps = first_at(*mean_curve(ours), level) / mean_curve(theirs)[0][-1]
    times, cost = timing.load(results.folder, task), math.nan
    if OURS in times and adamw in times:
        cost = times[OURS]["seconds"] / times[adamw]["seconds"]
    each = [own.final / other.final for own, other in zip(ours, theirs, strict=True)]
    spread, shorter = (min(each), max(each)), planned(results, task, OURS, level)
    return Reach(task, mean_final(ours) / level, spread, steps, shorter, cost)


def reaches(results: Results) -> list[Reach]:
    """Our default settings against AdamW on the tasks that are finished."""
    return [found for task in results.plan.tasks if (found := reach(results, task)) is not None]


def goals(found: Iterable[Reach]) -> list[Goal]:
    """The counts for the goals, which are about the base tasks; steps and time are those in the whole run."""
    base = [entry for entry in found if TASKS[entry.task].base is None]
    many = f"of {len(base)}"
    costs = np.array([entry.cost for entry in base])
    whole = np.array([entry.steps for entry in base])
    shorter = np.array([entry.planned for entry in base])
    ways = (whole, shorter, np.fmin(whole, shorter))
    lower = sum(entry.ratio < 1 for entry in base)
    above = sum(not entry.ratio <= 1.03 for entry in base)
    early = [int(np.sum(steps <= 0.7)) for steps in ways]
    faster = [int(np.sum(steps * costs < 1)) for steps in ways]
    counted = f"{{}} {many} in the whole run, {{}} planned, {{}} in one or the other"
    return [
        Goal("lower final training loss than tuned AdamW on at least 8", f"{lower} {many}", lower >= 8),
        Goal("never above 1.03 times AdamW's", f"above on {above} {many}", len(base) == 10 and not above),
        Goal(
            "AdamW's final loss within 70% of its steps on at least 5", counted.format(*early), early[0] >= 5
        ),
        Goal(
            "less wall-clock time to AdamW's final loss on at least 6",
            counted.format(*faster),
            faster[0] >= 6,
        ),
    ]
