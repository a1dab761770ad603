"""Runs in several processes, with a display of their progress."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from functools import partial
from itertools import product
from pathlib import Path

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .contestants import CONTESTANTS, rate
from .problems import TASKS
from .runs import Key, run
from .search import Results

__all__ = ["make"]

Wanted = Callable[[], list[Key]]


def make(results: Results, workers: int | None = None) -> bool:
    """Make all missing runs; those with a file are not repeated.

    Parameters
    ----------
    results : Results
        The plan and the folder.
    workers : int, optional
        Processes, each on one thread; by default one for each core.

    Returns
    -------
    bool
        False if it was interrupted: running ones are then finished, and the next call continues.
    """
    workers = workers or os.cpu_count() or 1
    plan = results.plan
    tuning: list[Wanted] = [
        partial(results.tuning, *names) for names in product(plan.tasks, plan.contestants)
    ]
    one: list[Wanted] = [partial(results.one_setting, name) for name in plan.contestants]
    shorter: list[Wanted] = [
        partial(results.shorter, *names) for names in product(plan.tasks, plan.shortened)
    ]
    stages = (
        ("tuning", tuning),
        ("one setting", one if plan.one_setting else []),
        ("shorter runs", shorter),
    )
    return all(Stage(title, chains, results).make(workers) for title, chains in stages)


class Stage:
    """Chains of runs: which run a chain needs next depends on the runs that it has made."""

    def __init__(self, title: str, chains: list[Wanted], results: Results) -> None:
        self.title, self.chains, self.results = title, chains, results
        self.queue: list[tuple[int, Key]] = []
        self.open = [0] * len(chains)
        self.seconds: dict[str, list[float]] = {}
        self.made = 0
        for chain in range(len(chains)):
            self.ask(chain)

    def ask(self, chain: int) -> None:
        """Queue the runs that a chain needs next."""
        keys = self.chains[chain]()
        self.open[chain] = len(keys)
        self.queue += [(chain, key) for key in keys]

    def pop(self) -> tuple[int, Key]:
        """The longest run of the queue, as far as the times of tasks are known."""
        entry = max(self.queue, key=lambda entry: self.expected(entry[1]))
        self.queue.remove(entry)
        return entry

    def expected(self, key: Key) -> float:
        """Seconds that a run may take; those of unknown tasks come first, to become known."""
        times = self.seconds.get(key.task)
        return key.percent / 100 * sum(times) / len(times) if times else math.inf

    def finished(self, chain: int, key: Key, seconds: float) -> None:
        """Note that a run is over; its chain goes on if it was waiting only for this one."""
        self.made += 1
        self.seconds.setdefault(key.task, []).append(seconds * 100 / key.percent)
        self.open[chain] -= 1
        if not self.open[chain]:
            self.ask(chain)

    def total(self) -> int:
        """Number of runs that this stage makes; the seeds of each chain, not known yet, are a guess."""
        later = (
            sum(self.results.plan.seeds - 1 for left in self.open if left) if self.title == "tuning" else 0
        )
        return self.made + sum(self.open) + later

    def make(self, workers: int) -> bool:
        """Make the runs; False if it was interrupted."""
        if not self.queue:
            return True
        running: dict[Future[float], tuple[int, Key, TaskID]] = {}
        with _progress() as progress, processes(workers) as pool:
            bar = progress.add_task(self.title, total=self.total())
            try:
                while self.queue or running:
                    while self.queue and len(running) < workers:
                        chain, key = self.pop()
                        shown = progress.add_task(_describe(key), total=None)
                        running[pool.submit(_timed, key, self.results.folder)] = chain, key, shown
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        chain, key, shown = running.pop(future)
                        progress.remove_task(shown)
                        self.finished(chain, key, future.result())
                    progress.update(bar, completed=self.made, total=self.total())
            except KeyboardInterrupt:
                progress.console.print("Finishing the runs under way; the same command goes on from there.")
                pool.shutdown(cancel_futures=True)
                return False
        return True


def _describe(key: Key) -> str:
    task, contestant = TASKS[key.task].title, CONTESTANTS[key.contestant].title
    part = "" if key.percent == 100 else f" · {key.percent}% of the steps"
    return f"{task} · {contestant} · {rate(key.exponent):.3g} · seed {key.seed}{part}"


def _timed(key: Key, folder: Path) -> float:
    start = time.perf_counter()
    run(key, folder)
    return time.perf_counter() - start


def processes(workers: int) -> Executor:
    """Processes that compute on one thread each, and go on when the keyboard interrupts this one."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # warnings of other libraries


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        refresh_per_second=2,
        speed_estimate_period=3600,
    )
