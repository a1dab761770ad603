"""The tables of docs/generalisation.md, from the committed results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

from benchmarks.tasks.contestants import CONTESTANTS, rate
from benchmarks.tasks.goals import geometric_mean
from benchmarks.tasks.report import DOCS, markdown, number

from . import variation_tables, variations
from .calibration import Measures
from .images import IMAGES
from .store import Store
from .treatments import ADAMW_DECAY, OPTIMIZERS, TREATMENTS, best, finals, losses

__all__ = ["Compared", "best_treatment", "compare", "standard_error", "texts", "write"]

ADAMW = "adamw"
OURS = tuple(name for name in OPTIMIZERS if name != ADAMW)
CALIBRATED_GOAL = 1.05
MINUS, PLUS_MINUS = "\N{MINUS SIGN}", "\N{PLUS-MINUS SIGN}"

GOAL_HEAD = (
    "task",
    "optimizer",
    "its treatment",
    "AdamW's",
    "accuracy, %",
    "AdamW's, %",
    "goal",
    "test loss / AdamW's",
    "calibrated / AdamW's",
    "goal",
)


def tasks(store: Store) -> list[str]:
    """The tasks whose runs are complete."""

    def complete(task: str) -> bool:
        return all(
            losses(store, task, optimizer, name) and finals(store, task, optimizer, name)
            for optimizer in OPTIMIZERS
            for name in TREATMENTS
        )

    return [task for task in IMAGES if complete(task)]


def mean(found: Sequence[Measures]) -> Measures:
    """The mean over seeds of each measure."""
    return Measures(*map(fmean, zip(*found, strict=True)))


def standard_error(accuracy: float, examples: int) -> float:
    """Standard error of an accuracy that was found on so many examples."""
    return math.sqrt(accuracy * (1 - accuracy) / examples)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _points(value: float) -> str:
    sign = MINUS if value < 0 else "+"
    return f"{sign}{100 * abs(value):.2f}"


def tuned_text(store: Store, by: int) -> str:
    """All measures of the plain runs, at the rate with the lowest training or validation loss."""
    columns = ("rate", "training loss", "accuracy, %", "test loss", "calibrated", "ECE, %", "calibrated ECE")
    rows = [["task", "optimizer", *columns, "temperature"]]
    for task in tasks(store):
        for place, optimizer in enumerate(OPTIMIZERS):
            found = mean(finals(store, task, optimizer, "plain", by))
            exponent = best(store, task, optimizer, "plain", by)
            rows.append(
                [
                    "" if place else IMAGES[task].title,
                    CONTESTANTS[optimizer].title,
                    f"{rate(exponent):.2g}",
                    number(found.train),
                    _percent(found.accuracy),
                    number(found.loss),
                    number(found.calibrated),
                    _percent(found.error),
                    _percent(found.calibrated_error),
                    number(found.temperature),
                ]
            )
    return markdown(rows)


def _by_optimizer(store: Store, value: Callable[[str, str], str]) -> str:
    """A row for each optimizer, a column for each treatment."""
    rows = [["optimizer", *(treatment.title for treatment in TREATMENTS.values())]]
    rows += [[CONTESTANTS[name].title, *(value(name, own) for own in TREATMENTS)] for name in OPTIMIZERS]
    return markdown(rows)


def summary_text(store: Store) -> str:
    """Losses and accuracy of each optimizer with each treatment, over all tasks, next to plain AdamW's."""
    known = tasks(store)
    plain = {task: mean(finals(store, task, ADAMW, "plain")) for task in known}

    def relative(field: str) -> Callable[[str, str], str]:
        def value(optimizer: str, name: str) -> str:
            found = {task: mean(finals(store, task, optimizer, name)) for task in known}
            return (
                f"{geometric_mean([getattr(found[t], field) / getattr(plain[t], field) for t in known]):.2f}"
            )

        return value

    def points(optimizer: str, name: str) -> str:
        found = [mean(finals(store, task, optimizer, name)).accuracy - plain[task].accuracy for task in known]
        return _points(fmean(found))

    return "\n\n".join(
        [
            "Test loss, as a multiple of plain AdamW's (geometric mean over the tasks):",
            _by_optimizer(store, relative("loss")),
            "Calibrated test loss, as a multiple of plain AdamW's:",
            _by_optimizer(store, relative("calibrated")),
            "Accuracy, in points more than plain AdamW's (mean over the tasks):",
            _by_optimizer(store, points),
            f"AdamW's weight decay is {ADAMW_DECAY:g} times the column's.",
        ]
    )


