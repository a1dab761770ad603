"""Our two preconditioners with their documented learning rate against the others, tuned; and the goals."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import numpy as np

from . import timing
from .contestants import CONTESTANTS
from .problems import TASKS
from .search import ADAMW, BOTH, KRONECKER, OURS, SOAP, Results
from .training import Record

__all__ = [
    "AFFORDABLE",
    "Goal",
    "Reach",
    "better_adamw",
    "chosen",
    "documented",
    "final",
    "geometric_mean",
    "goals",
    "mean_curve",
    "mean_final",
    "planned",
    "reach",
    "shared_ratio",
    "title",
]

AFFORDABLE = 2.0
"""The Kronecker preconditioner is chosen where a gradient and a step with it take at most this many times as
long as with the default. On tasks that are not held out it was ahead by time at ratios of 1.3 to 1.6, and
behind at 3.9 and 4.9."""


class Reach(NamedTuple):
    """One of our preconditioners at its documented learning rate against another optimizer, tuned.

    Attributes
    ----------
    ratio : float
        Our final training loss relative to the other's, each the mean over the seeds.
    steps : float
        Steps until the other's final training loss, as a fraction of its whole run; infinite if it is not
        reached.
    cost : float
        Seconds of our step relative to the other's; NaN if they were not timed.
    """

    ratio: float
    steps: float
    cost: float

    @property
    def time(self) -> float:
        """Seconds until the other's final training loss, as a fraction of its whole run."""
        return self.steps * self.cost


@dataclass(frozen=True)
class Goal:
    """A goal, what was counted with each preconditioner, and whether one of them meets it."""

    words: str
    counts: tuple[str, ...]
    met: bool


def title(task: str) -> str:
    """The task's title, marked if it was held out."""
    return TASKS[task].title + (" †" if TASKS[task].held_out else "")


def mean_final(records: Sequence[Record]) -> float:
    """Mean of the final training losses; infinite if one run diverged, NaN without runs."""
    return fmean(record.final for record in records) if records else math.nan


