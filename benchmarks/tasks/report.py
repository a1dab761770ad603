"""The tables and pictures of docs/results.md, and the goals for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from . import archive, figures, timing
from .contestants import CONTESTANTS, rate
from .goals import (
    AFFORDABLE,
    Goal,
    adamw_loss,
    better_adamw,
    chosen,
    documented,
    final,
    geometric_mean,
    goals,
    mean_final,
    one_rate,
    planned,
    reach,
    shared_mean,
    title,
)
from .problems import FIXED, GROUPS, LARGE, TASKS
from .runs import identity
from .search import BOTH, KRONECKER, OURS, SOAP, Results, interior

__all__ = ["goals_text", "keep", "rates_text", "show", "texts", "variants", "write"]

DOCS = Path(__file__).parents[2] / "docs"
NONE, EARLIER = "\N{EN DASH}", " °"
Value = Callable[[str, str], float]


def number(value: float) -> str:
    """A number with three digits; a dash if it is not finite, nothing if it is not known."""
    if math.isnan(value):
        return ""
    return f"{value:.3g}" if math.isfinite(value) else NONE


def percent(value: float) -> str:
    """A fraction in percent; "never" if it is infinite, nothing if it is not known."""
    if math.isnan(value):
        return ""
    return f"{100 * value:.0f}%" if math.isfinite(value) else "never"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is words and whose others are numbers."""
    head, *body = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(
    results: Results,
    tasks: Sequence[str],
    value: Value,
    *,
    bold: bool = True,
    mean: bool = False,
) -> list[list[str]]:
    """A row for each contestant that has a value, a column for each task, the lowest of each in bold.

    `mean` adds the geometric mean of a row that is complete.
    """
    names = [n for n in results.plan.contestants if not all(math.isnan(value(t, n)) for t in tasks)]
    values = {name: [value(task, name) for task in tasks] for name in names}
    heads = ["", *map(title, tasks)]
    if mean:
        values = {name: [*row, geometric_mean(row)] for name, row in values.items()}
        heads.append("geometric mean")
    least = [
        min(filter(math.isfinite, column), default=None) for column in zip(*values.values(), strict=True)
    ]
    rows = [heads]
    for name, row in values.items():
        cells = [
            f"**{number(v)}**" if bold and v == low else number(v) for v, low in zip(row, least, strict=True)
        ]
        rows.append([_named(results, tasks, name), *cells])
    return rows


def _named(results: Results, tasks: Sequence[str], name: str) -> str:
    """A contestant's title, marked if some of its values are of an earlier comparison."""
    known = results.earlier(name, "finals")
    marked = any(task in known and not results.tuned(task, name) for task in tasks)
    tuned = ", tuned" if name in BOTH else ""
    return CONTESTANTS[name].title + tuned + (EARLIER if marked else "")


def grouped(results: Results, write_group: Callable[[list[str]], str]) -> str:
    """A text for each group of tasks, under its name."""
    parts = []
    for group in GROUPS:
        if tasks := [task for task in results.plan.tasks if TASKS[task].group == group]:
            parts += [f"**{group}**", write_group(tasks)]
    return "\n\n".join(parts)


def ratio(results: Results, task: str, contestant: str) -> float:
    """Final training loss relative to the better AdamW's."""
    return final(results, task, contestant) / adamw_loss(results, task)


def documented_ratio(results: Results, task: str, ours: str) -> float:
    """The same for one of ours at its documented learning rate."""
    return mean_final(documented(results, task, ours)) / adamw_loss(results, task)


def ratios_text(results: Results) -> str:
    """Final training losses relative to the better AdamW's, and AdamW's own."""

    def group(tasks: list[str]) -> str:
        rows = table(results, tasks, lambda task, name: ratio(results, task, name), mean=True)
        ours = [
            [
                f"{CONTESTANTS[name].title}, {rate(results.documented(name)):.2g}",
                *(number(documented_ratio(results, task, name)) for task in tasks),
                number(geometric_mean([documented_ratio(results, task, name) for task in tasks])),
            ]
            for name in BOTH
            if name in results.plan.contestants
        ]
        losses = [adamw_loss(results, task) for task in tasks]
        return markdown([*rows, *ours, ["AdamW's loss", *map(number, losses), ""]])

    return f"{grouped(results, group)}\n\n{_note()}"


