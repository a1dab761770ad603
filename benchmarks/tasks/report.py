"""The tables and pictures of docs/results.md, and a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from . import figures, timing
from .contestants import CONTESTANTS, rate
from .goals import better_adamw, goals, mean_final, mean_test, reaches, title
from .problems import TASKS
from .search import OURS, Results, interior

__all__ = ["goals_text", "rates_text", "show", "variants", "write"]

DOCS = Path(__file__).parents[2] / "docs"
NONE = "\N{EN DASH}"


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


def table(
    results: Results,
    value: Callable[[str, str], float],
    *,
    bold: bool = True,
    form: Callable[[float], str] = number,
) -> list[list[str]]:
    """A table with a row for each task and a column for each contestant, the lowest of each row in bold."""
    rows = [["task", *(CONTESTANTS[name].title for name in results.plan.contestants)]]
    for task in results.plan.tasks:
        values = [value(task, name) for name in results.plan.contestants]
        least = min((v for v in values if math.isfinite(v)), default=None)
        cells = [f"**{form(v)}**" if bold and v == least else form(v) for v in values]
        rows.append([title(task), *cells])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is words and whose others are numbers."""
    head, *body = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def final(results: Results, task: str, contestant: str) -> float:
    """Final training loss at the tuned learning rate; infinite if every rate diverged."""
    losses = results.losses(task, contestant)
    if losses and all(map(math.isinf, losses.values())):
        return math.inf
    return mean_final(results.tuned(task, contestant))


def ratio(results: Results, task: str, contestant: str) -> float:
    """Final training loss relative to the better AdamW's."""
    adamw = better_adamw(results, task)
    return math.nan if adamw is None else final(results, task, contestant) / final(results, task, adamw)


def goals_text(results: Results) -> str:
    """Table of our default settings against AdamW, and the goals."""
    found = reaches(results)
    rows = [
        ["task", "final loss / AdamW's", "seed by seed", "steps", "time", "planned steps", "planned time"]
    ]
    for entry in found:
        spread = "\N{EN DASH}".join(map(number, entry.spread))
        reached = [
            percent(part * cost) for part in (entry.steps, entry.planned) for cost in (1.0, entry.cost)
        ]
        rows.append([title(entry.task), f"{entry.ratio:.4g}", spread, *reached])
    verdicts = [
        f"- {goal.words}: {goal.count}, **{'met' if goal.met else 'not met'}**" for goal in goals(found)
    ]
    about = "Goals, counted over those of the 10 tasks without a large batch whose runs are complete:"
    return "\n\n".join([markdown(rows), _note(results), about, "\n".join(verdicts)])


def rates_text(results: Results) -> str:
    """Table of the chosen learning rates."""
    rows = [["task", *(CONTESTANTS[name].title for name in results.plan.contestants)]]
    rows += [
        [title(t), *(_rates(results, t, name) for name in results.plan.contestants)]
        for t in results.plan.tasks
    ]
    about = (
        "The best learning rate (how many were tried, the largest of them). ‡: the best is the lowest or the "
        f"highest of those that were tried. {NONE}: all diverged."
    )
    return f"{markdown(rows)}\n\n{about}"


def _rates(results: Results, task: str, contestant: str) -> str:
    losses, best = results.losses(task, contestant), results.best(task, contestant)
    if not losses:
        return ""
    tried = f"({len(losses)}, {rate(max(losses)):.2g})"
    if best is None:
        return f"{NONE} {tried}" if all(map(math.isinf, losses.values())) else ""
    return f"{rate(best):.2g}{'' if interior(losses) else ' ‡'} {tried}"


def cost_text(results: Results) -> str:
    """Tables of milliseconds, of the time relative to AdamW's, and of memory."""
    times = {task: timing.load(results.folder, task) for task in results.plan.tasks}

    def timed(task: str, name: str, part: str) -> float:
        return times[task].get(name, {}).get(part, math.nan)

    def relative(task: str, name: str) -> float:
        return timed(task, name, "seconds") / timed(task, "adamw", "seconds")

    def share(task: str, name: str) -> float:
        return timed(task, name, "optimizer") / timed(task, name, "seconds")

    def memory(task: str, name: str) -> float:
        records = results.tuned(task, name)
        return records[0].state_bytes / records[0].parameters if records else math.nan

    parts = [
        (
            "Milliseconds for a gradient and the step with it:",
            lambda t, n: 1e3 * timed(t, n, "seconds"),
            number,
        ),
        ("The same in parts of AdamW's:", relative, number),
        ("The optimizer's own share of it:", share, percent),
        ("Bytes that the optimizer holds for each parameter:", memory, number),
    ]
    texts = [
        f"{words}\n\n{markdown(table(results, value, bold=False, form=form))}" for words, value, form in parts
    ]
    return "\n\n".join(texts)


def one_text(results: Results) -> str:
    """Tables of one learning rate for all tasks: the documented one, and the best one."""
    texts = []
    for words, choice in (
        ("The learning rate that each documents (the nearest of the grid):", results.documented),
        ("The learning rate that is best over the tasks that are not held out:", results.shared),
    ):
        chosen = {name: choice(name) for name in results.plan.contestants}
        texts += [words, markdown(_one(results, chosen))]
    return "\n\n".join([*texts, _note(results)])


