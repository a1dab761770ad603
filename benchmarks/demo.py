"""Train real models with mL-BFGS and with the usual alternatives, and say which one won.

Run ``python3 -m nox -s bench -- demo``. It takes a few minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import digits, quadratics
from .claims.quadratics import Runs
from .digits import OPTIMIZERS, Summary, Task

OURS, BASELINE = "mL-BFGS", "AdamW"
CAVEAT = (
    "To keep in mind: deep autoencoders and large batches are where curvature can be told from noise; with "
    "small batches AdamW comes closer, and its step is cheaper. The runs are short, and each optimizer's "
    "rate is the one with the lowest mean train loss over the very seeds that are reported."
)


def main() -> None:
    """Run everything; figures go to the output directory, tables and sentences to the terminal."""
    options, start = parse(), time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 100)
    mpl.use("Agg")
    torch.set_num_threads(1)  # otherwise, waiting for a thread on a busy core would be timed as work
    options.output.mkdir(parents=True, exist_ok=True)
    tasks = [replace(task, steps=task.steps // 10) if options.quick else task for task in digits.TASKS]
    seeds, steps = (1, 60) if options.quick else (2, 300)
    trainings = [len(OPTIMIZERS) * len(task.rates[BASELINE]) * seeds for task in tasks]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        total = len(quadratics.SHOWN) + sum(trainings)
        bar = progress.add_task("loading the digits", total=total)

        @contextmanager
        def tracked(description: str) -> Iterator[None]:
            progress.update(bar, description=description)
            if not console.is_terminal:  # the bar is then drawn only at the end
                console.print(description, highlight=False)
            yield
            progress.advance(bar)

        data = digits.load()
        outcomes = quadratics.run(steps, tracked)
        console.print(quadratic_table(outcomes))
        save(quadratics.draw(outcomes), options.output / "quadratic.png", console)
        summaries = {}
        for task in tasks:
            summaries[task] = digits.compare(task, data, seeds, tracked)
            save(digits.draw(task, summaries[task]), options.output / f"{task.name}.png", console)
        progress.update(bar, description="done")
    console.print(digits_table(summaries))
    sentences = [*quadratic_verdict(outcomes)]
    for task in tasks:
        sentences += verdict(task, summaries[task])
    sentences.append(CAVEAT)
    for sentence in sentences:
        console.print(f"• {sentence}", highlight=False)
    console.print(f"All of it took {time.perf_counter() - start:.0f} s.", highlight=False)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="directory of the figures")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps: does everything run?")
    return parser.parse_args()


def save(figure: Figure, path: Path, console: Console) -> None:
    """Write a figure and say where it is."""
    figure.savefig(path, dpi=150)
    console.print(f"Figure: {path}", highlight=False, soft_wrap=True)


def quadratic_table(outcomes: dict[str, Runs]) -> Table:
    """Runs that diverged, the speed and the loss at the end."""
    table = Table(title="Noisy quadratic, medians over the seeds", box=SIMPLE, title_justify="left")
    table.add_column("method")
    table.add_column("diverged", justify="right")
    for heading in ("steps to 1 % of the start", "loss in the last quarter"):
        table.add_column(heading, justify="right")
    for method, outcome in outcomes.items():
        reach, diverged = steps_to_hundredth(outcome), f"{outcome.diverged} of {quadratics.SEEDS}"
        floor = np.median(outcome.floor)
        table.add_row(
            method,
            diverged,
            f"{reach:g}" if np.isfinite(reach) else "-",
            f"{floor:.3g}" if np.isfinite(floor) else "-",
        )
    return table


def steps_to_hundredth(outcome: Runs) -> float:
    """Median over the seeds of the steps to 1 % of the loss at the start; infinite if never."""
    return float(np.median(outcome.steps_to(0.01)))


def digits_table(summaries: dict[Task, dict[str, Summary]]) -> Table:
    """The results of every optimizer on every task."""
    title = f"Handwritten digits, means over the seeds; goal: {BASELINE}'s final train loss"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for heading in ("task", "optimizer"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "rate",
        "train loss",
        "test loss",
        "test acc.",
        "ms per step",
        "steps to goal",
        "s to goal",
    ):
        table.add_column(heading, justify="right")
    for task, of_task in summaries.items():
        for name, summary in of_task.items():
            accuracy = f"{summary.mean('accuracy'):.1%}" if task.classifies else "-"
            step, second = (f"{value:.3g}" if np.isfinite(value) else "-" for value in reached(of_task, name))
            table.add_row(
                task.name,
                name,
                f"{summary.rate:g}" + ("*" if summary.at_edge else ""),
                f"{final(summary):.3g}",
                f"{summary.mean('test_loss'):.3g}",
                accuracy,
                f"{1e3 * duration(summary) / task.steps:.1f}",
                step,
                second,
            )
        table.add_section()
    if any(summary.at_edge for of_task in summaries.values() for summary in of_task.values()):
        table.caption = "* the best learning rate is at an edge of those tried"
    return table


def final(summary: Summary) -> float:
    """Train loss at the end, mean over the seeds."""
    return float(summary.mean("losses")[-1])


def duration(summary: Summary) -> float:
    """Seconds of training, mean over the seeds."""
    return float(summary.mean("seconds")[-1])


def reached(summaries: dict[str, Summary], name: str) -> tuple[float, float]:
    """Steps and seconds until the mean loss is at the baseline's final one; infinite if never."""
    there = np.flatnonzero(summaries[name].mean("losses") <= final(summaries[BASELINE]))
    if not there.size:
        return float("inf"), float("inf")
    return float(summaries[name].mean("steps")[there[0]]), float(summaries[name].mean("seconds")[there[0]])