def test_text(results: Results) -> str:
    """Test losses at the learning rate with the best training loss."""

    def test(task: str, name: str) -> float:
        if runs := results.tuned(task, name):
            return fmean(record.final_test for record in runs)
        return results.earlier(name, "tests").get(task, math.nan)

    return f"{grouped(results, lambda tasks: markdown(table(results, tasks, test)))}\n\n{_note()}"


def goals_text(results: Results) -> str:
    """The goals, counted over the first sixteen tasks and over those that came later."""
    first, later = _first_and_later(results)
    texts = [
        f"Over {len(first)} tasks, with each preconditioner at its documented learning rate:",
        markdown(_goals(goals(results, first))),
        _planned_words(results, first),
    ]
    if later:
        texts += [
            f"The same counts over the {len(later)} tasks that came later, for which no goals were set:",
            markdown(_goals(goals(results, later)[:6], verdict=False)),
        ]
    return "\n\n".join(texts)


def _planned_words(results: Results, tasks: Sequence[str]) -> str:
    """How often runs of Kronecker that are planned for fewer steps end at AdamW's loss."""
    found = [
        (planned(results, task, KRONECKER, adamw_loss(results, task)), entry.cost)
        for task in tasks
        if (entry := reach(results, task, KRONECKER, better_adamw(results, task))) is not None
    ]
    parts = [(part, cost) for part, cost in found if not math.isnan(part)]
    times = [part * cost for part, cost in parts if not math.isnan(cost)]
    early = sum(part <= 0.6 for part, _ in parts)
    return (
        "In runs of Kronecker planned for their length, with the learning rate at zero at their end, AdamW's "
        f"final loss takes at most 60% of its steps on {early} of {len(parts)}, "
        f"and less time on {sum(time < 1 for time in times)} of {len(times)}."
    )


def _first_and_later(results: Results) -> tuple[list[str], list[str]]:
    """The tasks over which the goals count, and those that came later; points that stay do not count."""
    tasks = results.plan.tasks
    return [t for t in tasks if not TASKS[t].later], [
        t for t in tasks if TASKS[t].later and TASKS[t].group != FIXED
    ]


def _goals(found: Sequence[Goal], *, verdict: bool = True) -> list[list[str]]:
    rows = [["goal" if verdict else "count", "diagonal", "Kronecker", "by the rule"]]
    for goal in found:
        words = goal.words if verdict else goal.words.split(" on at least")[0].rstrip(",")
        rows.append([f"{words}: **{'met' if goal.met else 'not met'}**" if verdict else words, *goal.counts])
    return rows


def reach_text(results: Results) -> str:
    """How soon each of ours, at its documented rate, is at the final loss of AdamW and of SOAP."""
    rows = [
        [
            "",
            "diagonal, to AdamW's: steps",
            "time",
            "Kronecker, to AdamW's: steps",
            "time",
            "planned",
            "Kronecker, to SOAP's: steps",
            "time",
            "by the rule",
        ]
    ]
    for task in results.plan.tasks:
        adamw = better_adamw(results, task)
        found = [
            reach(results, task, OURS, adamw),
            *(reach(results, task, KRONECKER, o) for o in (adamw, SOAP)),
        ]
        if all(entry is None for entry in found):
            continue
        cells = [
            percent(part)
            for entry in found
            for part in ((math.nan, math.nan) if entry is None else (entry.steps, entry.time))
        ]
        cells.insert(4, percent(planned(results, task, KRONECKER, adamw_loss(results, task))))
        timed = found[1] is not None and not math.isnan(found[1].cost)
        choice = {OURS: "diagonal", KRONECKER: "Kronecker"}[chosen(results, task)] if timed else ""
        rows.append([title(task), *cells, choice])
    words = (
        "The rule chooses Kronecker where a gradient and a step with it take at most "
        f"{AFFORDABLE:g} times as long as with the diagonal. *Planned*: the shortest run of Kronecker whose "
        "learning rate is zero at its end, and that ends at AdamW's loss (one seed; 25% is the shortest that "
        "was tried)."
    )
    return f"{markdown(rows)}\n\n{words}"


