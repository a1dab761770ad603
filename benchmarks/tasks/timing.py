"""Seconds of a step: the contestants take turns in one process, on one thread."""

from __future__ import annotations

import contextlib
import math
import platform
import time
import warnings
from itertools import count
from pathlib import Path
from statistics import median

import torch
from rich.progress import track

from . import archive
from .contestants import CONTESTANTS, rate
from .problems import TASKS, available
from .runs import identity, write_json
from .search import Results
from .training import Trainer

__all__ = ["compare", "load", "measure"]

VISIT, VISITS, SAMPLES, LIMIT = 5, 10, 3, 3.0
"""Gradients in a turn; turns in a sample, if there is time for this many, which is enough to include what
happens only at every tenth or fiftieth step; smallest number of samples; seconds for each contestant on a
task."""


def measure(results: Results) -> None:
    """Time all contestants on each task, and write a file for each; tasks with a valid file are skipped."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    missing = [t for t in results.plan.tasks if available(t) and not _complete(t, results)]
    for task in track(missing, description="step times"):
        rates = {name: _rate(results, task, name) for name in _able(task, results)}
        content = {
            "processor": platform.processor() or platform.machine(),
            "identity": {name: identity(task, name) for name in rates},
            "times": compare(task, rates),
        }
        write_json(_path(results.folder, task), content)


def compare(task: str, rates: dict[str, float], limit: float = LIMIT) -> dict[str, dict[str, float]]:
    """Median seconds per gradient, in total and within the optimizer, over samples of up to 50 gradients.

    Parameters
    ----------
    task : str
    rates : dict
        Learning rate of each contestant.
    limit : float
        Seconds for each contestant; if they are few, samples are short.
    """
    trainers = {
        name: Trainer(TASKS[task].make(0), CONTESTANTS[name], lr, 10**6) for name, lr in rates.items()
    }
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in rates}
    for trainer in trainers.values():  # the first steps allocate
        _visit(trainer)
    start = time.perf_counter()
    for trainer in trainers.values():
        _visit(trainer)
    affordable = limit * len(rates) / (SAMPLES * (time.perf_counter() - start))
    for sample in count(1):
        before = {name: _spent(trainer) for name, trainer in trainers.items()}
        for _ in range(min(VISITS, max(1, int(affordable)))):
            for trainer in trainers.values():
                _visit(trainer)
        for name, trainer in trainers.items():
            gradients, total, own = (
                now - then for now, then in zip(_spent(trainer), before[name], strict=True)
            )
            if gradients:
                samples[name].append((total / gradients, own / gradients))
        if sample >= SAMPLES and time.perf_counter() - start > limit * len(rates):
            break
    return {
        name: {"seconds": _median(pair[0] for pair in taken), "optimizer": _median(pair[1] for pair in taken)}
        for name, taken in samples.items()
    }


def _visit(trainer: Trainer) -> None:
    until = trainer.spent + VISIT
    with contextlib.suppress(RuntimeError, ValueError):  # runs may diverge; see `train`
        before = -1
        while before < trainer.spent < until:
            before = trainer.spent
            trainer.step()


def _spent(trainer: Trainer) -> tuple[int, float, float]:
    return trainer.spent, trainer.clock.total, trainer.clock.optimizer


def _median(values: object) -> float:
    values = list(values)  # type: ignore[call-overload]
    return median(values) if values else math.nan


def _rate(results: Results, task: str, contestant: str) -> float:
    best = results.best(task, contestant)
    return rate(CONTESTANTS[contestant].centre if best is None else best)


def _path(folder: Path, task: str) -> Path:
    return folder / task / "timing.json"


def _complete(task: str, results: Results) -> bool:
    return set(_able(task, results)) <= _measured(results.folder, task).keys()


def _able(task: str, results: Results) -> list[str]:
    """The contestants that are made for a task."""
    return [name for name in results.plan.contestants if TASKS[task].group in CONTESTANTS[name].groups]


def load(folder: Path, task: str) -> dict[str, dict[str, float]]:
    """Times of the contestants, those that the repository keeps where the folder has none.

    Times of other settings do not count, nor do those in the folder of another version of the code.
    """
    kept = {
        name: entry["times"]
        for name, entry in archive.stored(task).items()
        if "times" in entry
        and name in CONTESTANTS
        and archive.same(entry["identity"], identity(task, name), code=False)
    }
    return {
        name: {key: math.nan if value is None else value for key, value in times.items()}
        for name, times in (kept | _measured(folder, task)).items()
    }


def _measured(folder: Path, task: str) -> dict[str, dict[str, float | None]]:
    """The times in the folder."""
    try:
        content = archive.read(_path(folder, task))
    except FileNotFoundError:
        return {}
    return {
        name: times
        for name, times in content["times"].items()
        if name in CONTESTANTS and content["identity"][name] == identity(task, name)
    }
