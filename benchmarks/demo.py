"""Train real models with mL-BFGS and with the usual alternatives, and say which one won.

Run ``python3 -m nox -s bench -- demo``. It takes a few minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
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
from .digits import Compared, Summary, Task

OURS, BASELINE = "mL-BFGS", "AdamW"
WIDTH = 80
CAVEAT = (
    "To keep in mind: deep autoencoders and large batches are where curvature can be told from noise; with "
    "small batches AdamW comes closer. The runs are short, and a best rate is the one with the lowest mean "
    "train loss over the very seeds that are reported."
)


def main() -> None:
    """Run everything; figures go to the output directory, tables and sentences to the terminal."""
    options, start = parse(), time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    mpl.use("Agg")
    torch.set_num_threads(1)  # otherwise, waiting for a thread on a busy core would be timed as work
    options.output.mkdir(parents=True, exist_ok=True)
    tasks = [replace(task, steps=task.steps // 10) if options.quick else task for task in digits.TASKS]
    seeds, steps = (1, 60) if options.quick else (2, 300)
    trainings = [len(digits.plan(task)) * seeds for task in tasks]
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
        compared = {}
        for task in tasks:
            compared[task] = digits.compare(task, data, seeds, tracked)
            save(digits.draw(task, compared[task].tuned), options.output / f"{task.name}.png", console)
        save(digits.draw_all(compared), options.output / "digits.png", console)
        outcomes = quadratics.run(steps, tracked)
        save(quadratics.draw(outcomes), options.output / "quadratic.png", console)
        progress.update(bar, description="done")
    documented, tuned = ({task: own[place] for task, own in compared.items()} for place in range(2))
    console.print(
        losses_table(f"Handwritten digits, everyone's learning rate {digits.DOCUMENTED:g}", documented)
    )
    console.print(losses_table("The same, everyone's best learning rate of those tried", tuned))
    console.print(clock_table(tuned))
    console.print(quadratic_table(outcomes))
    sentences = []
    for task in tasks:
        sentences += verdict(task, compared[task])
    sentences += [*quadratic_verdict(outcomes), CAVEAT, advice(compared)]
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


def table_of(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table whose cells are never cut."""
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for heading in texts:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, no_wrap=True, justify="right")
    return table


def quadratic_table(outcomes: dict[str, Runs]) -> Table:
    """Runs that diverged, the loss at the end and the speed."""
    headings = ("diverged", "loss at the end", "steps to 1 %")
    table = table_of("Noisy quadratic, medians over the seeds", ("method",), headings)
    for method, outcome in outcomes.items():
        diverged = f"{outcome.diverged} of {quadratics.SEEDS}"
        numbers = (float(np.median(outcome.floor)), steps_to_hundredth(outcome))
        table.add_row(method, diverged, *(number_of(value) for value in numbers))
    return table


def steps_to_hundredth(outcome: Runs) -> float:
    """Median over the seeds of the steps to 1 % of the loss at the start; infinite if never."""
    return float(np.median(outcome.steps_to(0.01)))


def losses_table(title: str, summaries: dict[Task, dict[str, Summary]]) -> Table:
    """What every optimizer has reached on every task, means over the seeds."""
    headings = ("rate", "train loss", "test loss", "accuracy")
    table = table_of(title, ("task", "optimizer"), headings)
    for task, of_task in summaries.items():
        for name, summary in of_task.items():
            accuracy = f"{summary.mean('accuracy'):.1%}" if task.classifies else "-"
            rate = f"{summary.rate:g}" + ("*" if summary.at_edge else "")
            test = number_of(float(summary.mean("test_loss")))
            table.add_row(task.name, name, rate, number_of(final(summary)), test, accuracy)
        table.add_section()
    if any(summary.at_edge for of_task in summaries.values() for summary in of_task.values()):
        table.caption = "* the best learning rate is at an edge of those tried"
    return table


