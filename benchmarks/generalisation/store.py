"""The results of all runs, in one small file from which the tables are made again without training."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "Store"]

RESULTS = Path(__file__).parent / "results.json"
DIGITS = 4


class Store:
    """Numbers by key, in a file that is complete after every run.

    Parameters
    ----------
    path : Path
        The file; it need not exist.
    """

    def __init__(self, path: Path = RESULTS) -> None:
        self.path = path
        content = json.loads(path.read_text("utf-8")) if path.exists() else {}
        self._values = dict(_leaves(content))

    def get(self, *key: str) -> list[float] | None:
        """The numbers of a run, infinite where they were not finite; None if it was not made."""
        return self._values.get(key)

    def put(self, *key: str, values: list[float]) -> None:
        """Keep the numbers of a run, with four digits."""
        self._values[key] = [_rounded(value) for value in values]
        tree: dict[str, Any] = {}
        for path, numbers in sorted(self._values.items()):
            branch = tree
            for name in path[:-1]:
                branch = branch.setdefault(name, {})
            branch[path[-1]] = [number if math.isfinite(number) else None for number in numbers]
        text = json.dumps(tree, indent=1, allow_nan=False)
        beside = self.path.with_suffix(".tmp")  # so that the file exists completely or not at all
        beside.write_text(re.sub(r"\s+(?=[^\[\]]*\])", " ", text) + "\n", encoding="utf-8")
        os.replace(beside, self.path)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else math.inf


def _leaves(
    tree: dict[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], list[float]]]:
    for name, below in tree.items():
        if isinstance(below, dict):
            yield from _leaves(below, (*path, name))
        else:
            yield (*path, name), [math.inf if value is None else value for value in below]
