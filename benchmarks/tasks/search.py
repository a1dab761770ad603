"""Which runs to make: the learning rates of each contestant, tuned for each task or one for all tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product, takewhile
from pathlib import Path
from typing import Any

from .contestants import CONTESTANTS
from .problems import TASKS, available
from .runs import RESULTS, Key, load
from .training import Record

__all__ = [
    "ADAMW",
    "BOTH",
    "KRONECKER",
    "OURS",
    "SOAP",
    "Plan",
    "Results",
    "interior",
    "next_exponents",
]

OURS, KRONECKER, SOAP, ADAMW = "mlbfgs", "mlbfgs_kronecker", "soap", ("adamw", "adamw_99")
BOTH = (OURS, KRONECKER)
COMPARED = (*BOTH, "mlbfgs_equations", "mlbfgs_kronecker_0", "mlbfgs_0")
"""Ours that take part in the comparison."""


def next_exponents(centre: int, losses: Mapping[int, float], least: int = 3, most: int = 9) -> list[int]:
    """Exponents to try next; none if the search is over.

    Parameters
    ----------
    centre : int
        Exponent at which the search begins.
    losses : mapping of int to float
        Final training loss at each exponent that was tried, infinite if the run diverged.
    least, most : int
        How many are tried if the best one lies between others, and at most.

    Returns
    -------
    list of int

    Notes
    -----
    The centre and its two neighbours come first. Then one is added at a time, at the end of the range that is
    nearer to the best, or at the better end if the best is in the middle. If all diverged, it is added below.

    Examples
    --------
    >>> next_exponents(0, {})
    [-1, 0, 1]
    >>> next_exponents(0, {-1: 3.0, 0: 2.0, 1: 1.0})
    [2]
    >>> next_exponents(0, {-1: 3.0, 0: 2.0, 1: 1.0, 2: 4.0, 3: float("inf")})
    []
    """
    first = [centre + shift for shift in (-1, 0, 1) if centre + shift not in losses]
    if first:
        return first
    tried = range(min(losses), max(losses) + 1)
    holes = [exponent for exponent in tried if exponent not in losses]
    if holes:
        return holes
    if len(tried) >= most or (len(tried) >= least and interior(losses)):
        return []
    low, high = tried[0], tried[-1]
    best = min(losses, key=losses.__getitem__)
    below, above = best - low, high - best
    if math.isinf(losses[best]) or below < above or (below == above and losses[low] <= losses[high]):
        return [low - 1]
    return [high + 1]


def interior(losses: Mapping[int, float]) -> bool:
    """Whether the best exponent lies between others that were tried."""
    best = min(losses, key=losses.__getitem__)
    return math.isfinite(losses[best]) and min(losses) < best < max(losses)


@cache
def _earlier() -> dict[str, dict[str, Any]]:
    return json.loads(Path(__file__).with_name("earlier.json").read_text("utf-8"))


@dataclass(frozen=True)
class Plan:
    """The part of the comparison to make.

    Attributes
    ----------
    tasks, contestants : tuple of str
        Names; by default all except our presets and variants of the default.
    seeds : int
        Seeds of each final figure.
    least, most : int
        Numbers of learning rates that are tried; see `next_exponents`.
    one_setting : bool
        Whether to look for one learning rate for all tasks as well.
    percents : tuple of int
        Percentages of the steps for which shorter runs of ours are planned, in rising order.
    known : bool
        Whether the runs that the repository keeps count, and what was found before them.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    contestants: tuple[str, ...] = tuple(
        name for name, entry in CONTESTANTS.items() if name in COMPARED or not entry.ours
    )
    seeds: int = 3
    least: int = 3
    most: int = 9
    one_setting: bool = True
    percents: tuple[int, ...] = (25, 50, 75)
    known: bool = True

    @cached_property
    def seen(self) -> tuple[str, ...]:
        """The tasks over which one learning rate for all is chosen: not held out, of the first sixteen."""
        return tuple(task for task in self.tasks if not (TASKS[task].held_out or TASKS[task].later))

    @cached_property
    def shortened(self) -> tuple[str, ...]:
        """The contestants that also make shorter runs."""
        return tuple(name for name in self.contestants if name in BOTH and self.percents)


