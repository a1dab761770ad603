"""Tune and train each contestant on every task, time the steps, write tables and pictures of docs/results.md.

Without a command it does all five: ``run``, ``variants`` of our default, ``recipe`` (the published one and
what it is compared with, and a table), ``time``, ``report``. Existing runs are not repeated.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from . import pool, recipe, report, timing
from .contestants import CONTESTANTS
from .data import FASHION_MNIST
from .problems import TASKS, available
from .runs import RESULTS
from .search import Plan, Results

COMMANDS = ("run", "variants", "recipe", "time", "report")
SHORT = Plan(
    tasks=("autoencoder", "classifier", "digits", "transformer", "poisson"),
    contestants=("mlbfgs", "adamw", "sgd"),
    seeds=1,
    least=3,
    most=4,
    one_setting=False,
    percents=(),
    known=False,
)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tasks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "commands", nargs="*", metavar="COMMAND", help=f"of {', '.join(COMMANDS)}; by default all"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument(
        "--contestants", nargs="+", choices=CONTESTANTS, metavar="NAME", help=", ".join(CONTESTANTS)
    )
    parser.add_argument("--seeds", type=int, help="seeds of each figure, by default 3")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes, by default one for each core"
    )
    parser.add_argument(
        "--short", action="store_true", help="five tasks, three optimizers, one seed; writes no docs"
    )
    parser.add_argument(
        "--results", type=Path, help=f"folder of the runs, by default {RESULTS.name} in results"
    )
    parser.add_argument(
        "--again", action="store_true", help="make runs of this library anew if its code has changed since"
    )
    parsed = parser.parse_args()
    if parsed.seeds is not None and parsed.seeds < 1:
        parser.error(f"`--seeds` must be at least 1, got {parsed.seeds}")
    if unknown := [command for command in parsed.commands if command not in COMMANDS]:
        parser.error(f"`COMMAND` must be one of {', '.join(COMMANDS)}, got {', '.join(unknown)}")
    return parsed


def plan(parsed: argparse.Namespace) -> Plan:
    """The plan that the command line asks for, in the order in which tasks and contestants are listed."""
    base = SHORT if parsed.short else Plan()
    return Plan(
        tasks=_chosen(parsed.tasks, base.tasks, TASKS),
        contestants=_chosen(parsed.contestants, base.contestants, CONTESTANTS),
        seeds=base.seeds if parsed.seeds is None else parsed.seeds,
        least=base.least,
        most=base.most,
        one_setting=base.one_setting,
        percents=base.percents,
        known=base.known,
    )


def _chosen(names: Sequence[str] | None, default: tuple[str, ...], known: Sequence[str]) -> tuple[str, ...]:
    return default if names is None else tuple(name for name in known if name in names)


def main() -> None:
    """Do what the command line asks for."""
    parsed = arguments()
    folder = parsed.results or (RESULTS.with_name("tasks_short") if parsed.short else RESULTS)
    results = Results(plan(parsed), folder, parsed.again)
    commands = parsed.commands or COMMANDS
    if not all(map(available, results.plan.tasks)):
        print(f"Fashion-MNIST is left out of new runs: `{FASHION_MNIST}` names no file with its images.")
    if "run" in commands and not pool.make(results, parsed.workers):
        raise SystemExit(130)
    for part in report.variants(results) if "variants" in commands and not parsed.short else ():
        if not pool.make(part, parsed.workers):
            raise SystemExit(130)
    if "recipe" in commands and not parsed.short:
        part = recipe.part(results)
        if not pool.make(part, parsed.workers):
            raise SystemExit(130)
        recipe.write(part)
    if "time" in commands:
        timing.measure(results)
    if "report" in commands:
        report.show(results)
        if not parsed.short:
            report.keep(results)
        if parsed.short or parsed.tasks or parsed.contestants:
            print("The pages are not written for a part of the comparison.")
        else:
            report.write(results)


if __name__ == "__main__":
    main()
