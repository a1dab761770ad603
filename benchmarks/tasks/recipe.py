"""The published recipe against SGD and AdamW: the table of docs/claims/networks.md.

It uses the runs of the whole comparison, or makes those that it needs, so that the recipe's figures can be
renewed without all the others.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from . import report
from .contestants import rate
from .goals import first_at, mean_curve, mean_final, title
from .search import ADAMW, Results

__all__ = ["FORMULAS", "RECIPE", "SGD", "part", "text", "write"]

SGD, RECIPE, FORMULAS = "sgd", "mlbfgs_paper", "mlbfgs_formulas"


def part(results: Results) -> Results:
    """The runs that the table uses."""
    names = (*ADAMW, SGD, RECIPE, FORMULAS)
    return replace(results, plan=replace(results.plan, contestants=names, one_setting=False, percents=()))


def text(results: Results) -> str:
    """The table of `part`, without tasks whose runs are incomplete, and how often the recipe is ahead."""
    rows = [
        [
            "task",
            "SGD",
            "published recipe",
            "published formulas",
            "recipe / SGD",
            "seed by seed",
            "seeds below SGD",
            "recipe's steps to SGD's loss",
            "learning rates: SGD, recipe",
        ]
    ]
    tasks = [task for task in results.plan.tasks if _known(results, task)]
    for task in tasks:
        bests = [results.best(task, name) for name in (SGD, RECIPE)]
        theirs, ours = (results.tuned(task, name) for name in (SGD, RECIPE))
        each = [own.final / other.final for own, other in zip(ours, theirs, strict=True)]
        rows.append(
            [
                title(task),
                *(report.number(report.ratio(results, task, name)) for name in (SGD, RECIPE, FORMULAS)),
                report.number(_against_sgd(results, task)),
                "\N{EN DASH}".join(report.number(value) for value in (min(each), max(each))),
                f"{sum(value < 1 for value in each)} of {len(each)}",
                report.percent(_steps(results, task)),
                ", ".join(f"{rate(best):.2g}" for best in bests if best is not None),
            ]
        )
    lower = sum(_against_sgd(results, task) < 1 for task in tasks)
    words = (
        "Final training loss in parts of the better AdamW's, each at its best learning rate, mean of "
        f"{results.plan.seeds} seeds ({report.NONE}: diverged, at every rate or at one of the seeds). "
        f"The recipe ends below SGD on {lower} of {len(tasks)} tasks. Its steps are those until it is at "
        "SGD's final loss, in parts of the run."
    )
    return f"{report.markdown(rows)}\n\n{words}"


def _known(results: Results, task: str) -> bool:
    """Whether all runs are there; the formulas may have diverged at every rate."""
    return all(results.tuned(task, name) for name in (*ADAMW, SGD, RECIPE)) and not math.isnan(
        report.ratio(results, task, FORMULAS)
    )


def _against_sgd(results: Results, task: str) -> float:
    return mean_final(results.tuned(task, RECIPE)) / mean_final(results.tuned(task, SGD))


def _steps(results: Results, task: str) -> float:
    """Steps of the recipe to SGD's final loss, as a fraction of the run; infinite if it is not reached."""
    steps, losses = mean_curve(results.tuned(task, RECIPE))
    return first_at(steps, np.asarray(losses), mean_final(results.tuned(task, SGD))) / float(steps[-1])


def write(results: Results) -> None:
    """Write the table, which docs/claims/networks.md includes."""
    path = report.DOCS / "_generated" / "tasks_recipe.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text(results) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(report.DOCS.parent)}")