def detail_text(store: Store) -> str:
    """Test loss, calibrated test loss and accuracy of each task, with each treatment."""
    parts: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("Test loss:", "loss", number),
        ("Calibrated test loss:", "calibrated", number),
        ("Accuracy, %:", "accuracy", _percent),
        ("Expected calibration error, %, without a temperature:", "error", _percent),
    )
    texts = []
    for words, field, form in parts:
        rows = [["task", "optimizer", *(treatment.title for treatment in TREATMENTS.values())]]
        for task in tasks(store):
            for place, optimizer in enumerate(OPTIMIZERS):
                cells = [form(getattr(mean(finals(store, task, optimizer, t)), field)) for t in TREATMENTS]
                title = "" if place else IMAGES[task].title
                rows.append([title, CONTESTANTS[optimizer].title, *cells])
        texts += [words, markdown(rows)]
    return "\n\n".join(texts)


def best_treatment(store: Store, task: str, optimizer: str) -> str:
    """The treatment with the lowest validation loss of seed 0."""
    return min(TREATMENTS, key=lambda name: min(losses(store, task, optimizer, name).values()))


class Compared(NamedTuple):
    """An optimizer next to AdamW: accuracies, the standard error of AdamW's, and ratios of test losses."""

    accuracy: float
    theirs: float
    spread: float
    loss: float
    calibrated: float

    @property
    def met(self) -> tuple[bool, bool]:
        """Whether accuracy and calibrated loss meet their goals."""
        return self.accuracy >= self.theirs - self.spread, self.calibrated <= CALIBRATED_GOAL


Choice = Callable[[str, str], str]
"""From a task and an optimizer to a treatment."""


def compare(store: Store, task: str, optimizer: str, choice: Choice, by: int = 1) -> Compared:
    """Compare an optimizer and AdamW, each with the treatment that is chosen for it."""
    ours, theirs = (mean(finals(store, task, name, choice(task, name), by)) for name in (optimizer, ADAMW))
    return Compared(
        ours.accuracy,
        theirs.accuracy,
        standard_error(theirs.accuracy, IMAGES[task].sizes[2]),
        ours.loss / theirs.loss,
        ours.calibrated / theirs.calibrated,
    )


def goals_text(store: Store, choice: Choice) -> str:
    """Accuracy and calibrated loss of each task next to AdamW's, and whether they meet their goals."""
    rows = [list(GOAL_HEAD)]
    for task, optimizer in itertools.product(tasks(store), OURS):
        found = compare(store, task, optimizer, choice)
        rows.append(
            [
                IMAGES[task].title,
                CONTESTANTS[optimizer].title,
                TREATMENTS[choice(task, optimizer)].title,
                TREATMENTS[choice(task, ADAMW)].title,
                _percent(found.accuracy),
                f"{_percent(found.theirs)} {PLUS_MINUS} {_percent(found.spread)}",
                _met(found.met[0]),
                f"{found.loss:.2f}",
                f"{found.calibrated:.2f}",
                _met(found.met[1]),
            ]
        )
    return markdown(rows)


def ways_text(store: Store) -> str:
    """On how many tasks the goals are met in each way to train, and ratios over all tasks."""
    ways: list[tuple[str, Choice, int]] = [
        (f"{treatment.title}, for all", lambda task, optimizer, own=name: own, 1)
        for name, treatment in TREATMENTS.items()
    ]
    ways.append(("plain, rate of the lowest training loss", lambda task, optimizer: "plain", 0))
    ways.append(("the treatment of the lowest validation loss", partial(best_treatment, store), 1))
    heads = ("accuracy goal met", "calibrated goal met", "test loss / AdamW's", "calibrated / AdamW's")
    rows, known = [["way", "optimizer", *heads]], tasks(store)
    for (words, choice, by), optimizer in itertools.product(ways, OURS):
        found = [compare(store, task, optimizer, choice, by) for task in known]
        rows.append(
            [
                words,
                CONTESTANTS[optimizer].title,
                *(f"{sum(one.met[goal] for one in found)} of {len(known)}" for goal in (0, 1)),
                f"{geometric_mean([one.loss for one in found]):.2f}",
                f"{geometric_mean([one.calibrated for one in found]):.2f}",
            ]
        )
    return markdown(rows)


def _met(met: bool) -> str:
    return "met" if met else "**not met**"


def texts(store: Store) -> dict[str, str]:
    """The tables of the runs that are complete, by the names of their files."""
    found: dict[str, str] = {}
    if tasks(store):
        found |= {
            "generalisation_tuned": tuned_text(store, 1),
            "generalisation_trained": tuned_text(store, 0),
            "generalisation_summary": summary_text(store),
            "generalisation_detail": detail_text(store),
            "generalisation_goals": goals_text(store, lambda task, name: "plain"),
            "generalisation_goals_best": goals_text(store, partial(best_treatment, store)),
            "generalisation_ways": ways_text(store),
        }
    if variations.complete(store):
        found |= variation_tables.texts(store)
    return found


def write(store: Store) -> None:
    """Write the tables for the page that includes them."""
    for name, text in texts(store).items():
        path = DOCS / "_generated" / f"{name}.md"
        path.write_text(text + "\n", encoding="utf-8")
        print(f"wrote {path.relative_to(DOCS.parent)}")
