"""Runs at several learning rates, kept in a file next to the scripts.

Training takes minutes; with its runs kept, a table or a picture can be drawn again in a second.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Curve", "Runs", "final", "first_at", "mean", "rate"]

FOLDER = Path(__file__).parent
LARGEST = 6
"""Learning rates that are tried at most."""


class Curve(NamedTuple):
    """The training loss and another figure at equal distances along a run."""

    train: list[float]
    test: list[float]


Train = Callable[[float, int], Curve]
"""Trains at a learning rate and with a seed."""


def rate(exponent: int) -> float:
    """Learning rate of the grid: ``10 ** (exponent / 2)``."""
    return float(10.0 ** (exponent / 2))


def final(curve: Curve) -> float:
    """The training loss at the end; infinite if the run diverged."""
    return curve.train[-1] if curve.train[-1] <= curve.train[0] else math.inf


class Runs:
    """The runs in a file, which is written after each new one.

    Parameters
    ----------
    name : str
        The file's name, without its ending.
    folder : pathlib.Path
        Where it is.
    """

    def __init__(self, name: str, folder: Path = FOLDER) -> None:
        self.path = folder / f"{name}.json"
        self.content: dict[str, Any] = {}
        if self.path.is_file():
            self.content = json.loads(self.path.read_text("utf-8"))

    def learn_from(self, data: str) -> bool:
        """Whether the runs are on these data, or there are none yet; if they are not, say so."""
        kept = self.content.setdefault("data", data)
        if kept != data:
            print(f"Nothing is trained on {data}, since {self.path.name} holds runs on {kept}: move it away.")
        return bool(kept == data)

    def keep(self, key: str, value: Any) -> None:
        """Add an entry, and write the file: a line for each."""
        self.content[key] = value
        lines = (f"{json.dumps(key)}: {json.dumps(self.content[key])}" for key in sorted(self.content))
        self.path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    def at(self, name: str, exponent: int) -> list[Curve]:
        """The runs at a learning rate, seed by seed."""
        entries = {key: value for key, value in self.content.items() if key.startswith(f"{name} {exponent} ")}
        return [
            Curve(*([math.nan if x is None else x for x in values] for values in entry))
            for _, entry in sorted(entries.items())
        ]

    def tried(self, name: str) -> dict[int, float]:
        """The final training loss of the first seed at each exponent that has been tried."""
        exponents = sorted({int(key.split()[1]) for key in self.content if key.split()[0] == name})
        return {exponent: final(self.at(name, exponent)[0]) for exponent in exponents}

    def best(self, name: str) -> int:
        """The exponent with the least training loss at the first seed."""
        tried = self.tried(name)
        return min(tried, key=lambda exponent: tried[exponent])

    def tuned(self, name: str) -> list[Curve]:
        """The runs at the best learning rate."""
        return self.at(name, self.best(name))

    def tune(self, name: str, exponents: Sequence[int], seeds: int, train: Train) -> None:
        """Train what is missing: at these rates, then with all seeds at the best.

        If there are three rates or more, others follow until the best is no end of them.
        """
        todo = list(exponents)
        while todo:
            for exponent in todo:
                self._train(name, exponent, 0, train)
            tried, best = self.tried(name), self.best(name)
            if 3 <= len(tried) < LARGEST:
                todo = [next_one for next_one in (best - 1, best + 1) if next_one not in tried]
            else:
                todo = []
        for seed in range(1, seeds):
            self._train(name, self.best(name), seed, train)

    def _train(self, name: str, exponent: int, seed: int, train: Train) -> None:
        key = f"{name} {exponent} {seed}"
        if key not in self.content:
            curve = train(rate(exponent), seed)
            self.keep(key, [[_rounded(x) for x in values] for values in curve])
            print(f"{key}: training loss {final(curve):.4g}", flush=True)


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def mean(curves: Sequence[Curve]) -> Curve:
    """The mean of several runs."""
    return Curve(*(np.mean(values, axis=0).tolist() for values in zip(*curves, strict=True)))


def first_at(values: Sequence[float], level: float) -> float:
    """Where along a run, from 0 to 1, the values first reach a level from above, linear between them."""
    reached = np.flatnonzero(np.asarray(values) <= level)
    if not len(reached):
        return math.inf
    after = int(reached[0])
    if after == 0:
        return 0.0
    high, low = values[after - 1], values[after]
    return (after - 1 + (high - level) / (high - low)) / (len(values) - 1)
