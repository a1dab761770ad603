"""Our two preconditioners with their documented learning rate against the others, tuned; and the goals."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

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
    "adamw_loss",
    "better_adamw",
    "chosen",
    "documented",
    "final",
    "geometric_mean",
    "goals",
    "mean_curve",
    "mean_final",
    "one_rate",
    "planned",
    "reach",
    "shared_mean",
    "title",
]

AFFORDABLE = 2.0
"""The Kronecker preconditioner is chosen where a gradient and a step with it take at most this many times as
long as with the default. On tasks that are not held out it was sooner at AdamW's loss at ratios of 1.3 to
1.6, and later, or level, at 3.9 and 4.9."""


class Reach(NamedTuple):
    """One of our preconditioners at its documented learning rate against another optimizer, tuned.

    Attributes
    ----------
    ratio : float
        Our final training loss relative to the other's, each the mean over the seeds.
    steps : float
        Steps until the other's final training loss, as a fraction of its whole run; infinite if ours ends
        above it.
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
    """A goal and whether it is met.

    Attributes
    ----------
    words : str
    counts : tuple of str
        What was counted with the diagonal, with Kronecker, and with the one of them that `chosen` gives.
    met : bool
        By either; where time counts, by the choice.
    """

    words: str
    counts: tuple[str, str, str]
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
    finals = {name: final(results, task, name) for name in ADAMW}
    known = {name: loss for name, loss in finals.items() if not math.isnan(loss)}
    return min(known, key=known.__getitem__) if known else None


def reach(results: Results, task: str, ours: str, other: str | None) -> Reach | None:
    """One of ours against another on a task, or None while runs are missing."""
    records = documented(results, task, ours)
    level = math.nan if other is None else final(results, task, other)
    if other is None or not records or not math.isfinite(level):
        return None
    own = mean_final(records)
    steps = first_at(*mean_curve(records), level) / TASKS[task].steps if own <= level else math.inf
    times = timing.load(results.folder, task)
    known = ours in times and other in times
    cost = times[ours]["seconds"] / times[other]["seconds"] if known else math.nan
    return Reach(own / level, steps, cost)


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


def adamw_loss(results: Results, task: str) -> float:
    """Final training loss of the better AdamW, tuned; NaN if it is not known."""
    adamw = better_adamw(results, task)
    return math.nan if adamw is None else final(results, task, adamw)


def one_rate(results: Results, contestant: str) -> int | None:
    """Exponent of one rate for all tasks: of ours the documented one, of the others the one that is best over
    the tasks that are not held out."""
    return results.documented(contestant) if contestant in BOTH else results.shared(contestant)


def shared_mean(results: Results, contestant: str, *, held_out: bool) -> float:
    """Geometric mean of the final training losses with `one_rate`, as multiples of the better tuned AdamW's,
    over the first sixteen tasks that are held out or are not."""
    tasks = [t for t in results.plan.tasks if TASKS[t].held_out is held_out and not TASKS[t].later]
    known, exponent = results.earlier(contestant, "shared"), one_rate(results, contestant)

    def ratio(task: str) -> float:
        if task in known:
            return known[task]
        runs = [] if exponent is None else results.seeds(task, contestant, exponent)
        return mean_final(runs) / adamw_loss(results, task)

    return geometric_mean([ratio(task) for task in tasks])