def mean_curve(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean training loss of the runs there, as far as all of them got."""
    length = min(len(record.steps) for record in records)
    steps = np.mean([record.steps[:length] for record in records], axis=0)
    return steps, np.mean([record.train[:length] for record in records], axis=0)


def geometric_mean(values: Sequence[float]) -> float:
    """NaN without values or if one is not known, infinite if one is."""
    if not values or any(map(math.isnan, values)):
        return math.nan
    return math.exp(fmean(map(math.log, values))) if all(map(math.isfinite, values)) else math.inf


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


def final(results: Results, task: str, contestant: str) -> float:
    """Final training loss at the tuned learning rate; infinite if every rate diverged, NaN if not known."""
    if runs := results.tuned(task, contestant):
        return mean_final(runs)
    known = results.earlier(contestant, "finals")
    if task in known:
        return known[task]
    losses = results.losses(task, contestant)
    return math.inf if losses and all(map(math.isinf, losses.values())) else math.nan


def documented(results: Results, task: str, contestant: str) -> list[Record]:
    """The runs at the documented learning rate."""
    return results.seeds(task, contestant, results.documented(contestant))


def better_adamw(results: Results, task: str) -> str | None:
    """Which of the two AdamWs has the lower final training loss, or None before one is tuned."""
    finals = {name: final(results, task, name) for name in ADAMW if name in results.plan.contestants}
    known = {name: loss for name, loss in finals.items() if not math.isnan(loss)}
    return min(known, key=known.__getitem__) if known else None


def reach(results: Results, task: str, ours: str, other: str | None) -> Reach | None:
    """One of ours against another on a task, or None while runs are missing."""
    records, level = (
        documented(results, task, ours),
        math.nan if other is None else final(results, task, other),
    )
    if other is None or not records or not math.isfinite(level):
        return None
    steps = first_at(*mean_curve(records), level) / TASKS[task].steps
    times = timing.load(results.folder, task)
    known = ours in times and other in times
    cost = times[ours]["seconds"] / times[other]["seconds"] if known else math.nan
    return Reach(mean_final(records) / level, steps, cost)


def planned(results: Results, task: str, ours: str, level: float) -> float:
    """The fraction of the steps from which on all runs planned for fewer of them end at or below a level."""
    parts = [*results.plan.percents, 100]
    exponent = results.documented(ours)
    losses = np.array([mean_final(results.seeds(task, ours, exponent, part)[:1]) for part in parts])
    if len(parts) == 1 or np.isnan(losses).any():
        return math.nan
    above = np.flatnonzero(losses > level)
    start = above[-1] if len(above) else 0
    return first_at(np.array(parts[start:]) / 100, np.minimum(losses[start:], sys.float_info.max), level)


def chosen(results: Results, task: str) -> str:
    """The preconditioner that the documentation's rule chooses, by the time of a gradient and its step."""
    times = timing.load(results.folder, task)
    if not {OURS, KRONECKER} <= times.keys():
        return OURS
    slower = times[KRONECKER]["seconds"] / times[OURS]["seconds"]
    return KRONECKER if slower <= AFFORDABLE else OURS


def shared_ratio(results: Results, task: str, contestant: str) -> float:
    """Final training loss with one rate on all tasks, as a multiple of that of the better AdamW, tuned.

    For ours the rate is the documented one, for the others the one that is best over the tasks that are not
    held out.
    """
    adamw = better_adamw(results, task)
    if adamw is None:
        return math.nan
    known = results.earlier(contestant, "shared")
    if task in known:
        return known[task]
    ours = contestant in BOTH
    exponent = results.documented(contestant) if ours else results.shared(contestant)
    if exponent is None:
        return math.nan
    return mean_final(results.seeds(task, contestant, exponent)) / final(results, task, adamw)


def goals(results: Results, tasks: Iterable[str]) -> list[Goal]:
    """The goals, counted over some tasks; those on time use the preconditioner that `chosen` gives."""
    tasks = [task for task in tasks if better_adamw(results, task) is not None]
    others = [name for name in results.plan.contestants if not CONTESTANTS[name].ours]

    def lowest(task: str, ours: str) -> bool:
        losses = [final(results, task, name) for name in others]
        own = mean_final(documented(results, task, ours))
        return all(own < loss for loss in losses if not math.isnan(loss))

    def against(other: Callable[[str], str | None], ours: str | None) -> list[Reach]:
        found = (reach(results, task, ours or chosen(results, task), other(task)) for task in tasks)
        return [entry for entry in found if entry is not None]

    def adamw(task: str) -> str | None:
        return better_adamw(results, task)

    def soap(_: str) -> str:
        return SOAP

    def count(words: str, needed: int, *counts: tuple[int, int]) -> Goal:
        shown = tuple(f"{many} of {of}" for many, of in counts)
        return Goal(words, shown, any(many >= needed for many, _ in counts))

    def many(found: list[Reach], holds: Callable[[Reach], bool]) -> tuple[int, int]:
        return sum(map(holds, found)), len(found)

    pairs = {name: (against(adamw, name), against(soap, name)) for name in BOTH}
    timed = [[entry for entry in against(who, None) if not math.isnan(entry.cost)] for who in (adamw, soap)]
    worst = {name: max((entry.ratio for entry in pairs[name][0]), default=math.nan) for name in BOTH}
    return [
        count(
            "lower final loss than every other optimizer, tuned, on at least 12 of 16",
            12,
            *((sum(lowest(task, name) for task in tasks), len(tasks)) for name in BOTH),
        ),
        Goal(
            "never above 1.03 times AdamW's",
            tuple(f"at most {worst[name]:.3g}" for name in BOTH),
            any(worst[name] <= 1.03 and len(pairs[name][0]) == len(tasks) for name in BOTH),
        ),
        count(
            "AdamW's final loss within 60% of its steps on at least 12",
            12,
            *(many(pairs[name][0], lambda entry: entry.steps <= 0.6) for name in BOTH),
        ),
        count(
            "SOAP's final loss within 90% of its steps on at least 10",
            10,
            *(many(pairs[name][1], lambda entry: entry.steps <= 0.9) for name in BOTH),
        ),
        count(
            "AdamW's final loss in less time on at least 9, by the rule below",
            9,
            many(timed[0], lambda entry: entry.time < 1),
        ),
        count(
            "SOAP's final loss in less time on at least 13, by the rule below",
            13,
            many(timed[1], lambda entry: entry.time < 1),
        ),
        *(
            _lowest_mean(results, words, held_out)
            for words, held_out in (("not held out", False), ("held out", True))
        ),
    ]


def _lowest_mean(results: Results, words: str, held_out: bool) -> Goal:
    """The goal on one learning rate for all tasks, on one half of the first sixteen."""
    tasks = [t for t in results.plan.tasks if TASKS[t].held_out is held_out and not TASKS[t].later]
    means = {
        name: geometric_mean([shared_ratio(results, task, name) for task in tasks])
        for name in results.plan.contestants
        if name in BOTH or not CONTESTANTS[name].ours
    }
    others = {name: mean for name, mean in means.items() if name not in BOTH and math.isfinite(mean)}
    best = min(others, key=others.__getitem__, default=None)
    counts = tuple(f"{means.get(name, math.nan):.3g}" for name in BOTH)
    least = math.inf if best is None else others[best]
    named = "" if best is None else f" ({CONTESTANTS[best].title}: {least:.3g})"
    return Goal(
        f"one rate for all tasks: lowest geometric mean of loss / tuned AdamW's, {words}{named}",
        counts,
        any(means.get(name, math.inf) < least for name in BOTH),
    )