def rates_text(results: Results) -> str:
    """Tables of the chosen learning rates."""

    def group(tasks: list[str]) -> str:
        rows = [["", *map(title, tasks)]]
        for name in results.plan.contestants:
            cells = [_rates(results, task, name) for task in tasks]
            if any(cells):
                rows.append([CONTESTANTS[name].title, *cells])
        return markdown(rows)

    about = (
        "The best learning rate (how many were tried, the largest of them). ‡: the best is the lowest or the "
        f"highest of those that were tried. °: found earlier, of at least five. {NONE}: all diverged."
    )
    return f"{grouped(results, group)}\n\n{about}"


def _rates(results: Results, task: str, contestant: str) -> str:
    if task in (known := results.earlier(contestant, "rates")):
        return f"{rate(round(known[task])):.2g}{EARLIER}"
    losses, best = results.losses(task, contestant), results.best(task, contestant)
    if not losses:
        return ""
    tried = f"({len(losses)}, {rate(max(losses)):.2g})"
    if best is None:
        return f"{NONE} {tried}" if all(map(math.isinf, losses.values())) else ""
    return f"{rate(best):.2g}{'' if interior(losses) else ' ‡'} {tried}"


def cost_text(results: Results) -> str:
    """Tables of milliseconds and of memory."""
    times = {task: timing.load(results.folder, task) for task in results.plan.tasks}

    def milliseconds(task: str, name: str) -> float:
        return 1e3 * times[task].get(name, {}).get("seconds", math.nan)

    def memory(task: str, name: str) -> float:
        records = results.tuned(task, name)
        return records[0].state_bytes / records[0].parameters if records else math.nan

    def text(of: Results, value: Value) -> str:
        return grouped(of, lambda tasks: markdown(table(of, tasks, value, bold=False)))

    small = tuple(task for task in results.plan.tasks if TASKS[task].group != LARGE)
    return "\n\n".join(
        [
            "Milliseconds for a gradient and the step with it:",
            text(results, milliseconds),
            "Bytes that the optimizer holds for each parameter, with its working memory (64 of the default's "
            "are state):",
            text(replace(results, plan=replace(results.plan, tasks=small)), memory),
        ]
    )


def one_text(results: Results) -> str:
    """Geometric means with one learning rate for all tasks."""
    rows = [["", "learning rate", "geometric mean, not held out", "geometric mean, held out †"]]
    found = []
    for name in results.plan.contestants:
        exponent = one_rate(results, name)
        means = [shared_mean(results, name, held_out=held_out) for held_out in (False, True)]
        if not all(map(math.isnan, means)) and (name in BOTH or not CONTESTANTS[name].ours):
            shown = "" if exponent is None else f"{rate(exponent):.2g}"
            found.append((means[0], [CONTESTANTS[name].title, shown, *map(number, means)]))
    found.sort(key=lambda entry: math.inf if math.isnan(entry[0]) else entry[0])
    return markdown([*rows, *(row for _, row in found)])


def _note() -> str:
    return (
        "† Held out: not used in choosing default settings. ° Some figures from an earlier comparison, mean "
        f"of three seeds. {NONE}: diverged, at every learning rate or at one of the seeds."
    )


def variants(results: Results) -> list[Results]:
    """The default and its variants on one seed: all of them on the tasks that are not held out; and the one
    without pairs with large batches, which played no part in choosing anything."""
    large = tuple(task for task in results.plan.tasks if TASKS[task].group == LARGE)
    changed = tuple(name for name, entry in CONTESTANTS.items() if entry.variant)
    plan = replace(results.plan, seeds=1, one_setting=False, percents=())
    return [
        replace(results, plan=replace(plan, tasks=tasks, contestants=(OURS, *names)))
        for tasks, names in ((results.plan.seen, changed), (large, ("mlbfgs_no_pairs",)))
        if tasks
    ]


def variants_text(results: Results) -> str:
    """Tables of the default's variants: final training losses relative to the default's."""
    return "\n\n".join(markdown(_variants(part)) for part in variants(results))