def quadratic_verdict(outcomes: dict[str, Runs]) -> Iterator[str]:
    """Which methods stayed stable, and which were fast."""
    stable = [method for method, outcome in outcomes.items() if not outcome.diverged]
    gone = "; ".join(f"{name}: {outcome.diverged}" for name, outcome in outcomes.items() if outcome.diverged)
    yield f"quadratic, diverged of {quadratics.SEEDS} runs: {gone or 'none'}; none of {', '.join(stable)}."
    order = sorted(stable, key=lambda method: steps_to_hundredth(outcomes[method]))
    speeds = ", ".join(f"{method} {text_of(steps_to_hundredth(outcomes[method]))}" for method in order)
    yield (
        f"quadratic, steps to 1 % of the start where nothing diverged: {speeds}. Newton is told the whole "
        f"curvature, and the rate {quadratics.RATE} is 1 / the largest one, as gradient descent wants it."
    )
    floors = {method: float(np.median(outcomes[method].floor)) for method in stable}
    lowest = min(floors, key=floors.__getitem__)
    yield f"quadratic, lowest loss in the last quarter: {lowest}, {floors[lowest]:.3g}."


def verdict(task: Task, summaries: dict[str, Summary]) -> Iterator[str]:
    """Which optimizer won by steps, by wall-clock time and on held-out digits."""
    losses = {name: final(summary) for name, summary in summaries.items()}
    winner, second = sorted(losses, key=losses.__getitem__)[:2]
    yield (
        f"{task.name}, by step: {winner} has the lowest train loss after {task.steps} steps, "
        f"{losses[winner]:.4g} against {second}'s {losses[second]:.4g}."
    )
    times = {name: reached(summaries, name)[1] for name in summaries}
    quickest = min(times, key=times.__getitem__)
    rest = ", ".join(f"{name} {text_of(times[name], ' s')}" for name in times if name != quickest)
    yield (
        f"{task.name}, by wall-clock: {quickest} is the first at {BASELINE}'s final train loss, after "
        f"{text_of(times[quickest], ' s')} ({rest}); a step of {OURS} takes "
        f"{duration(summaries[OURS]) / duration(summaries[BASELINE]):.1f} times one of {BASELINE}."
    )
    tests = {name: float(summary.mean("test_loss")) for name, summary in summaries.items()}
    best = min(tests, key=tests.__getitem__)
    accuracy = most_accurate(task, summaries)
    yield f"{task.name}, held out: {best} has the lowest test loss, {tests[best]:.4g}{accuracy}."
    edges = [name for name, summary in summaries.items() if summary.at_edge]
    if edges:
        yield f"{task.name}: the best learning rate of {' and '.join(edges)} is at an edge of those tried."


def text_of(amount: float, unit: str = "") -> str:
    """Steps or seconds, or that the goal was never reached."""
    return f"{amount:.3g}{unit}" if np.isfinite(amount) else "never"


def most_accurate(task: Task, summaries: dict[str, Summary]) -> str:
    """A clause on the accuracy, for a classifier."""
    if not task.classifies:
        return ""
    accuracy = {name: float(summary.mean("accuracy")) for name, summary in summaries.items()}
    best = max(accuracy, key=accuracy.__getitem__)
    return f"; {best} the highest accuracy, {accuracy[best]:.1%}"


if __name__ == "__main__":
    main()