def goals(results: Results, tasks: Iterable[str]) -> list[Goal]:
    """The goals, counted over some tasks."""
    tasks = [task for task in tasks if better_adamw(results, task) is not None]
    against = {
        other: {name: _reaches(results, tasks, name, other) for name in (*BOTH, None)}
        for other in ("AdamW", "SOAP")
    }
    worst = {
        name: max((r.ratio for r in found), default=math.nan) for name, found in against["AdamW"].items()
    }
    complete = {name: len(found) == len(tasks) for name, found in against["AdamW"].items()}
    return [
        _counted(
            "lower final loss than every other optimizer, tuned, on at least 12 of 16",
            12,
            *(
                _many([task for task in tasks if documented(results, task, name)], _lowest(results, name))
                for name in BOTH
            ),
        ),
        Goal(
            "never above 1.03 times AdamW's",
            (_shown("at most", worst[OURS]), _shown("at most", worst[KRONECKER]), ""),
            any(worst[name] <= 1.03 and complete[name] for name in BOTH),
        ),
        *(
            _counted(
                f"{other}'s final loss within {100 * part:.0f}% of its steps on at least {needed}",
                needed,
                *(_many(against[other][name], lambda entry, part=part: entry.steps <= part) for name in BOTH),
            )
            for other, part, needed in (("AdamW", 0.6, 12), ("SOAP", 0.9, 10))
        ),
        *(
            _counted(
                f"{other}'s final loss in less time on at least {needed}",
                needed,
                *(
                    _many(_timed(against[other][name]), lambda entry: entry.time < 1)
                    for name in (*BOTH, None)
                ),
            )
            for other, needed in (("AdamW", 9), ("SOAP", 13))
        ),
        _lowest_mean(results, "not held out", held_out=False),
        _lowest_mean(results, "held out", held_out=True),
    ]


def _reaches(results: Results, tasks: Iterable[str], ours: str | None, other: str) -> list[Reach]:
    """One of ours, or what `chosen` gives, against AdamW or SOAP, on the tasks where both are known."""
    found = (
        reach(
            results,
            task,
            ours or chosen(results, task),
            better_adamw(results, task) if other == "AdamW" else SOAP,
        )
        for task in tasks
    )
    return [entry for entry in found if entry is not None]


def _timed(found: list[Reach]) -> list[Reach]:
    return [entry for entry in found if not math.isnan(entry.cost)]


def _lowest(results: Results, ours: str) -> Callable[[str], bool]:
    """Whether one of ours ends below all others that ran on a task, at their best learning rates."""
    others = [name for name in results.plan.contestants if not CONTESTANTS[name].ours]

    def lowest(task: str) -> bool:
        losses = [final(results, task, name) for name in others]
        own = mean_final(documented(results, task, ours))
        return all(own < loss for loss in losses if not math.isnan(loss))

    return lowest


def _many(found: list[Any], holds: Callable[[Any], bool]) -> tuple[int, int]:
    """For how many it holds, and of how many."""
    return sum(map(holds, found)), len(found)


def _counted(words: str, needed: int, *counts: tuple[int, int]) -> Goal:
    """A goal on a count; with three counts the last one decides."""
    shown = [f"{many} of {of}" for many, of in counts]
    deciding = counts[2:] or counts
    return Goal(
        words, (shown[0], shown[1], *(shown[2:] or [""])), any(many >= needed for many, _ in deciding)
    )


def _shown(words: str, value: float) -> str:
    """Words and a value, or nothing if it is not known."""
    return "" if math.isnan(value) else f"{words} {value:.3g}".strip()


def _lowest_mean(results: Results, words: str, *, held_out: bool) -> Goal:
    """The goal on one learning rate for all tasks, on one half of the first sixteen."""
    means = {
        name: shared_mean(results, name, held_out=held_out)
        for name in results.plan.contestants
        if name in BOTH or not CONTESTANTS[name].ours
    }
    others = {name: mean for name, mean in means.items() if name not in BOTH and math.isfinite(mean)}
    best = min(others, key=others.__getitem__, default=None)
    diagonal, kronecker = (_shown("", means.get(name, math.nan)) for name in BOTH)
    least = math.inf if best is None else others[best]
    named = "" if best is None else f" ({CONTESTANTS[best].title}: {least:.3g})"
    return Goal(
        f"one rate for all tasks: lowest geometric mean of loss / tuned AdamW's, {words}{named}",
        (diagonal, kronecker, ""),
        any(means.get(name, math.inf) < least for name in BOTH),
    )
