"""The pictures of docs/results.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.claims import style

from . import timing
from .contestants import CONTESTANTS
from .goals import better_adamw, chosen, documented, final, geometric_mean, mean_curve, reach, title
from .problems import EQUATION, LARGE, SMALL, TASKS
from .search import BOTH, KRONECKER, OURS, Results

__all__ = ["draw", "save"]

COLOURS = {KRONECKER: style.GREEN, OURS: style.BLUE, "adamw": style.ORANGE}
THIN = {"soap": style.PURPLE, "muon": style.SKY, "kron": style.BLACK}
SUMMED = {
    "networks, small batches": (SMALL, "o"),
    "networks, large batches": (LARGE, "s"),
    "differential equations": (EQUATION, "^"),
}
COLUMNS = 4
LOW, HIGH = 0.02, 30.0

Ratio = Callable[[Results, str, str], float]
Curve = tuple[np.ndarray, np.ndarray]


def draw(results: Results, ratio: Ratio, own: Ratio) -> dict[str, Figure]:
    """Draw an overview, training loss by step and by time, and final losses relative to AdamW's.

    `ratio` is the final loss relative to AdamW's with tuned learning rates, `own` ours with the documented
    one.
    """
    style.setup()
    times = {task: timing.load(results.folder, task) for task in results.plan.tasks}

    def seconds(task: str, name: str) -> float:
        return times[task].get(name, {}).get("seconds", math.nan)

    def by_step(task: str, name: str) -> Curve | None:
        records = documented(results, task, name) if name in BOTH else results.tuned(task, name)
        return mean_curve(records) if records else None

    def by_time(task: str, name: str) -> Curve | None:
        curve = by_step(task, name)
        return curve and (curve[0] * seconds(task, name), curve[1])

    return {
        "overview": _overview(results, ratio, own),
        "steps": _panels(results, by_step, "gradients"),
        "seconds": _panels(results, by_time, "seconds"),
        "ratio": _dots(results, ratio),
    }


def save(figure: Figure, path: Path) -> None:
    """Write a figure at twice its size in pixels."""
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _overview(results: Results, ratio: Ratio, own: Ratio) -> Figure:
    """Geometric means of final losses, and how soon ours is at AdamW's."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), width_ratios=(3, 2), layout="constrained")
    _means(left, results, ratio, own)
    _soon(right, results)
    for axes in (left, right):
        axes.grid(axis="y", color="#F2F2F2")
        axes.tick_params(labelsize=9)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.06), ncols=2, fontsize=8)
    return figure


def _means(axes: Axes, results: Results, ratio: Ratio, own: Ratio) -> None:
    groups = {words: _of(results, group) for words, (group, _) in SUMMED.items()}
    means: dict[str, list[float]] = {}
    for name in results.plan.contestants:
        if CONTESTANTS[name].ours and name not in BOTH:
            continue
        loss = own if name in BOTH else ratio
        row = [geometric_mean([loss(results, task, name) for task in tasks]) for tasks in groups.values()]
        if not any(map(math.isnan, row)):
            means[name] = row
    order = sorted(means, key=lambda name: geometric_mean(means[name]), reverse=True)
    axes.axvline(1, color=style.BLACK, linewidth=0.8)
    for place, (words, (_, marker)) in enumerate(SUMMED.items()):
        for row, name in enumerate(order):
            value = means[name][place]
            colour = (COLOURS | THIN).get(name, style.GREY)
            shown = min(max(value, 1e-3), HIGH)
            axes.plot(shown, row, ">" if value > HIGH else marker, color=colour, markersize=7, zorder=3)
        axes.plot([], [], marker, color=style.GREY, label=words)
    labels = [CONTESTANTS[name].title + (", untuned" if name in BOTH else "") for name in order]
    axes.set_yticks(range(len(order)), labels)
    for label, name in zip(axes.get_yticklabels(), order, strict=True):
        label.set_fontweight("bold" if name in BOTH else "normal")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title("final training loss / the better tuned AdamW's", fontsize=9)


def _soon(axes: Axes, results: Results) -> None:
    tasks = [task for group, _ in SUMMED.values() for task in _of(results, group)][::-1]
    axes.axvline(100, color=style.BLACK, linewidth=0.8)
    for row, task in enumerate(tasks):
        ours = chosen(results, task)
        found = reach(results, task, ours, better_adamw(results, task))
        for value, marker in () if found is None else ((found.steps, "o"), (found.time, "D")):
            if not math.isnan(value):
                shown = ">" if value > 2 else marker
                axes.plot(min(100 * value, 200), row, shown, color=COLOURS[ours], markersize=6)
    for name in BOTH:
        axes.plot([], [], "s", color=COLOURS[name], label=CONTESTANTS[name].title)
    axes.plot([], [], "o", color=style.GREY, label="steps")
    axes.plot([], [], "D", color=style.GREY, label="time")
    axes.set_yticks(range(len(tasks)), [title(task) for task in tasks])
    axes.set_xlim(0, 205)
    axes.set_ylim(-0.6, len(tasks) - 0.4)
    axes.set_title("% of AdamW's run to its final loss, untuned", fontsize=9)