@dataclass
class Results:
    """The runs in a folder and those that the repository keeps, and the ones that are needed next.

    With `again` those of this library have to be of the present version of the code.
    """

    plan: Plan = field(default_factory=Plan)
    folder: Path = RESULTS
    again: bool = False
    _records: dict[Key, Record] = field(default_factory=dict)

    def earlier(self, contestant: str, what: str) -> dict[str, float]:
        """What an earlier comparison, whose runs were not kept, found for a contestant, by task.

        Parameters
        ----------
        contestant : str
        what : {"rates", "finals", "tests", "shared"}
            Exponents of the best learning rates, of at least five; final training and test losses with them,
            the mean of three seeds; final training losses with one rate for all tasks, as multiples of the
            better AdamW's.

        Returns
        -------
        dict
            Empty for a contestant that was not part of it; infinite where runs diverged.
        """
        found = _earlier().get(contestant, {}).get(what, {}) if self.plan.known else {}
        return {task: math.inf if value is None else value for task, value in found.items()}

    def record(self, key: Key) -> Record | None:
        """A run that was made, or None."""
        if key not in self._records:
            record = load(key, self.folder, kept=self.plan.known, again=self.again)
            if record is None:
                return None
            self._records[key] = record
        return self._records[key]

    def losses(self, task: str, contestant: str) -> dict[int, float]:
        """Final training loss of seed 0 at each exponent of the search, as far as it has come."""
        centre, losses = CONTESTANTS[contestant].centre, {}
        while wanted := next_exponents(centre, losses, self.plan.least, self.plan.most):
            found = {
                exponent: record.final
                for exponent in wanted
                if (record := self.record(Key(task, contestant, exponent, 0))) is not None
            }
            losses |= found
            if len(found) < len(wanted):
                break
        return losses

    def best(self, task: str, contestant: str) -> int | None:
        """The exponent with the lowest loss; None if the search is not over or every run diverged.

        Where an earlier search was made, it counts.
        """
        if (known := self.earlier(contestant, "rates").get(task)) is not None:
            return round(known)
        losses = self.losses(task, contestant)
        if self._unsearched(task, contestant, losses) or all(map(math.isinf, losses.values())):
            return None
        return min(losses, key=losses.__getitem__)

    def tuned(self, task: str, contestant: str) -> list[Record]:
        """The runs of all seeds at the best exponent; none if some are missing."""
        best = self.best(task, contestant)
        return [] if best is None else self.seeds(task, contestant, best)

    def seeds(self, task: str, contestant: str, exponent: int, percent: int = 100) -> list[Record]:
        """The runs at an exponent, from the first seed to the last that was made without a gap."""
        keys = (Key(task, contestant, exponent, seed, percent) for seed in range(self.plan.seeds))
        return list(takewhile(lambda record: record is not None, map(self.record, keys)))

    def _unsearched(self, task: str, contestant: str, losses: Mapping[int, float]) -> list[int]:
        centre = CONTESTANTS[contestant].centre
        wanted = next_exponents(centre, losses, self.plan.least, self.plan.most)
        return [exponent for exponent in wanted if exponent not in losses]

    def tuning(self, task: str, contestant: str) -> list[Key]:
        """Runs that the tuning of a contestant on a task needs next."""
        if TASKS[task].group not in CONTESTANTS[contestant].groups:
            return []
        if task in self.earlier(contestant, "rates"):
            return self._missing([task], contestant, [self.best(task, contestant)], range(self.plan.seeds))
        losses = self.losses(task, contestant)
        if wanted := self._unsearched(task, contestant, losses):
            return self._missing([task], contestant, wanted, [0])
        best = self.best(task, contestant)
        return [] if best is None else self._missing([task], contestant, [best], range(self.plan.seeds))

    def shorter(self, task: str, contestant: str) -> list[Key]:
        """Missing runs that are planned for fewer steps: one seed, at the documented learning rate."""
        return self._missing([task], contestant, [self.documented(contestant)], [0], self.plan.percents)

    def documented(self, contestant: str) -> int:
        """Exponent of the grid nearest to the documented learning rate."""
        return round(2 * math.log10(CONTESTANTS[contestant].documented))

    def shared_ratios(self, contestant: str) -> dict[int, float]:
        """How much worse than its own best each exponent is, as a geometric mean over the seen tasks.

        The exponents are those between the lowest and the highest that is best on one of the tasks. A value
        is infinite if a run diverged, and missing if one has not been made yet.
        """
        bests = {task: self.best(task, contestant) for task in self.plan.seen}
        known = {task: best for task, best in bests.items() if best is not None}
        if not known or len(known) < len(bests):
            return {}
        ratios = {}
        for exponent in range(min(known.values()), max(known.values()) + 1):
            logarithms = []
            for task, best in known.items():
                record = self.record(Key(task, contestant, exponent, 0))
                if record is None:
                    break
                own = self.losses(task, contestant)[best]
                logarithms.append(math.log(record.final / own))
            else:
                ratios[exponent] = math.exp(sum(logarithms) / len(logarithms))
        return ratios

    def shared(self, contestant: str) -> int | None:
        """The exponent that is best for all seen tasks together, or None."""
        if self.plan.known and (known := _earlier().get(contestant, {}).get("shared_rate")) is not None:
            return int(known)
        ratios = self.shared_ratios(contestant)
        if not ratios or self.sharing(contestant):
            return None
        best = min(ratios, key=ratios.__getitem__)
        return best if math.isfinite(ratios[best]) else None

    def sharing(self, contestant: str) -> list[Key]:
        """Runs that are missing before the shared exponent can be chosen."""
        bests = [self.best(task, contestant) for task in self.plan.seen]
        if not bests or None in bests:
            return []
        exponents = range(min(bests), max(bests) + 1)
        return self._missing(self.plan.seen, contestant, exponents, [0])

    def one_setting(self, contestant: str) -> list[Key]:
        """Runs that the comparison with one learning rate for all tasks needs next."""
        tasks, seeds = self.plan.tasks, range(self.plan.seeds)
        documented = self._missing(tasks, contestant, [self.documented(contestant)], seeds)
        if missing := self.sharing(contestant):
            return list(dict.fromkeys(documented + missing))
        shared = self.shared(contestant)
        found = [] if shared is None else self._missing(tasks, contestant, [shared], seeds)
        return list(dict.fromkeys(documented + found))

    def _missing(
        self,
        tasks: Iterable[str],
        contestant: str,
        exponents: Iterable[int],
        seeds: Iterable[int],
        percents: Iterable[int] = (100,),
    ) -> list[Key]:
        groups = CONTESTANTS[contestant].groups
        tasks = [task for task in tasks if TASKS[task].group in groups and available(task)]
        keys = (Key(t, contestant, *rest) for t, *rest in product(tasks, exponents, seeds, percents))
        return [key for key in keys if self.record(key) is None]