def _variants(results: Results) -> list[list[str]]:
    tasks, (ours, *names) = results.plan.tasks, results.plan.contestants
    rows = [["the default with", *map(title, tasks), "geometric mean"]]
    for name in names:
        values = [final(results, task, name) / final(results, task, ours) for task in tasks]
        rows.append([CONTESTANTS[name].title, *map(number, [*values, geometric_mean(values)])])
    return rows


def contestants_text(results: Results) -> str:
    """Table that describes the contestants."""
    rows = [["name", "what it is"]]
    for name in results.plan.contestants:
        entry = CONTESTANTS[name]
        rows.append([f"[{entry.title}]({entry.source})", entry.note])
    return markdown(rows).replace("---:", "---")


def keep(results: Results) -> None:
    """Add the runs to those that the repository keeps."""
    names = results.plan.contestants
    for task in results.plan.tasks:
        used = {
            (name, exponent)
            for name in names
            for exponent in (results.best(task, name), results.documented(name))
            if exponent is not None
        }
        identities = {name: identity(task, name) for name in names}
        archive.keep(results.folder, task, used, identities, again=results.again)


def write(results: Results) -> None:
    """Write the tables and pictures of docs/results.md."""
    results = _of_those_that_ran(results)
    for name, text in texts(results).items():
        path = DOCS / "_generated" / f"tasks_{name}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
        print(f"wrote {path.relative_to(DOCS.parent)}")
    for name, figure in figures.draw(results, ratio, documented_ratio).items():
        path = DOCS / "_static" / f"tasks_{name}.png"
        path.parent.mkdir(exist_ok=True)
        figures.save(figure, path)
        print(f"wrote {path.relative_to(DOCS.parent)}")


def texts(results: Results) -> dict[str, str]:
    """The tables of docs/results.md by name."""
    results = _of_those_that_ran(results)
    found = {
        "ratio": ratios_text(results),
        "test": test_text(results),
        "goals": goals_text(results),
        "reach": reach_text(results),
        "rates": rates_text(results),
        "cost": cost_text(results),
        "one": one_text(results),
        "contestants": contestants_text(results),
    }
    if any(_has_run(part, name) for part in variants(results) for name in part.plan.contestants[1:]):
        found["variants"] = variants_text(results)
    return found


def _of_those_that_ran(results: Results) -> Results:
    """The results without contestants that have no runs."""
    ran = tuple(name for name in results.plan.contestants if _has_run(results, name))
    return replace(results, plan=replace(results.plan, contestants=ran))


def _has_run(results: Results, contestant: str) -> bool:
    return bool(results.earlier(contestant, "finals")) or any(
        results.tuned(task, contestant) for task in results.plan.tasks
    )


def show(results: Results) -> None:
    """Print the final training losses and the goals."""
    console = Console()
    tasks = results.plan.tasks
    rows = table(results, tasks, lambda task, name: final(results, task, name))
    shown = Table(title="final training loss, each at its best learning rate")
    for place, heading in enumerate(rows[0]):
        shown.add_column(heading, justify="right" if place else "left")
    for row in rows[1:]:
        shown.add_row(*(f"[bold]{cell.strip('*')}[/]" if cell.startswith("**") else cell for cell in row))
    console.print(shown)
    for task in tasks:
        for ours in (name for name in BOTH if name in results.plan.contestants):
            if (found := reach(results, task, ours, better_adamw(results, task))) is not None:
                console.print(
                    f"{TASKS[task].title}, {CONTESTANTS[ours].title} at {rate(results.documented(ours)):g}: "
                    f"{number(found.ratio)} times the better AdamW's final loss; to reach that: "
                    f"{percent(found.steps)} of AdamW's steps, "
                    f"{percent(found.time) or 'unknown'} of its time"
                )
    if set(_first_and_later(results)[0]) == {task for task in TASKS if not TASKS[task].later}:
        for goal in goals(results, _first_and_later(results)[0]):
            console.print(
                f"{'met' if goal.met else 'NOT MET'}: {goal.words} ({', '.join(filter(None, goal.counts))})"
            )