def _of(results: Results, group: str) -> list[str]:
    """The tasks of a group, of the first sixteen."""
    return [task for task in results.plan.tasks if TASKS[task].group == group and not TASKS[task].later]


def _panels(results: Results, curve: Callable[[str, str], Curve | None], unit: str) -> Figure:
    """One panel for each task with curves: the mean training loss over the seeds against steps or seconds."""
    order = sorted(results.plan.contestants, key=lambda name: (name in COLOURS, name in BOTH))
    drawn = {
        task: {name: found for name in order if (found := curve(task, name)) is not None and found[0][-1] > 0}
        for task in results.plan.tasks
    }
    drawn = {task: curves for task, curves in drawn.items() if curves}
    columns = min(COLUMNS, len(drawn)) or 1
    rows = math.ceil(len(drawn) / columns) or 1
    figure, axes = plt.subplots(
        rows, columns, figsize=(11, 0.6 + 2.1 * rows), layout="constrained", squeeze=False
    )
    for panel in axes.flat[len(drawn) :]:
        panel.axis("off")
    for (task, curves), panel in zip(drawn.items(), axes.flat, strict=False):
        for name, (x, loss) in curves.items():
            panel.plot(x, loss, **_line(name))
        named = [found for name, found in curves.items() if name in COLOURS | THIN] or list(curves.values())
        if (adamw := better_adamw(results, task)) is not None:
            level = final(results, task, adamw)
            panel.axhline(level, color=style.ORANGE, linewidth=0.6, linestyle=":")
        end, losses = max(x[-1] for x, _ in named), np.concatenate([loss for _, loss in named])
        _limits(panel, end, list(losses[np.isfinite(losses)]))
        panel.set_title(title(task), fontsize=8)
        panel.tick_params(which="both", labelsize=8)
        panel.yaxis.set_minor_formatter("")
    figure.supxlabel(unit, fontsize=9)
    figure.supylabel("training loss", fontsize=9)
    _legend(figure, results.plan.contestants)
    return figure


def _limits(panel: Axes, end: float, losses: list[float]) -> None:
    panel.set_yscale("log")
    if losses:
        panel.set_xlim(0, end * 1.02)
        panel.set_ylim(min(losses) / 1.6, max(losses) * 1.3)


def _line(name: str) -> dict[str, Any]:
    if name in COLOURS:
        return {"color": COLOURS[name], "linewidth": 1.8, "zorder": 4 if name in BOTH else 3}
    if name in THIN:
        return {"color": THIN[name], "linewidth": 1.0, "zorder": 2.5}
    return {"color": style.GREY, "linewidth": 0.6, "alpha": 0.6, "zorder": 2}


def _legend(figure: Figure, contestants: Collection[str]) -> None:
    named = [name for name in (*COLOURS, *THIN) if name in contestants]
    handles = [Line2D([], [], **_line(name)) for name in (*named, "")]
    labels = [*(CONTESTANTS[name].title for name in named), "the others"]
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=9)


def _dots(results: Results, ratio: Ratio) -> Figure:
    """Final training loss relative to the better AdamW's, one row for each task."""
    tasks = results.plan.tasks[::-1]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.32 * len(tasks)), layout="constrained")
    axes.axvline(1, color=style.BLACK, linewidth=0.8)
    for row, task in enumerate(tasks):
        for name in results.plan.contestants:
            value = ratio(results, task, name)
            if math.isnan(value):
                continue
            outside = not LOW <= value <= HIGH
            colour = (COLOURS | THIN).get(name, style.GREY)
            axes.plot(
                min(max(value, LOW), HIGH),
                row,
                marker=(">" if value > HIGH else "<") if outside else "o",
                markersize=8 if name in COLOURS else 5,
                markerfacecolor=colour if name in COLOURS or outside else "white",
                markeredgecolor="white" if name in COLOURS else colour,
                zorder=5 if name in BOTH else 4 if name in COLOURS else 3,
                clip_on=False,
            )
    axes.set_xscale("log")
    axes.set_xlim(LOW, HIGH)
    axes.set_yticks(range(len(tasks)), [title(task) for task in tasks])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("final training loss / that of the better AdamW (arrows: beyond the axis, or diverged)")
    axes.grid(axis="y", color="#F2F2F2")
    handles = [Line2D([], [], color=colour, marker="o", linestyle="") for colour in COLOURS.values()]
    handles += [
        Line2D([], [], markeredgecolor=colour, markerfacecolor="white", marker="o", linestyle="")
        for colour in (*THIN.values(), style.GREY)
    ]
    labels = [*(CONTESTANTS[name].title for name in (*COLOURS, *THIN)), "the others"]
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=9)
    return figure