def _one(results: Results, chosen: dict[str, int | None]) -> list[list[str]]:
    """Final training loss with one exponent each, relative to the better tuned AdamW's."""

    def value(task: str, name: str) -> float:
        exponent, adamw = chosen[name], better_adamw(results, task)
        if exponent is None or adamw is None:
            return math.nan
        return mean_final(results.seeds(task, name, exponent)) / final(results, task, adamw)

    rows = table(results, value)
    shown = ["" if exponent is None else f"{rate(exponent):.2g}" for exponent in chosen.values()]
    means = [
        (words, [_geometric_mean([value(task, name) for task in tasks]) for name in chosen])
        for words, tasks in (
            ("geometric mean, not held out", results.plan.seen),
            ("geometric mean, held out †", [t for t in results.plan.tasks if TASKS[t].held_out]),
        )
    ]
    return [rows[0], ["learning rate", *shown], *rows[1:], *([words, *map(number, m)] for words, m in means)]


def _geometric_mean(values: Sequence[float]) -> float:
    if not values or any(map(math.isnan, values)):
        return math.nan
    return math.exp(fmean(map(math.log, values))) if all(map(math.isfinite, values)) else math.inf


def _note(results: Results) -> str:
    held_out = any(TASKS[task].held_out for task in results.plan.tasks)
    return "† Held out: not used in choosing default settings." if held_out else ""


def variants(results: Results) -> list[Results]:
    """The default and its variants on one seed: all of them on the tasks that are not held out; and the one
    without pairs with large batches, which played no part in choosing anything."""
    seen = tuple(task for task in results.plan.seen if TASKS[task].base is None)
    large = tuple(task for task in results.plan.tasks if TASKS[task].base is not None)
    changed = tuple(name for name, entry in CONTESTANTS.items() if entry.variant)
    plan = replace(results.plan, seeds=1, one_setting=False, percents=())
    return [
        Results(replace(plan, tasks=tasks, contestants=(OURS, *names)), results.folder)
        for tasks, names in ((seen, changed), (large, ("mlbfgs_no_pairs",)))
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
        rows.append([CONTESTANTS[name].title, *map(number, [*values, _geometric_mean(values)])])
    return rows


def contestants_text(results: Results) -> str:
    """Table that describes the contestants."""
    rows = [["name", "what it is"]]
    for name in results.plan.contestants:
        entry = CONTESTANTS[name]
        rows.append([f"[{entry.title}]({entry.source})", entry.note])
    return markdown(rows).replace("---:", "---")


def write(results: Results) -> None:
    """Write the tables and pictures of docs/results.md, leaving out contestants that have not run."""
    ran = tuple(name for name in results.plan.contestants if _has_run(results, name))
    results = Results(replace(results.plan, contestants=ran), results.folder)
    note = f"\n\n{_note(results)} {NONE}: diverged, at every learning rate or at one of the seeds."
    texts = {
        "tuned": markdown(table(results, lambda t, n: final(results, t, n))) + note,
        "ratio": markdown(table(results, lambda t, n: ratio(results, t, n))) + note,
        "test": markdown(table(results, lambda t, n: mean_test(results.tuned(t, n)))) + note,
        "goals": goals_text(results),
        "rates": rates_text(results),
        "cost": cost_text(results),
        "one": one_text(results),
        "contestants": contestants_text(results),
    }
    if any(_has_run(part, name) for part in variants(results) for name in part.plan.contestants[1:]):
        texts["variants"] = variants_text(results)
    for name, text in texts.items():
        path = DOCS / "_generated" / f"tasks_{name}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
        print(f"wrote {path.relative_to(DOCS.parent)}")
    for name, figure in figures.draw(results, ratio).items():
        path = DOCS / "_static" / f"tasks_{name}.png"
        path.parent.mkdir(exist_ok=True)
        figures.save(figure, path)
        print(f"wrote {path.relative_to(DOCS.parent)}")


def _has_run(results: Results, contestant: str) -> bool:
    return any(results.tuned(task, contestant) for task in results.plan.tasks)


def show(results: Results) -> None:
    """Print the final training losses and the goals."""
    console = Console()
    rows = table(results, lambda t, n: final(results, t, n))
    shown = Table(title="final training loss, each at its best learning rate")
    for number_, heading in enumerate(rows[0]):
        shown.add_column(heading, justify="right" if number_ else "left")
    for row in rows[1:]:
        shown.add_row(*(f"[bold]{cell.strip('*')}[/]" if cell.startswith("**") else cell for cell in row))
    console.print(shown)
    found = reaches(results)
    for entry in found:
        steps, seconds = percent(entry.steps), percent(entry.steps * entry.cost) or "unknown"
        console.print(
            f"{TASKS[entry.task].title}: {number(entry.ratio)} times AdamW's final loss; "
            f"to reach that: {steps} of AdamW's steps, {seconds} of its time"
        )
    if sum(TASKS[entry.task].base is None for entry in found) == 10:
        for goal in goals(found):
            console.print(f"{'met' if goal.met else 'NOT MET'}: {goal.words} ({goal.count})")