def clock_table(summaries: dict[Task, dict[str, Summary]]) -> Table:
    """How long every optimizer takes at its best learning rate."""
    title = f"By the clock, everyone's best learning rate; goal: {BASELINE}'s final train loss"
    table = table_of(title, ("task", "optimizer"), ("ms per step", "steps to goal", "s to goal"))
    for task, of_task in summaries.items():
        for name, summary in of_task.items():
            step = f"{1e3 * duration(summary) / task.steps:.1f}"
            table.add_row(task.name, name, step, *(number_of(value) for value in reached(of_task, name)))
        table.add_section()
    return table


def number_of(value: float) -> str:
    """Three digits, or a dash for what has never been reached."""
    return f"{value:.3g}" if np.isfinite(value) else "-"


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
    """Which methods stayed stable, how low they came to rest, and how fast."""
    stable = [method for method, outcome in outcomes.items() if not outcome.diverged]
    gone = "; ".join(f"{name}: {outcome.diverged}" for name, outcome in outcomes.items() if outcome.diverged)
    yield f"quadratic, diverged of {quadratics.SEEDS} runs: {gone or 'none'}; none of {', '.join(stable)}."
    floors = {method: float(np.median(outcomes[method].floor)) for method in stable}
    order = sorted(stable, key=floors.__getitem__)
    yield (
        "quadratic, loss in the last quarter where nothing diverged: "
        f"{', '.join(f'{method} {floors[method]:.3g}' for method in order)}."
    )
    order = sorted(stable, key=lambda method: steps_to_hundredth(outcomes[method]))
    speeds = ", ".join(f"{method} {text_of(steps_to_hundredth(outcomes[method]))}" for method in order)
    yield (
        f"quadratic, steps to 1 % of the start: {speeds}. Newton is told the whole "
        f"curvature, and the rate {quadratics.RATE} is 1 / the largest one, as gradient descent wants it."
    )


def verdict(task: Task, both: Compared) -> Iterator[str]:
    """Which optimizer won with the documented rate and with the best one, and by wall-clock time."""
    for words, summaries in (("untuned", both.documented), ("tuned", both.tuned)):
        losses = {name: final(summary) for name, summary in summaries.items()}
        order = sorted(losses, key=losses.__getitem__)
        told = ", ".join(f"{name} {number_of(losses[name])}" for name in order)
        yield f"{task.name}, {words}: train loss after {task.steps} steps: {told}."
    tuned = both.tuned
    times = {name: reached(tuned, name)[1] for name in tuned}
    order = sorted(times, key=times.__getitem__)
    yield (
        f"{task.name}, tuned, seconds to {BASELINE}'s final train loss: "
        f"{', '.join(f'{name} {text_of(times[name])}' for name in order)}; a step of {OURS} takes "
        f"{duration(tuned[OURS]) / duration(tuned[BASELINE]):.1f} times one of {BASELINE}."
    )
    tests = {name: float(summary.mean("test_loss")) for name, summary in tuned.items()}
    best = min(tests, key=tests.__getitem__)
    accuracy = most_accurate(task, tuned)
    yield f"{task.name}, tuned, held out: {best} has the lowest test loss, {tests[best]:.4g}{accuracy}."
    edges = [name for name, summary in tuned.items() if summary.at_edge]
    if edges:
        yield f"{task.name}: the best learning rate of {' and '.join(edges)} is at an edge of those tried."


def advice(compared: dict[Task, Compared]) -> str:
    """What to do, from what has been measured."""
    parts, first = [], []
    for task, both in compared.items():
        part = final(both.documented[OURS]) / final(both.documented[BASELINE])
        parts.append(f"{part:.2g}")
        times = {name: reached(both.tuned, name)[1] for name in both.tuned}
        first.append(f"{min(times, key=times.__getitem__)} on the {task.name}")
    return (
        f"What to do: put MLBFGS(model.parameters(), lr={digits.DOCUMENTED:g}) in {BASELINE}'s place and "
        f"keep your schedule; untuned it ended at {' and '.join(parts)} times {BASELINE}'s loss. If you "
        f"tune {BASELINE} anyway, compare by the clock: the first at its final loss was "
        f"{' and '.join(first)}."
    )


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
