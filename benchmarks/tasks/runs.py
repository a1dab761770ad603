"""One run of a contestant on a task, and the file that it writes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import mlbfgs_core
import mlbfgs_torch

from . import archive
from .contestants import CONTESTANTS, rate
from .problems import TASKS
from .training import Record, train

__all__ = ["RESULTS", "Key", "identity", "load", "run", "write_json"]

RESULTS = Path(__file__).parents[2] / "results" / "tasks"


class Key(NamedTuple):
    """What identifies a run: names of task and contestant, exponent of the learning rate on the grid, seed,
    and for what percentage of the task's steps it is planned."""

    task: str
    contestant: str
    exponent: int
    seed: int
    percent: int = 100

    def path(self, results: Path) -> Path:
        """The run's file."""
        name = f"{self.seed}" if self.percent == 100 else f"{self.seed}_{self.percent}"
        return results / self.task / self.contestant / f"{rate(self.exponent):.3g}" / f"{name}.json"


def identity(task: str, contestant: str) -> dict[str, str]:
    """What a run depends on; a run whose file says otherwise does not count.

    All runs depend on the task and on the contestant's settings, and ours also on this repository's
    algorithm.
    """
    entry = CONTESTANTS[contestant]
    result = {
        "task": f"{task} {TASKS[task].version}",
        "settings": repr(sorted(entry.settings.items())),
        "steps": str(TASKS[task].steps),
    }
    return {**result, "code": _CODE} if entry.ours else result


def run(key: Key, results: Path) -> Path:
    """Make a run, and write its file when it is over."""
    task = TASKS[key.task]
    steps = round(task.steps * key.percent / 100)
    record = train(task.make(key.seed), CONTESTANTS[key.contestant], rate(key.exponent), steps)
    about = {
        **key._asdict(),
        "rate": rate(key.exponent),
        "date": datetime.now(UTC).date().isoformat(),
        "identity": identity(key.task, key.contestant),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    path = key.path(results)
    write_json(path, {**about, **asdict(record)})
    return path


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file under another name first, so that it exists completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(_plain(content), file, indent=1, allow_nan=False)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _plain(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load(key: Key, results: Path, *, kept: bool = True, again: bool = False) -> Record | None:
    """The run's record, or None if there is none for the current task and settings.

    Parameters
    ----------
    key : Key
    results : Path
        The folder of the runs.
    kept : bool
        Whether the runs that the repository keeps count.
    again : bool
        Whether these have to be of the present version of the code, as those in the folder do.
    """
    wanted = identity(key.task, key.contestant)
    try:
        content = archive.read(key.path(results))
        found = content["identity"] == wanted
    except FileNotFoundError:
        found = False
    if not found:
        entry = archive.stored(key.task).get(key.contestant) if kept else None
        place = archive.name_of(key.exponent, key.seed, key.percent)
        if (
            entry is None
            or place not in entry["runs"]
            or not archive.same(entry["identity"], wanted, code=again)
        ):
            return None
        content = entry["runs"][place]
    values = {name: content[name] for name in Record.__dataclass_fields__ if name in content}
    for name in ("train", "test"):
        values[name] = [math.inf if value is None else value for value in values[name]]
    return Record(**values)


def _hash(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


# Computed when this module is imported, like the code that runs.
_CODE = _hash(
    path for module in (mlbfgs_core, mlbfgs_torch) for path in Path(module.__file__).parent.rglob("*.py")
)
_PACKAGES = ("heavyball", "mlbfgs", "numpy", "pytorch_optimizer", "torch", "torchzero")
