"""The pictures of docs/results.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
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
from .goals import better_adamw, budgets, mean_curve, mean_final, title
from .problems import TASKS
from .search import Results

__all__ = ["draw", "save"]

COLOURS = {"mlbfgs": style.BLUE, "adamw": style.ORANGE, "sgd": style.GREEN}
THIN = {"soap": style.PURPLE, "muon": style.SKY, "kron": style.BLACK}
COLUMNS = 4
LOW, HIGH = 0.02, 30.0

Ratio = Callable[[Results, str, str], float]
Curve = tuple[np.ndarray, np.ndarray]


def draw(results: Results, ratio: Ratio) -> dict[str, Figure]:
    """Draw training loss by step and by time, and final losses by the time of a run and relative to
    AdamW's."""
    style.setup()
    times = {task: timing.load(results.folder, task) for task in results.plan.tasks}

    def seconds(task: str, name: str) -> float:
        return times[task].get(name, {}).get("seconds", math.nan)

    def by_step(task: str, name: str) -> Curve | None:
        records = results.tuned(task, name)
        return mean_curve(records) if records else None

    def by_time(task: str, name: str) -> Curve | None:
        curve = by_step(task, name)
        return curve and (curve[0] * seconds(task, name), curve[1])

    def by_budget(task: str, name: str) -> Curve:
        parts, losses = budgets(results, task, name)
        return parts * TASKS[task].steps * seconds(task, name), losses

    shorter = Results(replace(results.plan, contestants=results.plan.shortened), results.folder)
    return {
        "steps": _panels(results, by_step, "gradients"),
        "seconds": _panels(results, by_time, "seconds"),
        "budgets": _panels(shorter, by_budget, "seconds of the whole run", marker="o", markersize=3),
        "ratio": _dots(results, ratio),
    }


def save(figure: Figure, path: Path) -> None:
    """Write a figure at twice its size in pixels."""
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _panels(results: Results, curve: Callable[[str, str], Curve | None], unit: str, **line: Any) -> Figure:
    """One panel for each task: the mean training loss over the seeds against steps or seconds."""
    columns = min(COLUMNS, len(results.plan.tasks))
    rows = math.ceil(len(results.plan.tasks) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(11, 0.6 + 2.1 * rows), layout="constrained", squeeze=False
    )
    for panel in axes.flat[len(results.plan.tasks) :]:
        panel.axis("off")
    for task, panel in zip(results.plan.tasks, axes.flat, strict=False):
        end, losses = 0.0, []
        for name in sorted(results.plan.contestants, key=lambda name: (name in COLOURS, name == "mlbfgs")):
            drawn = curve(task, name)
            if drawn is None:
                continue
            x, loss = drawn
            panel.plot(x, loss, **_line(name), **line)
            if name in COLOURS | THIN:
                end = np.nanmax([end, x[-1]])
                losses += list(loss[np.isfinite(loss)])
        if (adamw := better_adamw(results, task)) is not None:
            level = mean_final(results.tuned(task, adamw))
            panel.axhline(level, color=style.ORANGE, linewidth=0.6, linestyle=":")
        _limits(panel, end, losses)
        panel.set_title(title(task), fontsize=8)
        panel.tick_params(which="both", labelsize=8)
    figure.supxlabel(unit, fontsize=9)
    figure.supylabel("training loss", fontsize=9)
    _legend(figure, results.plan.contestants)
    return figure


def _limits(panel: Axes, end: float, losses: list[float]) -> None:
    panel.set_yscale("log")
    if losses:
        panel.set_xlim(0, end * 1.02 if end else None)
        panel.set_ylim(min(losses) / 1.6, max(losses) * 1.3)


def _line(name: str) -> dict[str, Any]:
    if name in COLOURS:
        return {"color": COLOURS[name], "linewidth": 1.8, "zorder": 4 if name == "mlbfgs" else 3}
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
                zorder=5 if name == "mlbfgs" else 4 if name in COLOURS else 3,
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
